"""A prepared dataset in words and as a picture, from its dataset.json, its counts of items and the sizes of files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from .errors import UserError, counted
from .items import read_items
from .schema import HISTORIES_FOLDER, DatasetInfo, HistoryFile, Lengths, Split
from .storage import Storage

BAR = 40  # characters of the longest bar
TOP_ITEMS = (0.001, 0.01, 0.1)


def describe(info: DatasetInfo, storage: Storage) -> list[str]:
    """Lines for a terminal; `storage` is where the dataset lies.

    Raises UserError if items.parquet is missing or damaged, and if a store refuses to list its files.
    """
    counts = info.counts
    lines = [
        f"{info.root}",
        f"  made by      {info.created_by} from {counted(len(info.sources), 'file')}; fingerprint {info.fingerprint}",
        f"  counts       {counted(counts.users, 'user')}, {counted(counts.events, 'event')}, "
        f"{counted(counts.items, 'item')}",
        f"  density      {counts.events / max(counts.users * counts.items, 1):.3g} of all pairs of a user and an item",
        f"  split        {_split(info.split)}",
    ]
    for name in ("train", "validation", "test"):
        part = getattr(counts, f"{name}_events")
        lines.append(f"    {name:<11}{part:>15,} events  {part / max(counts.events, 1):6.1%}")
    if counts.unknown_item_events:
        share = counts.unknown_item_events / counts.events
        lines.append(
            f"    {'unknown':<11}{counts.unknown_item_events:>15,} events  {share:6.1%}  items not in training"
        )
    if info.minimums is not None and (info.minimums.user_events or info.minimums.item_events):
        lines.append(f"  minimums     {info.minimums.user_events} per user, {info.minimums.item_events} per item")
    return [
        *lines,
        *_columns(info),
        *_vocabularies(info, storage),
        *_files(info.files, storage),
        *_lengths(info.lengths),
    ]


def draw(info: DatasetInfo, picture: Path) -> None:
    """A histogram of the lengths of histories: users, and the events that they have.

    Raises UserError for a dataset that does not hold it, and if the picture cannot be written.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    lengths = info.lengths
    if lengths is None:
        raise UserError(f"--picture: {info.root} was prepared before datasets held their lengths; prepare it again")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    place = np.arange(len(lengths.bucket_from))
    shares = {
        "users": np.array(lengths.bucket_users) / max(info.counts.users, 1),
        "events": np.array(lengths.bucket_events) / max(info.counts.events, 1),
    }
    for shift, (name, share) in zip((-0.2, 0.2), shares.items(), strict=True):
        axes.bar(place + shift, 100 * share, width=0.4, label=f"of all {name}")
    axes.set_xticks(place, _names(lengths), rotation=45, ha="right")
    axes.set_xlabel("length of the history, in events")
    axes.set_ylabel("share in %")
    axes.set_title(f"{info.counts.users:,} users, {lengths.mean:,.1f} events each on average")
    axes.legend()
    try:
        figure.savefig(picture, dpi=150)
    except OSError as error:
        raise UserError(f"--picture {picture} cannot be written ({error.strerror}); see who may write there") from error
    finally:
        pyplot.close(figure)


def _split(split: Split) -> str:
    if split.kind == "leave_last":
        return f"the last {split.num_events} of each user tested, as many before validated"
    if split.kind == "split_time":
        validation = "" if split.validation_time is None else f", validated from {split.validation_time}"
        return f"tested from time {split.time}{validation}"
    return "none: everything trains"


def _columns(info: DatasetInfo) -> list[str]:
    actions = ", ".join(info.roles.actions) or "none"
    declared = [f"{name} ({column.type}, per {column.kind})" for name, column in info.columns.items()]
    return [f"  actions      {actions}", f"  columns      {', '.join(declared) or 'none'}"]


def _vocabularies(info: DatasetInfo, storage: Storage) -> list[str]:
    """Sizes, and which share of the training events the most frequent items have."""
    lines = [f"  vocabulary   {name}: {each.size:,} ids" for name, each in info.vocabularies.items()]
    counts = np.sort(read_items(storage, info, ["count"])["count"].to_numpy())[::-1]
    total = max(int(counts.sum()), 1)
    shares = [
        f"{int(counts[: max(round(top * len(counts)), 1)].sum()) / total:.1%} on the top {top:.1%}" for top in TOP_ITEMS
    ]
    return [*lines, f"  skew         of the training events, {', '.join(shares)} of items"]


def _files(files: tuple[HistoryFile, ...], storage: Storage) -> list[str]:
    groups = sum(file.row_groups for file in files)
    line = f"  files        {counted(len(files), 'file')}, {sum(file.bytes for file in files) / 1e6:,.1f} MB"
    events = list(itertools.chain.from_iterable(file.group_events for file in files))
    most = f" of up to {max(events):,} events" if events else ""
    return [f"{line}, {counted(groups, 'row group')}{most}", *_damage(files, storage)]


def _damage(files: tuple[HistoryFile, ...], storage: Storage) -> list[str]:
    """A line if files are missing or cut off, which their sizes tell without reading them."""
    held = storage.sizes(HISTORIES_FOLDER)
    found = [f"{file.path} {problem}" for file in files if (problem := file.damage(held.get(file.path)))]
    if not found:
        return []
    others = f", and so on: {len(found)} of {counted(len(files), 'file')}" if len(found) > 1 else ""
    return [f"  DAMAGED      {found[0]}{others}; restore what is damaged, or prepare the dataset again"]


def _lengths(lengths: Lengths | None) -> list[str]:
    if lengths is None:
        return ["  lengths      not stated: prepared by an older version; prepare it again to see them"]
    quantiles = ", ".join(f"{float(share):.0%} {length:,}" for share, length in lengths.quantiles.items())
    lines = [f"  lengths      mean {lengths.mean:,.1f} events; not exceeded by a share of users: {quantiles}"]
    lines.append(f"    {'events':>17}{'users':>15}{'of users':>10}{'of events':>11}")
    total_users, total_events = max(sum(lengths.bucket_users), 1), max(sum(lengths.bucket_events), 1)
    most = max(*lengths.bucket_users, 1)
    for name, users, events in zip(_names(lengths), lengths.bucket_users, lengths.bucket_events, strict=True):
        shares = f"{users / total_users:>10.1%}{events / total_events:>11.1%}"
        lines.append(f"    {name:>17}{users:>15,}{shares}  {'#' * -(-users * BAR // most)}")
    return lines


def _names(lengths: Lengths) -> list[str]:
    """The range of each bucket; the last ends at the longest history."""
    ends = [*(begin - 1 for begin in lengths.bucket_from[1:]), lengths.quantiles["1.0"]]
    return [
        f"{begin:,}" if begin == end else f"{begin:,}–{end:,}"
        for begin, end in zip(lengths.bucket_from, ends, strict=True)
    ]
