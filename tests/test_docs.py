"""Pages that are written from the code say what the code says."""

import importlib.util
from pathlib import Path

from ultrarec.launch.study import page, results
from ultrarec.launch.study.config import load_study

DOCS = Path(__file__).parent.parent / "docs"


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
