"""Let a model answer prompts, batch by batch, so that any process can do any batch with the same result."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import load_text_dataset
from ..errors import LayerPruneError, first_line
from ..fingerprint import fingerprint, fingerprint_model
from ..forward import check_tokenizer, measuring, to_device
from ..loading import load_model, load_tokenizer, name_of
from ..scoring.measure import shard
from ..tasks.chunks import pad_id, padded
from .config import HealingDataConfig
from .journal import Answer, HealingDataReport, Journal
from .prompts import Prompt, read_prompts, special_tokens, without_special_tokens

SAMPLING = ("temperature", "top_p", "top_k")
OF_THE_RUN = ("batch_size", *SAMPLING)
"""Settings that are not compared as they are given: the first may change, the others are part of the sampling."""
UNRELATED = ("transformers_version", "_from_model_config")


def generate_healing_data(
    model: str | PreTrainedModel,
    prompts: str | Dataset,
    output_file: str | Path,
    config: HealingDataConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_rows: Callable[[int, int], None] | None = None,
) -> HealingDataReport:
    """Write down what a teacher answers to prompts, as rows that [`IterativeLayerDistillTrainer`] and
    [`~trl.SFTTrainer`] train on as they are.

    A kill loses the batch in progress at most; the same call goes on behind the last whole batch. Random numbers
    belong to a batch: they come from the seed and the number of its first row. So the file is the same, byte for byte,
    however often the run was interrupted and however many processes share it, on the same device, with the same
    libraries and `batch_size`. Another batch size gives other samples; greedy answers are the same but for rounding.

    Under `torchrun` or `accelerate launch` every process answers its share, and the main one writes the file; all need
    to see its folder.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The teacher. One that is named is loaded in its own dtype, on this process's device.
        prompts (`str` or [`~datasets.Dataset`]):
            Rows with messages, prompts or text; or a file, a Hub id or an embedded text, see [`load_text_dataset`].
        output_file (`str` or `Path`): file of JSON lines to write.
        config ([`HealingDataConfig`], *optional*): which prompts, how to sample, what to keep.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): by default the model's own.
        on_rows (`Callable`, *optional*): told at the start and after each batch how many rows are done, of how many.

    Returns:
        [`HealingDataReport`]: counts; the same again for a file that is finished already.

    Raises:
        [`LayerPruneError`]: if model, prompts and settings do not fit together, `output_file` holds something else, or
            no answer is left to write.
    """
    config, state = config or HealingDataConfig(), processes()
    name = model if isinstance(model, str) else name_of(model)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(name)
    dataset = load_text_dataset(prompts) if isinstance(prompts, str) else prompts
    if not isinstance(dataset, Dataset):
        raise LayerPruneError(f"prompts are {type(dataset).__name__}, which cannot be resumed; give a Dataset")
    if isinstance(model, str):
        model = load_model(model, for_device=state.device).to(state.device)
    check_tokenizer(tokenizer, model, name)
    sampling = _sampling(model, tokenizer, config)
    questions = read_prompts(dataset, tokenizer, config, _longest_prompt(model, config))
    journal = Journal(Path(output_file), _settings(model, tokenizer, questions, sampling, config))
    report = journal.finished()
    if report is None:
        try:
            _answer_all(model, tokenizer, questions, sampling, config, journal, on_rows)
            if state.is_main_process:
                _finish(journal, questions, config)
        finally:
            journal.release()
        _wait()
        report = journal.finished()
    if state.is_main_process:
        journal.clear()
    return report


def processes() -> PartialState:
    """This process among those that were launched together, which it joins if it has not."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: HealingDataConfig
) -> GenerationConfig:
    """The checkpoint's own way to generate, with what was asked for in its place."""
    sampling = copy.deepcopy(model.generation_config)
    ends = sampling.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    sampling.eos_token_id = sorted(ends | set(special_tokens(tokenizer))) or None
    sampling.pad_token_id = pad_id(tokenizer)
    sampling.max_length, sampling.max_new_tokens = None, config.max_new_tokens
    sampling.num_beams = sampling.num_return_sequences = 1
    if not sampling.do_sample:
        sampling.temperature, sampling.top_p, sampling.top_k = 1.0, 1.0, 0
    sampling.do_sample = config.temperature != 0
    for setting in SAMPLING:
        if not sampling.do_sample:
            setattr(sampling, setting, None)
        elif getattr(config, setting) is not None:
            setattr(sampling, setting, getattr(config, setting))
    try:
        sampling.validate()
    except ValueError as error:
        raise LayerPruneError(f"the model's generation config cannot be used: {first_line(error)}") from error
    return sampling


