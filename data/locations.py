"""Where data lies, and how that is shown: addresses of object stores may carry keys, which nothing may repeat."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"`<>]*[^\s'\"`<>).,;:\]}]")
_HOST = re.compile(r"[^/:@?#]*(?=[/?#]|$)")
_HOST_WITH_PORT = re.compile(r"[^/:@?#]*(:\d+)?(?=[/?#]|$)")
_WITH_PORT = ("hdfs", "viewfs", "http", "https")
"""Schemes whose hosts may have a port. Buckets have none: what follows a colon there is a key, which may be digits."""

_OPTIONS = re.compile(
    "allow_bucket_(creation|deletion)|(buffer|default_block)_size|(connect|request)_timeout|endpoint_override|"
    "force_virtual_addressing|project_id|region|replication|retry_limit_seconds|scheme"
)
"""What an address may say after its question mark that opens nothing; whatever else stands there might be a key."""


def is_uri(path: str) -> bool:
    """Whether this names a place by its scheme, and is no local path."""
    return "://" in path


def shown(address: str) -> str:
    """How messages, logs and files call a place: a path as it is, an address without keys and options."""
    if not is_uri(address):
        return address
    scheme, _, place, _ = _parts(address)
    return f"{scheme}://{place}".rstrip("/")


def redacted(text: str, *, known: str = "") -> str:
    """A text of somebody else's with every address in it, and the `known` one that it is about, as `shown` shows it."""
    text = text.replace(known, shown(known)) if known else text
    return _ADDRESS.sub(lambda found: shown(found[0]), text)


def without_keys(address: str) -> str:
    """An address that still leads to its place, for whoever has the keys to it; a path as it is."""
    if not is_uri(address):
        return address
    scheme, user, place, query = _parts(address)
    options = [(name, shown(value)) for name, value in parse_qsl(query) if _OPTIONS.fullmatch(name)]
    user = "anonymous@" if user == "anonymous" else ""
    return f"{scheme}://{user}{place}" + (f"?{urlencode(options)}" if options else "")


def split(address: str) -> tuple[str, str]:
    """An address of the folder that `*` and `[` do not concern, with its keys and options, and what follows below it.

    The latter is empty where the address is a whole bucket or host.
    """
    scheme, user, place, query = _parts(address)
    parts = place.rstrip("/").split("/")
    first_pattern = next((number for number, part in enumerate(parts) if "*" in part or "[" in part), len(parts))
    end = max(min(first_pattern, len(parts) - 1), 1)
    folder = "/".join(parts[:end]) or "/"
    keys, options = f"{user}@" if user else "", f"?{query}" if query else ""
    return f"{scheme}://{keys}{folder}{options}", "/".join(parts[end:])


def local_path(text: str) -> Path:
    """The type of an argument that has to be a path of this machine; an address of a store is refused."""
    if is_uri(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is in an object store; give a path of this machine")
    return Path(text)


def _parts(address: str) -> tuple[str, str, str, str]:
    """Scheme, what stands before an @, host and path, and the options of an address."""
    scheme, _, rest = address.partition("://")
    user = ""
    # Keys hold slashes, pluses and worse, which users forget to escape: unless a host stands in front, the place
    # begins behind the last @ of all.
    host = _HOST_WITH_PORT if scheme.lower() in _WITH_PORT else _HOST
    if not host.match(rest) and "@" in rest:
        user, _, rest = rest.rpartition("@")
    place, _, query = rest.partition("#")[0].partition("?")
    return scheme, user, place, query
