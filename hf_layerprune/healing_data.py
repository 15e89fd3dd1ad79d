"""Let the teacher write data to heal on: prompts in, its own answers out.

The rows of each batch are appended to the file when they are done. After a kill, the last batch in the file is written
again, as it may not be whole, and then what is missing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock, Timeout
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import load_text_dataset, num_positions, pad_id, padded
from .environment import fingerprint, fingerprint_model
from .errors import LayerPruneError, first_line, located
from .files import write_atomically
from .forward import check_tokenizer, gathered, inference, shard, to_device
from .loading import load_model, load_tokenizer, name_of
from .rows import OF_TEMPLATE, as_messages, is_message, joined_parts
from .settings import HealingDataConfig

PROMPT_COLUMNS = ("messages", "prompt", "text", "conversations")

Content = str | list[dict[str, Any]]
"""A text to continue, or messages to answer."""


class Prompt(NamedTuple):
    row: int  # in the data set
    content: Content
    ids: list[int]
    of_template: dict[str, Any]  # what the chat template is given next to the messages


@dataclass(frozen=True)
class HealingDataReport:
    """What [`generate_healing_data`] wrote."""

    num_rows: int  # in the file
    num_empty: int  # prompts without a row, because the answer was blank
    num_truncated: int  # rows whose answer was cut at `max_new_tokens`
    num_tokens: int  # of the answers in the file
    num_too_long: int  # prompts that were left out, because they are longer than `max_prompt_tokens`


def generate_healing_data(
    model: str | Path | PreTrainedModel,
    prompts: str | Path | Dataset,
    output_file: str | Path,
    config: HealingDataConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> HealingDataReport:
    """Write a teacher's answers to prompts as rows of `prompt` and `completion`, for [`IterativeLayerDistillTrainer`]
    or [`~trl.SFTTrainer`].

    After a kill, the same call continues the file. Under `torchrun` or `accelerate launch` the processes share the
    batches; all must see the folder of the file. The random numbers of a batch come from the seed and the number of
    its first row: on the same device, with the same libraries and `batch_size`, the file is always identical.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]): the teacher; by name it is loaded in its own dtype.
        prompts (`str`, `Path` or [`~datasets.Dataset`]):
            Rows with messages, prompts or text; or a file, a Hub id or an embedded text, see [`load_text_dataset`].
        output_file (`str` or `Path`): file of JSON lines to write or to continue.
        config ([`HealingDataConfig`], *optional*): which prompts, how to sample, what to keep.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): by default the model's own.
        on_rows (`Callable[[int, int], None]`, *optional*): called with the prompts answered so far, and with all.

    Raises:
        [`LayerPruneError`]: if model, prompts and settings do not fit together, `output_file` holds rows of another
            run, or all answers are blank.
    """
    with locked(path := Path(output_file)):
        return answer_prompts(model, prompts, path, config or HealingDataConfig(), tokenizer, on_rows)


def answer_prompts(
    model: str | Path | PreTrainedModel,
    prompts: str | Path | Dataset,
    path: Path,
    config: HealingDataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    on_rows: Callable[[int, int], None],
) -> HealingDataReport:
    """Write or continue a file that is [`locked`]; see [`generate_healing_data`]."""
    state = processes()
    name = str(model) if isinstance(model, (str, Path)) else name_of(model)
    tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
    dataset = load_text_dataset(prompts) if isinstance(prompts, (str, Path)) else prompts
    if not isinstance(dataset, Dataset):
        raise LayerPruneError(f"prompts are of type {type(dataset).__name__}, which cannot be resumed; give a Dataset")
    if isinstance(model, (str, Path)):
        model = load_model(model, for_device=state.device).to(state.device)
    check_tokenizer(tokenizer, model, name)
    sampling = _sampling(model, tokenizer, config)
    asked, num_too_long = read_prompts(dataset, tokenizer, config, num_positions(model.config))
    rows = _answer_all(model, tokenizer, asked, sampling, config, path, on_rows)
    state.wait_for_everyone()
    if not rows:
        raise LayerPruneError("all answers are blank; sample at another temperature, or give other prompts")
    num_truncated, num_tokens = (sum(row[key] for row in rows) for key in ("truncated", "num_tokens"))
    return HealingDataReport(len(rows), len(asked) - len(rows), num_truncated, num_tokens, num_too_long)


def processes() -> PartialState:
    """This process among those that were launched together."""
    return PartialState(cpu=not torch.accelerator.is_available())


def column_of_prompts(dataset: Dataset, config: HealingDataConfig) -> str:
    """The column that `prompt_column` names, or the first of `PROMPT_COLUMNS` that the data set has."""
    columns = [config.prompt_column] if config.prompt_column else PROMPT_COLUMNS
    column = next((name for name in columns if name in dataset.column_names), None)
    if column is None:
        raise LayerPruneError(
            f"prompts have columns {dataset.column_names} but no {' or '.join(map(repr, columns))}; set prompt_column"
        )
    return column


def _sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: HealingDataConfig
) -> GenerationConfig:
    """The checkpoint's generation config with the given settings in it; every special token ends an answer."""
    sampling = copy.deepcopy(model.generation_config)
    ends = sampling.eos_token_id
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids, *([ends] if isinstance(ends, int) else ends or ())}
    sampling.eos_token_id, sampling.pad_token_id = sorted(special) or None, pad_id(tokenizer)
    sampling.max_length, sampling.max_new_tokens = None, config.max_new_tokens
    sampling.num_beams = sampling.num_return_sequences = 1
    if not sampling.do_sample:
        sampling.temperature, sampling.top_p, sampling.top_k = 1.0, 1.0, 0
    sampling.do_sample = (sampling.temperature if config.temperature is None else config.temperature) != 0
    for name in ("temperature", "top_p", "top_k"):
        given = getattr(config, name)
        if given is not None or not sampling.do_sample:
            setattr(sampling, name, given if sampling.do_sample else None)
    return sampling


