"""Students on disk: `rounds/NN/` of a run's folder, and `model/`, the last of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError
from ..files import digest, replace_folder
from ..surgery import prune


def save_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, target: Path
) -> None:
    """Write a student in `dtype` so that `target` is either as it was or the whole student."""
    if dtype != student.dtype:
        student = prune(student, [], share_weights=True).to(dtype)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    student.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    replace_folder(temporary, target)


def check_student(folder: Path, files: dict[str, str]) -> None:
    """Raise [`LayerPruneError`] unless the student of a round is made of the files it ended with."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or digest(path) != expected:
            raise LayerPruneError(
                f"{path} is {'damaged' if path.is_file() else 'missing'}: it is not what round {int(folder.name)} "
                "saved; put it back, or start again in another output_dir"
            )


def publish_student(source: Path, target: Path, files: list[Path]) -> None:
    """Copy a saved student, and `files` beside it, so that `target` is either as it was or the whole copy."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    for path in files:
        shutil.copy(path, temporary)
    replace_folder(temporary, target)
