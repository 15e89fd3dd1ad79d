"""The Python of the documentation runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_extending_runs_word_for_word(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", "".join(blocks)], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    safest, values = result.stdout.splitlines()[-2:]
    assert safest.isdigit() and values.startswith("{2: ")
