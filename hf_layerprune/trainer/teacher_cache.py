"""The teacher's final hidden states on disk: it never changes, so a row that comes again needs no second pass.

They are kept whole. The most likely tokens of each position would be smaller, but the loss compares the final states
themselves, and takes its divergence over the whole vocabulary.

Rows, or the documents packed into them, are known by their tokens. Shards are safetensors files, each listed with its
checksum in an index that is written after it, so a run that was cut off loses the last shard at most.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from ..data import Batch
from ..errors import LayerPruneError
from ..files import digest, to_json, write_atomically
from ..fingerprint import fingerprint, fingerprint_model

SHARD_BYTES = 256 * 2**20
INDEX = "index-{:05d}.json"
UNRELATED = ("_name_or_path", "transformers_version", "use_cache")  # what of a config no state depends on

Index = tuple[Tensor | slice, ...]
"""Of `(B, T, ...)` tensors: some rows, or some columns of the only one."""


class TeacherCache:
    """Final hidden states of rows of text, in a folder.

    Args:
        folder (`Path`): where the shards lie; made when the first is written.
        key (`str`): of the teacher and how it computes, see [`teacher_key`]; a folder of another key is refused.
        max_bytes (`int`): on disk, of all processes; rows beyond it are not kept.
        rank (`int`, *optional*, defaults to `0`): of this process, which writes shards of its own.
        processes (`int`, *optional*, defaults to `1`): that share the folder.

    Raises:
        [`LayerPruneError`]: if the folder holds states of another teacher, or a shard is damaged.
    """

    def __init__(self, folder: Path, key: str, max_bytes: int, rank: int = 0, processes: int = 1) -> None:
        self.folder, self.key, self.max_bytes = folder, key, max_bytes // processes
        self.rank = rank
        self.own: dict[str, Any] = {"key": key, "shards": {}}
        self.places: dict[str, Path] = {}  # row to shard
        self.pending: dict[str, Tensor] = {}
        self.num_bytes = 0
        self.read()

    def read(self) -> None:
        """Learn of the shards of all processes; at the start of every round."""
        for path in sorted(self.folder.glob("index-*.json")):
            index = _read_index(path)
            if index["key"] != self.key:
                raise LayerPruneError(f"{self.folder} holds hidden states of another teacher or precision; delete it")
            own = path.name == INDEX.format(self.rank)
            for name, shard in index["shards"].items():
                file = self.folder / name
                if file not in self.places.values():
                    _check(file, shard["sha256"])
                self.places |= dict.fromkeys(shard["rows"], file)
                self.num_bytes += shard["bytes"] if own and name not in self.own["shards"] else 0
            if own:
                self.own = index

    def get(self, batch: Batch) -> tuple[Tensor, Index | None] | None:
        """States `(B, T, H)` behind the final norm, zeros where they are not known, and the index of the part of the
        batch that is to be computed, if any; `None` if nothing is known."""
        ids, places = batch["input_ids"], _places(batch)
        found = [self._load(row) for row in row_keys(batch)]
        first = next((state for state in found if state is not None), None)
        if first is None:
            return None
        states = first.new_zeros(*ids.shape, first.shape[-1])
        missing = []
        for state, place in zip(found, places, strict=True):
            if state is None:
                missing.append(place)
            else:
                states[place] = state
        return states.to(ids.device), _index(missing, batch)

    def add(self, batch: Batch, states: Tensor) -> None:
        """Keep the states `(B, T, H)` of rows that are new, while there is room."""
        for row, (number, columns) in zip(row_keys(batch), _places(batch), strict=True):
            size = len(columns) * states.shape[-1] * states.element_size()
            if self._has(row) or self.num_bytes + size > self.max_bytes:
                continue
            self.pending[row] = states[number, columns.to(states.device)].cpu()
            self.num_bytes += size
        if sum(state.numel() * state.element_size() for state in self.pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet; at the end of every round."""
        if not self.pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"states-{self.rank:05d}-{len(self.own['shards']):05d}.safetensors"
        content = save(self.pending)
        write_atomically(file, content)
        self.own["shards"][file.name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": sum(state.numel() * state.element_size() for state in self.pending.values()),
            "rows": list(self.pending),
        }
        write_atomically(self.folder / INDEX.format(self.rank), to_json(self.own))
        self.places |= dict.fromkeys(self.pending, file)
        self.pending = {}

    def _has(self, row: str) -> bool:
        return row in self.places or row in self.pending

    def _load(self, row: str) -> Tensor | None:
        if row in self.pending or not self._has(row):
            return self.pending.get(row)
        with safe_open(self.places[row], framework="pt") as shard:
            return shard.get_tensor(row)


