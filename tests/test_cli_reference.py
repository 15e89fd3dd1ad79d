"""docs/cli.md says what the verbs take."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_up_to_date():
    script = runpy.run_path(str(DOCS / "make_cli.py"))
    assert (DOCS / "cli.md").read_text() == script["reference"](), "run `python docs/make_cli.py`"
