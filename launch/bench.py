"""`ultrarec bench SUBJECT`: each subject measures one part of the framework on this machine, in a module of its own."""

from __future__ import annotations

import argparse

from . import bench_attention, bench_checkpoint, bench_loader

SUBJECTS = {
    "attention": (
        bench_attention,
        "HSTU attention against the padded dense formulation and the rate of matrix products",
    ),
    "checkpoint": (
        bench_checkpoint,
        "what an asynchronous save costs the steps, and rates of writing and reading against a plain copy of the files",
    ),
    "loader": (bench_loader, "batches of a prepared dataset per second, against a bare scan of its files"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec bench`, subject by subject."""
    subparsers = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, (subject, summary) in SUBJECTS.items():
        subject.add_arguments(subparsers.add_parser(name, help=summary, description=summary))


def run(args: argparse.Namespace) -> int:
    """Measure what `args.subject` names."""
    subject, _ = SUBJECTS[args.subject]
    return subject.run(args)
