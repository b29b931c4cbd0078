"""Addresses may carry keys; what shows them does not."""

import argparse

import pytest

from ultrarec.data.locations import local_path, redacted, shown, without_keys

ADDRESSES = {
    "s3://KEY:SECRET@bucket/data?region=eu&session_token=SECRET": "s3://bucket/data",
    "s3://KEY:SEC/RET+x@bucket/data": "s3://bucket/data",
    "s3://KEY:SEC?RET@bucket/data": "s3://bucket/data",
    "s3://KEY:12/SECRET@bucket/data": "s3://bucket/data",
    "s3://KEY:/SECRET@bucket/data": "s3://bucket/data",
    "https://KEY:/SECRET@host/data": "https://host/data",
    "https://host:80/user@mail/data": "https://host:80/user@mail/data",
    "abfss://bucket@account.net/data?sig=SECRET": "abfss://account.net/data",
    "https://host:8080/data#SECRET": "https://host:8080/data",
    "hdfs://KEY@name:8020/data": "hdfs://name:8020/data",
    "s3://bucket/user@mail/data": "s3://bucket/user@mail/data",
    "gs://bucket/my data?token=SEC RET": "gs://bucket/my data",
    "/a path?/of this@machine": "/a path?/of this@machine",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_keys_and_options(address):
    assert shown(address) == ADDRESSES[address]


def test_texts_of_others_lose_the_keys_in_them():
    text = "Cannot parse URI: 's3://KEY:SEC/RET@bucket/data?token=SECRET', (gs://x/y?z=SECRET); try again"
    assert redacted(text) == "Cannot parse URI: 's3://bucket/data', (gs://x/y); try again"
    known = "s3://bucket/my data?sig=SECRET"
    assert redacted(f"no {known}!", known=known) == "no s3://bucket/my data!"


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("s3://KEY:SECRET@bucket/x?region=eu&token=SECRET&scheme=http", "s3://bucket/x?region=eu&scheme=http"),
        ("gs://anonymous@bucket/x", "gs://anonymous@bucket/x"),
        (
            "s3://bucket/x?endpoint_override=http://KEY:SECRET@host:1",
            "s3://bucket/x?endpoint_override=http%3A%2F%2Fhost%3A1",
        ),
        ("/local/x?", "/local/x?"),
    ],
)
def test_what_a_file_keeps_of_an_address_leads_to_its_place_and_opens_nothing(address, kept):
    assert without_keys(address) == kept


def test_an_address_is_no_folder_of_this_machine():
    with pytest.raises(argparse.ArgumentTypeError, match=r"^s3://bucket/x is in an object store; give a path of this"):
        local_path("s3://KEY:SECRET@bucket/x")
