"""The card a push of the embedded run would have, without the push: `docs/example-card`.

python recipes/tiny/make_card.py --output_dir docs/example-card
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_layerprune.data import ASSETS
from hf_layerprune.hub import load_run, run_card
from hf_layerprune.report import save_run_plots

RESULTS = Path(__file__).parent / "results"
NAME = "user/embedded-8"


def embedded_card() -> str:
    """Made of the committed report and the recipe that led to it."""
    with TemporaryDirectory() as folder:
        shutil.copy(RESULTS / "report.json", folder)
        shutil.copy(ASSETS / "recipe.yaml", folder)
        run = load_run(folder)
        return str(run_card(run, len(run.record.rounds), NAME, pushed=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(embedded_card(), encoding="utf-8")
    save_run_plots(folder, load_run(RESULTS).record)


if __name__ == "__main__":
    main()