def teacher_key(teacher: PreTrainedModel, mixed_precision: str) -> str:
    """Of what the states of a row depend on: a sample of the teacher's weights, its config, and how it computes.

    Rows are known by their token ids, so the tokenizer is no part of it.
    """
    config = {name: value for name, value in teacher.config.to_dict().items() if name not in UNRELATED}
    how = (teacher.dtype, teacher.config._attn_implementation, mixed_precision)
    return fingerprint([fingerprint_model(teacher), sorted(config.items()), how])


def open_cache(
    folder: Path, gibibytes: float, teacher: PreTrainedModel, accelerator: Accelerator
) -> TeacherCache | None:
    """The cache in a run's output folder, of the given size; none where that is 0."""
    if not gibibytes:
        return None
    key = teacher_key(teacher, accelerator.mixed_precision)
    shares = (accelerator.process_index, accelerator.num_processes)
    return TeacherCache(folder / "teacher_cache", key, int(gibibytes * 2**30), *shares)


def row_keys(batch: Batch) -> list[str]:
    """What the states of a row, or of each document in it, depend on: tokens, without padding, and positions."""
    ids, positions = batch["input_ids"].cpu(), batch.get("position_ids")
    parts = [ids] if positions is None else [ids, positions.cpu()]
    return [
        hashlib.sha256(b"".join(part[place].numpy().tobytes() for part in parts)).hexdigest()[:32]
        for place in _places(batch)
    ]


def _places(batch: Batch) -> list[tuple[int, Tensor]]:
    """`(row, columns)` where the tokens of each row are; where it holds documents end to end, of each of these."""
    mask, positions, (rows, width) = batch.get("attention_mask"), batch.get("position_ids"), batch["input_ids"].shape
    if mask is not None:
        return [(row, mask[row].cpu().nonzero().flatten()) for row in range(rows)]
    found = []
    for row in range(rows):
        starts = [] if positions is None else positions[row].cpu().eq(0).nonzero().flatten().tolist()
        ends = [0, *(start for start in starts if start), width]
        found += [(row, torch.arange(*ends[n : n + 2])) for n in range(len(ends) - 1)]
    return found


def _index(places: list[tuple[int, Tensor]], batch: Batch) -> Index | None:
    """Of the part of a batch that holds `places`: whole rows, or documents of the only one."""
    if not places:
        return None
    device, rows = batch["input_ids"].device, sorted({row for row, _ in places})
    if "attention_mask" in batch or len(batch["input_ids"]) > 1:
        return (torch.tensor(rows, device=device),)
    return slice(None), torch.cat([columns for _, columns in places]).to(device)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
        return {"key": str(index["key"]), "shards": dict(index["shards"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayerPruneError(f"{path} is damaged ({error}); delete {path.parent}") from error


def _check(file: Path, sha256: str) -> None:
    try:
        found = digest(file)
    except OSError as error:
        raise LayerPruneError(f"{file} cannot be read ({error}); delete {file.parent}") from error
    if found != sha256:
        raise LayerPruneError(f"{file} is damaged: its checksum is another; delete {file.parent}")