def _longest_prompt(model: PreTrainedModel, config: HealingDataConfig) -> int:
    """Tokens of a prompt at most."""
    positions = model.config.max_position_embeddings
    left = positions - config.max_new_tokens
    if left < (config.max_prompt_tokens or 1):
        raise LayerPruneError(
            f"max_new_tokens={config.max_new_tokens} leave {max(left, 0)} of the model's {positions} positions for a "
            f"prompt of up to {config.max_prompt_tokens or 1}; lower one of them"
        )
    return config.max_prompt_tokens or left


def _settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: GenerationConfig,
    config: HealingDataConfig,
) -> dict[str, Any]:
    """What decides the answers."""
    settings = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in OF_THE_RUN}
    settings |= {key: value for key, value in sampling.to_diff_dict().items() if key not in UNRELATED}
    return settings | {
        "model": fingerprint_model(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]),
        "prompts": fingerprint([prompt.row, prompt.content, prompt.ids] for prompt in prompts),
    }


def _answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: GenerationConfig,
    config: HealingDataConfig,
    journal: Journal,
    on_rows: Callable[[int, int], None] | None,
) -> None:
    """Answer what has no answer yet; the processes take turns, a batch each."""
    (first, step), rank = shard(model), processes().process_index
    _wait()  # until every process has looked at what is there
    _open(journal, rank)
    known = journal.answers()
    _wait()  # until every process has read the same answers
    batches = [prompts[start : start + config.batch_size] for start in range(0, len(prompts), config.batch_size)]
    batches = [[prompt for prompt in batch if prompt.row not in known] for batch in batches]
    batches = [batch for batch in batches if batch]
    done = len(prompts) - sum(map(len, batches))
    on_rows = on_rows or (lambda done, total: None)
    on_rows(done, len(prompts))
    with measuring(model):
        for start in range(0, len(batches), step):
            turn = batches[start : start + step]
            if first < len(turn):
                answers = _answers(model, tokenizer, turn[first], sampling, config.seed)
                if first == rank:  # else the model is split over the processes, and all have the same answers
                    journal.append(answers, rank)
            _wait()  # in step, so that none waits for hours at the end
            done += sum(map(len, turn))
            on_rows(done, len(prompts))


def _open(journal: Journal, rank: int) -> None:
    """On one process; all learn whether it could."""
    refused = None
    if rank == 0:
        try:
            journal.open()
        except LayerPruneError as error:
            refused = str(error)
    if refused := broadcast_object_list([refused])[0]:
        raise LayerPruneError(refused)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: GenerationConfig,
    seed: int,
) -> list[Answer]:
    batch = to_device(padded([prompt.ids for prompt in prompts], sampling.pad_token_id, "left"), model.device)
    with _random_numbers(model.device):
        digest = hashlib.sha256(f"{seed} {prompts[0].row}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        ids = model.generate(**batch, generation_config=sampling, tokenizer=tokenizer)
    ends = set(sampling.eos_token_id or ())
    answers = []
    for prompt, written in zip(prompts, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        end = next((place for place, token in enumerate(written) if token in ends), len(written))
        truncated = end == sampling.max_new_tokens
        text = tokenizer.decode(written[:end], skip_special_tokens=True)
        text = without_special_tokens(text.rstrip("\ufffd") if truncated else text, tokenizer)
        answers.append(Answer(prompt.row, text, end, truncated))
    return answers


def _random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """The state of the random numbers comes back afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _finish(journal: Journal, prompts: Sequence[Prompt], config: HealingDataConfig) -> None:
    answers = journal.answers()
    if missing := [prompt.row for prompt in prompts if prompt.row not in answers]:
        raise LayerPruneError(
            f"{len(missing)} answers are not in {journal.output_file.parent}; all processes must see that folder"
        )
    told = [(prompt, answers[prompt.row]) for prompt in prompts if answers[prompt.row].text.strip()]
    kept = [(prompt, answer) for prompt, answer in told if config.keep_truncated or not answer.truncated]
    num_truncated = sum(answer.truncated for _, answer in told)
    if not kept:
        raise LayerPruneError(
            f"no answer is left: {len(prompts) - len(told)} are empty and {num_truncated} cut at "
            f"max_new_tokens={config.max_new_tokens}; raise it, or set keep_truncated"
        )
    tokens = sum(answer.num_tokens for _, answer in kept)
    report = HealingDataReport(len(kept), len(prompts) - len(told), num_truncated, tokens)
    journal.close((_row(prompt, answer, config.completion_only) for prompt, answer in kept), report)


def _row(prompt: Prompt, answer: Answer, completion_only: bool) -> dict[str, Any]:
    """A row as TRL takes it: messages where the prompt is messages, else text."""
    if isinstance(prompt.content, str):
        parts = {"prompt": prompt.content, "completion": answer.text}
        whole = {"text": prompt.content + answer.text}
    else:
        completion = [{"role": "assistant", "content": answer.text}]
        parts = {"prompt": prompt.content, "completion": completion}
        whole = {"messages": prompt.content + completion}
    return (parts if completion_only else whole) | {"truncated": answer.truncated}


def _wait() -> None:
    """For the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
