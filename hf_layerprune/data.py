"""Batches of token ids, which are validated here and nowhere else, and the text they are made of.

A batch is a dict of tensors: `input_ids` `(B, T)`, optionally `attention_mask` `(B, T)` (0 is padding), `labels`
`(B, T)` (-100 is not scored) and `position_ids` `(B, T)` (without a mask, 0 begins another document; such a batch has
one row). Position `t` predicts token `t + 1`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Iterable, Mapping, Sequence
from glob import escape, glob
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from datasets.utils import logging as datasets_logging
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ._trl import tokenized
from .errors import LayerPruneError, arguments_in_one_line, first_line
from .rows import column_names, select_text_column, warn_of_dropped_rows

ASSETS = Path(str(files("hf_layerprune"))) / "assets"
EMBEDDED_MODEL = str(ASSETS / "teacher")
"""Folder of the small real teacher that comes with the package: 16 layers, 7.1M parameters, English books."""
FILE_BUILDERS = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"
}  # fmt: skip

Batch = Mapping[str, Tensor]
BATCH_KEYS = ("input_ids", "attention_mask", "labels", "position_ids")


class Batches(list[Batch]):
    """What [`check_batches`] has validated for a vocabulary."""

    def __init__(self, batches: Iterable[Batch] = (), vocab_size: int = 0) -> None:
        super().__init__(batches)
        self.vocab_size = vocab_size


def check_batches(
    batches: Iterable[Batch] | None, vocab_size: int, what: str = "batches", required: bool = True
) -> Batches:
    """Validate batches of the data called `what`, once: a later call returns them as they are.

    Unless `required`, there may be none.
    """
    if isinstance(batches, Batches) and batches.vocab_size <= vocab_size and (batches or not required):
        return batches
    batches = () if batches is None else batches
    if not isinstance(batches, Iterable):
        raise LayerPruneError(f"{what}: {batches!r:.80} is not a list of batches; give dicts with input_ids")
    checked = [_checked(batch, vocab_size, f"{what}: batch {number}") for number, batch in enumerate(batches)]
    checked = [batch for batch in checked if batch["input_ids"].numel()]
    if required and not any(len(valid_next_tokens(batch)[1]) for batch in checked):
        raise LayerPruneError(f"{what}: no token to score; give longer text, or a max_length that leaves two tokens")
    return Batches(checked, vocab_size)


def _checked(batch: Any, vocab_size: int, where: str) -> Batch:
    """The parts of one batch that are read."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        holding = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise LayerPruneError(
            f"{where} is a {type(batch).__name__}{holding}; give dicts with a tensor input_ids (rows, tokens), "
            "as hf_layerprune.tokenized_batches makes them of a data set"
        )
    batch = {key: batch[key] for key in BATCH_KEYS if batch.get(key) is not None}
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            raise LayerPruneError(f"{where}: {key} must be a tensor of the shape of input_ids, {(*ids.shape,)}")
    labels = batch.get("labels", ids)
    if labels.dtype not in (torch.int64, torch.int32):
        raise LayerPruneError(f"{where}: labels are {labels.dtype}; give token ids, and -100 where none is scored")
    tokens = torch.cat([ids.flatten(), labels[labels != -100]])
    if len(wrong := tokens[(tokens < 0) | (tokens >= vocab_size)]):
        raise LayerPruneError(
            f"{where} holds token id {wrong[0]}, but the model's vocabulary has {vocab_size} entries; was the text "
            "tokenized with another tokenizer?"
        )
    return batch


def valid_next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """A boolean mask `(B, T)` of the positions that count and the labels `(N,)` that follow them: neither token is
    padding, both are of one document, and the next one is scored."""
    ids, positions = batch["input_ids"], batch.get("position_ids")
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    target = ids[:, 1:] if labels is None else labels[:, 1:]
    counts = target != -100
    if mask is not None:
        counts = counts & mask[:, :-1].bool() & mask[:, 1:].bool()
    elif positions is not None:  # what begins another document follows nothing
        counts = counts & (positions[:, 1:] != 0)
    valid = torch.nn.functional.pad(counts, (0, 1))
    return valid, target[counts]