def read_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: HealingDataConfig, positions: int
) -> tuple[list[Prompt], int]:
    """The prompts of a data set that leave room for an answer, and how many do not; blank cells are left out."""
    room = positions - config.max_new_tokens
    longest = room if config.max_prompt_tokens is None else config.max_prompt_tokens
    if not 1 <= longest <= room:
        raise LayerPruneError(
            f"an answer of up to {config.max_new_tokens} tokens leaves {max(room, 0)} of the model's {positions} "
            f"positions for a prompt of up to {max(longest, 1)}; lower "
            "max_new_tokens (on_policy_tokens) or max_prompt_tokens"
        )
    column, prompts = column_of_prompts(dataset, config), []
    rows = dataset if config.num_prompts is None else dataset.take(config.num_prompts)
    names = [name for name in OF_TEMPLATE if name in dataset.column_names]
    for row, (value, *given) in enumerate(zip(rows[column], *(rows[name] for name in names), strict=True)):
        if not value or isinstance(value, str) and not value.strip():
            continue
        if not isinstance(value, str):
            content = _open_chat(as_messages(value) if column == "conversations" else value, row)
        elif config.as_chat:
            content = [{"role": "user", "content": value}]
        else:
            content = value if column == "prompt" else _opening(value, tokenizer, config.prompt_tokens)
        is_chat = not isinstance(content, str)
        of_template = {name: part or OF_TEMPLATE[name] for name, part in zip(names, given, strict=True) if is_chat}
        prompts.append(Prompt(row, content, _encode(content, tokenizer, row, of_template), of_template))
    short = [prompt for prompt in prompts if len(prompt.ids) <= longest]
    if not short:
        if not prompts:
            raise LayerPruneError(f"the prompts hold no text in column {column!r}; give at least one row with text")
        way = "lower max_new_tokens (on_policy_tokens)" if longest == room else "raise max_prompt_tokens"
        raise LayerPruneError(f"every prompt in column {column!r} is longer than {longest} tokens; {way}")
    return short, len(prompts) - len(short)


def _open_chat(value: Any, row: int) -> list[dict[str, Any]]:
    """The messages up to the last that is not the assistant's."""
    if not isinstance(value, list) or not all(map(is_message, value)):
        raise LayerPruneError(f"prompts: row {row} is {value!r:.80}; it must be a text or a list of messages")
    with located(f"prompts: row {row}"):
        value = joined_parts(value)
    messages = [{key: part for key, part in message.items() if part is not None} for message in value]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise LayerPruneError(f"prompts: row {row} has no message to answer; give it one of a user")
    return messages


