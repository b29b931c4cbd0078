"""`ultrarec study`: train, test and time what a study compares, and write down what came of it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...data.errors import UserError
from ..arguments import positive
from .config import ComputeStudy, QualityStudy, Study, chosen_parts, list_studies, load_study

if TYPE_CHECKING:
    from .results import Compute, Quality

RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec study`."""
    add = parser.add_argument
    add("study", metavar="NAME|FILE.toml", help=f"one of {', '.join(list_studies())}; or a TOML file")
    add("--data", type=Path, metavar="DIR", help="the prepared dataset; the study says which, if it is missing")
    add("--out", type=Path, metavar="DIR", help="folder of the study's runs and results (default: studies/NAME)")
    add("--only", action="append", default=[], metavar="PART", help="a variant, or a length; may be repeated")
    add("--seeds", type=positive, metavar="N", help="runs of each variant (default: what the study says)")
    add("--procs", type=positive, default=1, metavar="N", help="processes per run (default: %(default)s)")
    add("--report", action="store_true", help="run nothing; write results, table and pictures of what has finished")
    add("--page", type=Path, metavar="FILE.md", help="also put the results on this page, and its files beside it")


def run(args: argparse.Namespace) -> int:
    """Do what is missing of the study, then write its results; returns the exit code."""
    study = load_study(args.study)
    name = Path(args.study).stem
    out = args.out or Path("studies") / name
    parts = chosen_parts(study, args.only)
    if find_spec("matplotlib") is None:
        raise UserError("a study draws with matplotlib, which is not installed; pip install 'ultrarec[bench]'")

    from ...data.atomic import run_until_signalled
    from ...trainer.noise import silence

    silence()

    def work() -> None:
        if args.report and args.page and args.out is None and not out.exists():
            _tell_again(name, study, args.page)
            return
        if isinstance(study, QualityStudy):
            data = _dataset(study, args.data)
            if not args.report:
                _train(study, parts, args=args, data=data, out=out)
        else:
            _require_no_training(args)
            if not args.report:
                _measure(study, parts, out)
        _report(name, study, out, args)

    return run_until_signalled(work, left=lambda: "what has finished stays; the same command goes on from there")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _dataset(study: QualityStudy, path: Path | None) -> str:
    """The dataset's folder, which must be there."""
    from ...data.storage import load_dataset

    if path is None:
        raise UserError(f"this study needs --data DIR, a dataset made by\n{study.prepare.strip()}")
    try:
        load_dataset(str(path))
    except UserError as error:
        raise UserError(f"--data {path}: {error}\nthis study's dataset is made by\n{study.prepare.strip()}") from None
    return str(path.resolve())


def _require_no_training(args: argparse.Namespace) -> None:
    for name, default in (("data", None), ("seeds", None), ("procs", 1)):
        if getattr(args, name) != default:
            raise UserError(f"--{name} {getattr(args, name)}: this study trains nothing; leave it out")


def _train(study: QualityStudy, names: list[str], *, args: argparse.Namespace, data: str, out: Path) -> None:
    from .page import score
    from .runs import complete, finished, runs_of

    runs = runs_of(study, names, seeds=args.seeds or study.seeds, data=data, out=out)
    todo = [run for run in runs if finished(run) is None]
    _say(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished")
    for number, run in enumerate(todo, start=1):
        _say(f"\n[{number}/{len(todo)}] {run.title}: {run.folder}")
        result = complete(run, study, procs=args.procs)
        _say(", ".join(f"{name} {score(result.test[name]) or '-'}" for name in study.metrics))


def _measure(study: ComputeStudy, parts: list[str], out: Path) -> None:
    from . import compute

    for length in map(int, parts):
        path = compute.path_of(out, length)
        if not path.exists():
            compute.write(compute.compare(study, length, _say), path)
        elif compute.read(path).settings != compute.settings_of(study):
            raise UserError(f"{path} was measured with other settings than this study has now; remove it")


def _report(name: str, study: Study, out: Path, args: argparse.Namespace) -> None:
    """Results, table and pictures of what has finished, in the study's folder and on the page."""
    from . import page, pictures, results

    found: Quality | Compute
    if isinstance(study, QualityStudy):
        from .runs import finished, runs_of

        runs = runs_of(study, study.parts, seeds=args.seeds or study.seeds, data=str(args.data), out=out)
        found = results.Quality(name, study, tuple(each for run in runs if (each := finished(run))))
        is_empty = not found.results
    else:
        from . import compute

        paths = [compute.path_of(out, length) for length in study.lengths]
        found = results.Compute(name, study, tuple(compute.read(path) for path in paths if path.exists()))
        is_empty = not found.comparisons
    if is_empty:
        raise UserError(f"{out} holds no finished part of study {name}; run it without --report, or give its --out")
    results.write(found, out / RESULTS_FILE)
    pictures.draw(found, out)
    (out / TABLE_FILE).write_text(page.section(found, pictures="."), encoding="utf-8")
    print((out / TABLE_FILE).read_text(encoding="utf-8"))
    if args.page is not None:
        _put_on(args.page, found)


def _put_on(path: Path, found: Quality | Compute) -> None:
    from . import page, pictures, results

    folder = path.with_suffix("")
    results.write(found, folder / f"{found.name}.json")
    pictures.draw(found, folder)
    path.write_text(page.page(folder), encoding="utf-8")
    _say(f"written: {path}")


def _tell_again(name: str, study: Study, path: Path) -> None:
    """Put what a page keeps of a study on it anew, with the study's texts, pictures and published figures of now."""
    from . import results

    kept = path.with_suffix("") / f"{name}.json"
    if not kept.exists():
        raise UserError(f"neither studies/{name} nor {kept} is there to report; run the study, or give its --out")
    found = results.read(kept)
    for each in found.variants:
        then, now = found.study.variants[each], study.variants.get(each)
        if now is None or (then.recipe, then.set) != (now.recipe, now.set):
            raise UserError(
                f"{kept} was made with other settings of {each!r} than this study has now; run the study with --page"
            )
    if found.study.kind != study.kind:
        raise UserError(f"{kept} is of kind={found.study.kind!r}, and {name} now of {study.kind!r}; run it with --page")
    _put_on(path, replace(found, study=cast(Any, study)))