def split_rows(batch: Batch, rows: int) -> list[Batch]:
    """A batch in pieces of at most `rows` rows."""
    if len(batch["input_ids"]) <= rows:
        return [batch]
    parts = {key: value.split(rows) for key, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def embedded_dataset(name: str) -> Dataset:
    """The embedded text `"calibration"`, `"healing"` or `"held_out"`, with a column `text`; or `"minimal_pairs"`, with
    BLiMP's columns `sentence_good`, `sentence_bad`, `linguistics_term` and `UID`."""
    kinds = {"calibration": "txt", "healing": "txt", "held_out": "txt", "minimal_pairs": "jsonl"}
    if name not in kinds:
        raise LayerPruneError(f"no embedded text {name!r}; choose one of {', '.join(kinds)}")
    text = lzma.decompress((ASSETS / "text" / f"{name}.{kinds[name]}.xz").read_bytes()).decode()
    if kinds[name] == "jsonl":
        return Dataset.from_list([json.loads(line) for line in text.splitlines()])
    return Dataset.from_dict({"text": text.split("\n\n")})


def is_one_split(source: str) -> bool:
    """Whether the data set a user names is a file, an embedded text or a saved `Dataset`: it has no configurations,
    and one split, `"train"`."""
    path = Path(source)
    return source.startswith("embedded:") or path.is_file() or (path / "state.json").is_file()


def may_have(source: str, split: str) -> bool:
    """Whether the data set a user names may have this split, or the one that slices of it are taken of."""
    return not is_one_split(source) or split.partition("[")[0] == "train"


def load_text_dataset(source: str | Path, split: str = "train", config_name: str | None = None) -> Dataset:
    """A [`~datasets.Dataset`] from what a user names: an embedded text, a local file or folder, or a Hub id.

    Args:
        source (`str` or `Path`):
            `"embedded:calibration"` and the like, see [`embedded_dataset`]; the path of a `.txt` (one text a line),
            `.json`, `.jsonl`, `.csv`, `.parquet` or `.arrow` file, gzipped or not; a folder that `save_to_disk` wrote
            or `datasets.load_dataset` understands; or the id of a data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split or slices of it, as `datasets` writes them; where the source may not have it, see [`may_have`],
            those of its one split are read.
        config_name (`str`, *optional*): configuration of a data set that has some.
    """
    source, verbosity = str(source), datasets_logging.get_verbosity()
    if not may_have(source, split):
        split = re.sub(r"[^+\[]+(\[[^+]*)?", r"train\1", split)
    try:
        datasets_logging.set_verbosity(datasets_logging.CRITICAL)  # what it raises is said below, once
        dataset = _open_dataset(source, split, config_name)
    except (DatasetsError, OSError, ValueError, RuntimeError, ImportError, StopIteration, EOFError) as error:
        cause = error.__cause__ or error  # datasets itself only says that an error occurred
        reason = _fault(Path(source)) or first_line(cause)
        raise LayerPruneError(f"dataset {source} cannot be loaded: {reason}") from error
    finally:
        datasets_logging.set_verbosity(verbosity)
    if len(dataset) == 0:
        raise LayerPruneError(f"dataset {source} is empty")
    return dataset


def _fault(path: Path) -> str | None:
    """What is wrong with a file that cannot be read, where its content says so."""
    if not path.is_file():
        return None
    if not path.stat().st_size:
        return "the file is empty"
    if path.suffix.lower() not in (".json", ".jsonl"):
        return None
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    parts = [text] if text.lstrip().startswith("[") else text.split("\n")
    for number, part in enumerate(parts):
        try:
            json.loads(part or "null")
        except json.JSONDecodeError as error:
            return f"line {number + error.lineno} is not valid JSON: {error.msg}"
    return None


def _open_dataset(source: str, split: str, config_name: str | None) -> Dataset:
    path = Path(source)
    suffix = Path(source.lower().removesuffix(".gz")).suffix
    if suffix in FILE_BUILDERS and not path.is_dir():
        if suffix in (".json", ".jsonl") and path.is_file():  # `datasets` may find out when a row is read
            with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        line.decode()
                    except UnicodeDecodeError as error:
                        raise LayerPruneError(f"line {number} is not UTF-8: {error.reason}") from None
        pattern = escape(source) if path.is_file() else source  # the name of a file may have [brackets]
        options = {"encoding": "utf-8-sig"} if suffix == ".txt" else {}  # the other readers strip the byte-order mark
        dataset = load_dataset(FILE_BUILDERS[suffix], data_files=pattern, split=split, **options)
        _check_fields(dataset, pattern)
        return dataset.filter(lambda row: bool(row["text"].strip())) if suffix == ".txt" else dataset
    if path.is_file():
        raise LayerPruneError(f"its type {path.suffix!r} is not one of {', '.join(FILE_BUILDERS)}")
    if source.startswith("embedded:"):
        splits = {"train": embedded_dataset(source.removeprefix("embedded:"))}
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(source)
        splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    else:
        dataset = load_dataset(source, config_name, split=split)
        _check_fields(dataset, f"{escape(source)}/**/*.[ct]sv*")
        return dataset
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _check_fields(dataset: Dataset, pattern: str) -> None:
    """Raise [`LayerPruneError`] if the rows of CSV files have more fields than the header, as commas in a text without
    quotes make them: pandas takes the first field for an index, and the last piece for the text."""
    if dataset.info.builder_name != "csv" or (index := "__index_level_0__") not in dataset.column_names:
        return
    for path in (paths := glob(pattern, recursive=True)):
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            if index in file.readline():
                return
    if paths:  # else they are elsewhere, and their headers not to be seen
        raise LayerPruneError(
            "its rows have more fields than its header; put text with commas in quotes, and name every column in the "
            "header"
        )


def num_positions(config: PretrainedConfig) -> int:
    """Tokens of the longest row a model was made for."""
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    factor = 1 if rope.get("rope_type") == "llama3" else rope.get("factor") or 1  # Llama's is of wavelengths alone
    return max(config.max_position_embeddings, int(original * factor))


def check_length(max_length: int | None, config: PretrainedConfig, name: str) -> None:
    """Raise [`LayerPruneError`] if rows of `max_length` tokens are longer than the model called `name` can read."""
    positions = num_positions(config)
    if max_length is not None and max_length > positions:
        raise LayerPruneError(f"max_length={max_length} but {name} has {positions} positions; choose 2..{positions}")


def tokenized_batches(
    dataset: Dataset | IterableDataset | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    max_length: int = 512,
    num_rows: int = 64,
    batch_size: int = 8,
) -> list[dict[str, Tensor]]:
    """Batches of the columns and the tokens that [`IterativeLayerDistillTrainer`] reads.

    Texts are packed end to end into full rows of `max_length` tokens. Prompts with completions (whose `labels` leave
    the prompts out), messages and rows of token ids are a row each, cut at `max_length` and padded with a mask.

    Args:
        dataset (`Dataset`, `IterableDataset` or `Iterable[dict]`): rows; a data set is read only as far as needed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): an end token goes after each text.
        text_field (`str`, *optional*, defaults to `"text"`): column of the text.
        max_length (`int`, *optional*, defaults to `512`): T, tokens per row.
        num_rows (`int`, *optional*, defaults to `64`): rows in all.
        batch_size (`int`, *optional*, defaults to `8`): B, rows per batch.

    Raises:
        [`LayerPruneError`]: if there is no such column, a row that cannot be read, or not enough text for one row.
    """
    if min(num_rows, batch_size) < 1 or max_length < 2:
        raise LayerPruneError(
            f"rows={num_rows} of {max_length} tokens, {batch_size} at a time: all must be positive, and a row has at "
            "least 2 tokens"
        )
    with arguments_in_one_line():
        stream = select_text_column(_as_stream(dataset), text_field, "the data")
        columns = column_names(stream)
        rows = tokenized(stream, columns, tokenizer, text_field)
        return (_packed if columns == [text_field] else _padded)(rows, max_length, num_rows, batch_size)


def _as_stream(dataset: Iterable[Mapping[str, Any]]) -> IterableDataset:
    """Rows as a stream, so that only those that are read are worked on."""
    if isinstance(dataset, IterableDataset):
        return dataset
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        rows = list(dataset)
        if isinstance(dataset, Mapping) or not all(isinstance(row, Mapping) for row in rows):
            raise LayerPruneError(
                f"the data is a {type(dataset).__name__}; give one datasets.Dataset, or rows such as {{'text': ...}}"
            )
        dataset = Dataset.from_list([dict(row) for row in rows])
    return dataset.with_format(None).to_iterable_dataset()


def _packed(
    rows: Iterable[dict[str, list[int]]], max_length: int, num_rows: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Rows end to end in full ones."""
    ids: list[int] = []
    for row in rows:
        ids += row["input_ids"]
        if len(ids) >= num_rows * max_length:
            break
    count = min(num_rows, len(ids) // max_length)
    if count == 0:
        raise LayerPruneError(f"the data has {len(ids)} tokens, less than one row of {max_length}; give more text")
    full = torch.tensor(ids[: count * max_length]).view(count, max_length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in full.split(batch_size)]


def _padded(
    rows: Iterable[dict[str, list[int]]], max_length: int, num_rows: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Each row on its own, cut; those with nothing left to score are left out."""
    examples: list[dict[str, list[int]]] = []
    dropped = 0
    for row in rows:
        example = {key: row[key][:max_length] for key in ("input_ids", "labels")}
        if not set(example["labels"]) - {-100}:
            dropped += 1
            continue
        examples.append(example)
        if len(examples) == num_rows:
            break
    warn_of_dropped_rows("the data", dropped, dropped + len(examples), max_length)
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    return [collator(examples[n : n + batch_size]) for n in range(0, len(examples), batch_size)]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows with; it is masked, so any will do."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def padded(rows: Sequence[Sequence[int]], padding: int, side: Literal["left", "right"]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each `(B, T)`."""
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding, padding_side=side),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side=side),
    }