def _opening(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The words in the first `count` tokens; after a whole word, prompt and answer are tokenized as they are apart."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= count:
        return text
    opening = tokenizer.decode(ids[:count]).rstrip("\ufffd")
    is_whole = text.startswith(opening) and text[len(opening)].isspace()
    words = opening if is_whole else re.sub(r"\s+\S*$", "", opening)
    return words.rstrip() or opening


def _encode(content: Content, tokenizer: PreTrainedTokenizerBase, row: int, of_template: dict[str, Any]) -> list[int]:
    if isinstance(content, str):
        ids = tokenizer(content)["input_ids"]
        return ids[:-1] if ids[1:] and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers end each text
    tools, options = of_template.get("tools"), of_template.get("chat_template_kwargs", {})
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return tokenizer.apply_chat_template(
            content, tools=tools, add_generation_prompt=True, return_dict=False, **options
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise LayerPruneError(f"prompts: row {row} does not fit the chat template: {first_line(error)}") from error


def _answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: GenerationConfig,
    config: HealingDataConfig,
    path: Path,
    on_rows: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Write the rows that the file lacks, and return all; the processes take turns, a batch each."""
    settings = sampling.to_diff_dict() | {"transformers_version": None}
    run = fingerprint([fingerprint_model(model), model.dtype, prompts, config.seed, settings])
    (rows,) = broadcast_object_list([_written(path, run)])
    first_row = rows[-1]["first_row"] if rows else prompts[0].row
    rows, size = [row for row in rows if row["first_row"] < first_row], config.batch_size
    done = next(number for number, prompt in enumerate(prompts) if prompt.row == first_row)
    batches = [prompts[start : start + size] for start in range(done, len(prompts), size)]
    is_main, (rank, count) = processes().is_main_process, shard(model)
    if is_main:
        write_atomically(path, "".join(map(_line, rows)))
    on_rows(done, len(prompts))
    with inference(model):
        for start in range(0, len(batches), count):
            turn = batches[start : start + count]
            found = [_answer(model, tokenizer, batch, sampling, config.seed) for batch in turn[rank::count]]
            new = [row | {"run": run} for answers in gathered(found, (rank, count)) for row in answers]
            if is_main:
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(map(_line, new)))
                    file.flush()
                    os.fsync(file.fileno())
            rows += new
            done += sum(map(len, turn))
            on_rows(done, len(prompts))
    return rows


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other runs from writing to a file of JSON lines, as the rows of both would mix."""
    if path.is_dir():
        raise LayerPruneError(f"output_file={path} is a folder; name a file in it")
    if path.suffix != ".jsonl":
        raise LayerPruneError(f"output_file={path} must end in .jsonl")
    lock, is_free = FileLock(f"{path}.lock"), True
    if processes().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            is_free = False
    if broadcast_object_list([is_free]) != [True]:
        raise LayerPruneError(f"output_file={path} is in use: another run is writing it; wait, or choose another file")
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()


def _written(path: Path, run: str) -> list[dict[str, Any]]:
    """Read the whole lines of a file that this run began."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    with suppress(ValueError, TypeError, KeyError):
        rows = [json.loads(line) for line in text.split("\n")[:-1]]  # half a line may follow
        firsts = [row["first_row"] for row in rows]  # there are at most as many rows before them
        in_order = firsts == sorted(firsts) and all(bisect_left(firsts, first) <= first for first in {*firsts})
        if all(row["run"] == run for row in rows) and bool(rows) == bool(text) and in_order:
            return rows
    raise LayerPruneError(
        f"{path} holds rows of another run (model, prompts or settings), or of two that ran at once; delete it, or "
        "set another output_file"
    )


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: GenerationConfig,
    seed: int,
) -> list[dict[str, Any]]:
    """Answer one batch. Its random numbers depend on the seed and its first row; the process's own state stays."""
    batch = to_device(padded([prompt.ids for prompt in prompts], sampling.pad_token_id, "left"), model.device)
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type):
        digest = hashlib.sha256(f"{seed} {prompts[0].row}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        ids = model.generate(**batch, generation_config=sampling, tokenizer=tokenizer)
    rows = []
    for prompt, written in zip(prompts, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        end = next((n for n, token in enumerate(written) if token in (sampling.eos_token_id or ())), len(written))
        truncated, is_text = end == sampling.max_new_tokens, isinstance(prompt.content, str)
        before = prompt.ids if is_text else []  # SentencePiece drops the space that a text begins with
        text = tokenizer.decode(before + written[:end])[len(tokenizer.decode(before)) :]
        text = text.rstrip("\ufffd") if truncated else text
        if text.strip():
            completion = text if is_text else [{"role": "assistant", "content": text}]
            row = {"prompt": prompt.content, **prompt.of_template, "completion": completion}
            rows.append(row | {"truncated": truncated, "num_tokens": end, "first_row": prompts[0].row})
    return rows
