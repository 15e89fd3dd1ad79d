"""The one folder that goes to the Hub: what a stranger needs, and nothing that is only the author's."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from ..errors import LayerPruneError, first_line
from ..files import write_atomically
from ..report import write_report_files
from .card import run_card
from .metadata import BaseFacts
from .reading import PLAN_FILE
from .run_folder import RECIPE_FILE, RunFolder
from .scrub import check_nothing_local

INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
TOKENIZER = (
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
CODE = ("configuration_pruned_qwen2.py", "modeling_pruned_qwen2.py")
OWN = (
    INDEX, *TOKENIZER, *SETTINGS, *CODE, PLAN_FILE, RECIPE_FILE, "report.json", "report.md", "quality.png",
    "layers.png", "README.md",
)  # fmt: skip
LOCAL_KEYS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
"""Entries of a config that say where a model was loaded from."""


def is_own(name: str) -> bool:
    """Whether a push may have left a file there; what the next one does not bring again, it takes away."""
    return name in OWN or WEIGHTS.fullmatch(name) is not None


def stage(
    run: RunFolder,
    number: int,
    folder: Path,
    repo_id: str,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    facts: BaseFacts | None = None,
    revision: str | None = None,
    revisions: Sequence[str] = (),
    token: str | None = None,
) -> None:
    """Fill an empty folder with everything that makes up a round's student; weights are linked, not copied.

    Args:
        run ([`RunFolder`]): the run.
        number (`int`): the round, from 1.
        folder (`Path`): the empty folder.
        repo_id (`str`): where it will go.
        base_model (`str`, *optional*): Hub id of the model it was made from, if the run does not say.
        tags (`Sequence[str]`, *optional*): tags of the card beside the library's own.
        datasets (`Sequence[str]`, *optional*): Hub ids of data the run does not name.
        facts ([`BaseFacts`], *optional*): license and languages of the base model.
        revision (`str`, *optional*): the revision it goes to, if that is not main.
        revisions (`Sequence[str]`, *optional*): revisions that hold the run's other depths.
        token (`str`, *optional*): the token in use, which must not be in any file.

    Raises:
        [`LayerPruneError`]: if the student is not whole, or a file names a place of this machine or a token.
    """
    student, plan = run.student(number), run.plan(number)
    _link_weights(student, folder)
    for name in (*TOKENIZER, *(CODE if plan.parallel_pairs else ())):
        if (student / name).is_file():
            shutil.copyfile(student / name, folder / name)
    for name in SETTINGS:
        if (student / name).is_file():
            settings = json.loads((student / name).read_text(encoding="utf-8"))
            told = {key: value for key, value in settings.items() if key not in LOCAL_KEYS}
            write_atomically(folder / name, json.dumps(told, indent=2, sort_keys=True) + "\n")
    _check_whole(folder, student, bool(plan.parallel_pairs))
    write_atomically(folder / PLAN_FILE, plan.to_json() + "\n")
    recipe = run.recipe(number) | {"output_dir": repo_id.split("/")[-1]}
    write_atomically(folder / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False))
    write_report_files(folder, run.report_until(number))
    options = {"datasets": datasets, "facts": facts, "pushed": True, "revision": revision, "revisions": revisions}
    card = run_card(run, number, repo_id, base_model, tags, **options)
    write_atomically(folder / "README.md", str(card))
    check_nothing_local(folder, (run.folder, Path.home(), Path.cwd()), token)


def _link_weights(student: Path, folder: Path) -> None:
    for path in student.iterdir():
        if path.name != INDEX and not WEIGHTS.fullmatch(path.name):
            continue
        try:
            (folder / path.name).symlink_to(path.resolve())
        except OSError:  # a file system, or an account on Windows, without links
            shutil.copyfile(path, folder / path.name)


def _check_whole(folder: Path, student: Path, parallel: bool) -> None:
    needed = ["config.json", *(CODE if parallel else ())]
    index = folder / INDEX
    if index.is_file():
        needed += sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        needed.append("model.safetensors")
    missing = [name for name in needed if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer.json")
    if missing:
        raise LayerPruneError(f"{student} is no whole student: {', '.join(missing)} is missing; save it again")
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt"):  # reads the header, which says how long the file is
                pass
        except SafetensorError as error:
            raise LayerPruneError(
                f"{student} is no whole student: {path.name} is damaged ({first_line(error)}); save it again"
            ) from error
