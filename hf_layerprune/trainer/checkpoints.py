"""Checkpoints within a healing: sealed when they are whole, and taken up only as they were sealed."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import LayerPruneError
from ..files import digest, digests, to_json, write_atomically

logger = logging.getLogger(__name__)

SEAL = "sealed.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a healing goes on.

    Attributes:
        folder (`str`): the `checkpoint-N`.
        seconds (`float`): that the healing had taken.
    """

    folder: str
    seconds: float


def seal(checkpoint: Checkpoint) -> None:
    """Say that a checkpoint is whole, and what its files are; once every process has written its part."""
    folder = Path(checkpoint.folder)
    (folder / SEAL).unlink(missing_ok=True)  # of one that was damaged and is written again
    facts = {"files": digests(folder), "seconds": checkpoint.seconds}
    write_atomically(folder / SEAL, to_json(facts))


def sealed_checkpoints(folder: Path) -> list[Path]:
    """The sealed `checkpoint-N` in the folder of a round, the newest first."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{SEAL}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in the folder of a round whose files are those it was sealed with."""
    for path in sealed_checkpoints(folder):
        try:
            facts = json.loads((path / SEAL).read_text())
            files = facts.pop("files")
            if all(digest(path / name) == expected for name, expected in files.items()):
                return Checkpoint(str(path), **facts)
        except (OSError, ValueError, TypeError, KeyError):
            pass
        logger.warning("%s is damaged: its files are not those that were saved; it is passed over", path)
    return None


def drop_ruined_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a round with a weight that is no finite number; what cannot be read stays."""
    for path in folder.glob("checkpoint-*"):
        if any(_is_ruined(file) for file in path.glob("*.safetensors")):
            shutil.rmtree(path)


def _is_ruined(weights: Path) -> bool:
    try:
        with safe_open(weights, framework="pt") as file:
            return not all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def what_is_left(folder: Path) -> str:
    """After a healing that diverged: delete its ruined checkpoints and say, for its message, which one is left."""
    drop_ruined_checkpoints(folder)
    if (left := last_checkpoint(folder)) is None:
        return ""
    return f". {left.folder} is left to go on from; delete {folder} to heal this round from the start"


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint that are trained; the others may be the teacher's memory, and stay.

    Raises:
        [`LayerPruneError`]: if one is missing.
    """
    missing = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in missing.keys() & set(file.keys()):
                missing.pop(name).copy_(file.get_tensor(name))
    if missing:
        raise LayerPruneError(f"{folder} lacks {min(missing)}; delete it to heal this round again")
