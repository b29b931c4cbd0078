"""Pages that are written from the code say what the code says."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_of_settings_is_the_configuration_tree():
    spec = importlib.util.spec_from_file_location("settings_page", DOCS / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "settings.md").read_text() == module.page(), "run python docs/settings.py"
