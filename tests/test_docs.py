"""Pages that are written from the code say what the code says."""

import importlib.util
import json
import re
from pathlib import Path

from ultrarec.launch.study import page, results
from ultrarec.launch.study.config import load_study

DOCS = Path(__file__).parent.parent / "docs"
RECORD = Path(__file__).parent / "golden" / "attention_kernels.jsonl"
KERNELS = {"forward": "forward", "gradients of k and v": "keys", "gradient of q": "queries"}


def test_the_page_of_settings_is_the_configuration_tree():
    spec = importlib.util.spec_from_file_location("settings_page", DOCS / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "settings.md").read_text() == module.page(), "run python docs/settings.py"


def test_the_page_of_results_is_what_the_studies_left():
    assert (DOCS / "results.md").read_text() == page.page(DOCS / "results"), "run ultrarec study NAME --report --page"


def test_results_are_of_the_variants_as_they_are_now():
    for path in (DOCS / "results").glob("*.json"):
        found, now = results.read(path), load_study(path.stem)
        shown = found.variants if isinstance(found, results.Quality) else list(found.study.variants)
        for name in shown:
            assert found.study.variants[name] == now.variants[name], f"run study {path.stem} again with --page"
        for name in page.picture_names(found):
            assert (DOCS / "results" / f"{path.stem}-{name}.svg").is_file()


def test_the_table_of_compiled_kernels_is_what_was_recorded_of_them():
    """And each of their loops has as many special-function instructions per score as the page says."""
    text = (DOCS / "attention.md").read_text()
    row = r"^\| (\w+) \| (\d+) \| ([a-z ]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \| (\d+) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) == 3 * 2 * len(KERNELS)
    recorded = [json.loads(line) for line in RECORD.read_text().splitlines()]
    setting = {"dtype": "bfloat16", "biased": False, "masked": False, "scale_per_query": False}
    for target, width, name, *figures in rows:
        wanted = setting | {"target": target, "width": int(width), "name": KERNELS[name]}
        (kernel,) = (each for each in recorded if each.items() >= wanted.items())
        issued = [f"{loop['issued']:.2f}" for loop in kernel["loops"]]
        assert [*issued, str(kernel["registers"]), str(kernel["spilled"])] == figures, (target, width, name)
        num_special = 1 if target == "sm_90" else 2
        assert [loop["by_kind"]["special"] for loop in kernel["loops"]] == [num_special] * 2
