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
from ..files import replace_folder
from ..surgery import prune


def save_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, target: Path
) -> None:
    """Write a student in `dtype`, so that nothing half written is ever seen at `target`."""
    temporary = _cleared(target)
    prune(student, [], share_weights=True).to(dtype).save_pretrained(temporary)
    _save_tokenizer(tokenizer, temporary)
    replace_folder(temporary, target)


def publish_student(source: Path, target: Path, files: list[Path]) -> None:
    """Copy a saved student, and `files` next to it, so that no half of a copy is ever seen at `target`."""
    temporary = _cleared(target)
    shutil.copytree(source, temporary)
    for path in files:
        shutil.copy(path, temporary)
    replace_folder(temporary, target)


def _cleared(target: Path) -> Path:
    """A name next to `target`, without what a kill has left there."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
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
    """A student that holds every layer of `model`, in the same memory, and can be saved.

    The generation settings that transformers ignores, such as a temperature of greedy decoding, are unset: it saves
    them as they were loaded, but no more once a `Trainer` has set the special tokens.
    """
    student = prune(model, [], share_weights=True)
    try:
        student.generation_config.validate(strict=True)
    except ValueError as error:
        for name in re.findall(r"^- `(\w+)`: ", str(error), re.MULTILINE):
            setattr(student.generation_config, name, None)
    return student


def check_saving(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise [`LayerPruneError`] unless a student can be saved: all but its weights is, to a temporary folder."""
    with TemporaryDirectory(prefix="hf-layerprune-") as folder:
        try:
            student.config.save_pretrained(folder)
            student.generation_config.save_pretrained(folder)
            _save_tokenizer(tokenizer, Path(folder))
        except Exception as error:  # what transformers, or a class of the user's, cannot write
            reason = " ".join(str(error).split())
            raise LayerPruneError(
                f"students cannot be saved, correct the model's config, generation_config or tokenizer: {reason}"
            ) from error
