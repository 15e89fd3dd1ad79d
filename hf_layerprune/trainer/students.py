"""Students on disk: `rounds/NN/` of a run's folder, and `model/`, the last of them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError
from ..files import replace_folder
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


def weight_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights."""
    return {path.name: _digest(path) for path in sorted(folder.glob("*.safetensors"))}


def check_weights(folder: Path, digests: dict[str, str]) -> None:
    """Raise [`LayerPruneError`] unless the weights of a round are the files it ended with."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise LayerPruneError(
                f"{path} is {'damaged' if path.is_file() else 'missing'}: it is not what round {int(folder.name)} "
                "saved; put it back, or start again in another output_dir"
            )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def publish_student(source: Path, target: Path, files: list[Path]) -> None:
    """Copy a saved student, and `files` beside it, so that `target` is either as it was or the whole copy."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    for path in files:
        shutil.copy(path, temporary)
    replace_folder(temporary, target)
