"""Students on disk: `rounds/NN/` of a run's folder, and `model/`, the last of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError
from ..files import digest, digests, replace_folder, sync_folder
from ..surgery import prune


def save_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, target: Path
) -> None:
    """Write a student in `dtype`, so that nothing half written is ever seen at `target`; see [`replace_folder`]."""
    replace_folder(write_student(student, tokenizer, dtype, target), target)


def write_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, target: Path
) -> Path:
    """Write a student in `dtype` beside `target`, to the folder that is given back; it is on disk then."""
    student = prune(student, [], share_weights=True).to(dtype)
    temporary = _beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    student.save_pretrained(temporary)
    _save_tokenizer(tokenizer, temporary)
    sync_folder(temporary)
    return temporary


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that transformers 4 reads it as well, which needs the names it had there."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in values:
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    ids = tokenizer("a").input_ids  # in tokenizer.json, but transformers 4 adds a BOS token to Llama's by default
    values["add_bos_token"] = ids[:1] == [tokenizer.bos_token_id]
    values["add_eos_token"] = ids[-1:] == [tokenizer.eos_token_id]
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unpruned(model: PreTrainedModel) -> PreTrainedModel:
    """A student that holds every layer of `model`, in the same memory."""
    student = prune(model, [], share_weights=True)
    drop_ignored(student)
    return student


def drop_ignored(model: PreTrainedModel) -> None:
    """Unset the generation settings that transformers ignores, such as a temperature of greedy decoding: it saves them
    as they were loaded, but no more once a `Trainer` has set the special tokens."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        for name in re.findall(r"^- `(\w+)`: ", str(error), re.MULTILINE):
            setattr(model.generation_config, name, None)


def check_saving(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise [`LayerPruneError`] unless a student can be saved: all but its weights is, to a temporary folder."""
    with TemporaryDirectory(prefix="hf-layerprune-") as folder:
        for name in ("config", "generation_config", "tokenizer"):
            try:
                if name == "tokenizer":
                    _save_tokenizer(tokenizer, Path(folder))
                else:
                    getattr(student, name).save_pretrained(folder)
            except Exception as error:  # what transformers, or a class of the user's, cannot write
                reason = " ".join(str(error).split())
                raise LayerPruneError(
                    f"the students' {name} cannot be saved, correct the model's: {reason}"
                ) from error


def put_in_place(target: Path, files: dict[str, str]) -> None:
    """Finish what a kill left of moving a written student, one of `files`, to `target`; if it is there, do nothing."""
    temporary = _beside(target)
    if temporary.is_dir() and digests(temporary) == files:
        replace_folder(temporary, target)
    shutil.rmtree(target.with_name(target.name + ".old"), ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.with_name(target.name + ".tmp")


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
    """Copy a saved student, and `files` beside it, so that no half of a copy is ever seen at `target`.

    A kill between the two moves of [`replace_folder`] leaves no `target`; the run that resumes publishes again.
    """
    temporary = _beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    for path in files:
        shutil.copy(path, temporary)
    replace_folder(temporary, target)
