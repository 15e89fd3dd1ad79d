"""What models answer, streamed, timed, and stopped after the current token; and what they expect next in a text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..benchmark import kv_bytes_per_token
from ..errors import LayerPruneError
from ..forward import CACHE
from ..surgery import plan_of
from .settings import Limits

SECONDS_BETWEEN_ANSWERS = 0.12
DEVICE = threading.Lock()  # held by what computes: a stopped comparison finishes its token before the next begins
CHAT_TEMPERATURE = 0.7
WARM_UP_TOKENS = 128  # most tokens of the prompt that are read once before the clock starts
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "top_k": (0, 1000),
    "repetition_penalty": (1.0, 2.0),
    "seed": (0, 2**31 - 1),
}
TOP = 5  # tokens to show of what each model expects
Expected = tuple[tuple[str, float], ...]  # the most likely next tokens and their probabilities


@dataclass(frozen=True)
class Sampling:
    """Settings of one comparison, the same for both models."""

    max_new_tokens: int = 96
    temperature: float = 0.0  # 0 takes the most likely token every time
    top_p: float = 1.0  # sample from the most likely tokens that hold this share of the probability
    top_k: int = 0  # sample from this many of the most likely tokens; 0 means all
    repetition_penalty: float = 1.0  # above 1, tokens that have occurred become less likely
    seed: int = 0

    @classmethod
    def of_checkpoint(cls, config: GenerationConfig, limits: Limits, context: int, chat: bool = False) -> Sampling:
        """The values in a checkpoint's `generation_config.json`, cut to what the demo allows.

        Where it does not say whether to sample, a chat does at a temperature of 0.7, and a text is continued greedily.
        An answer takes at most half of the `context`, so that there is room for a prompt.
        """
        own = cls(max_new_tokens=min(96, limits.max_new_tokens, max(1, context // 2)))
        names = ("temperature", "top_p", "top_k", "repetition_penalty") if config.do_sample else ()
        given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        if config.do_sample:
            given.setdefault("temperature", 1.0)
        elif chat and config.do_sample is None:
            given["temperature"] = CHAT_TEMPERATURE
        within = {name: min(max(value, RANGES[name][0]), RANGES[name][1]) for name, value in given.items()}
        return replace(own, **within)

    def changed(self, values: dict[str, int | float | None], limits: Limits) -> Sampling:
        """These settings with a visitor's in their place, where those are not `None`."""
        changes = {name: value for name, value in values.items() if value is not None}
        for name, value in changes.items():
            low, high = RANGES.get(name, (1, limits.max_new_tokens))
            whole = name in ("max_new_tokens", "top_k", "seed")
            if not isinstance(value, (int, float)) or not low <= value <= high or (whole and value != int(value)):
                kind = "a whole number" if whole else "a number"
                raise LayerPruneError(f"{name}={value!r:.50} must be {kind} from {low:g} to {high:,.10g}")
            changes[name] = int(value) if whole else float(value)
        return replace(self, **changes)


@dataclass(frozen=True)
class Answer:
    """What a model has written so far, and how fast."""

    text: str = ""
    num_tokens: int = 0  # new ones
    time_to_first_token: float | None = None  # seconds
    tokens_per_second: float | None = None  # of the new tokens after the first
    memory_bytes: int | None = None  # the weights and the KV cache, which must fit at least
    num_parameters: int | None = None
    num_layers: int | None = None
    dtype: str | None = None
    ending: str = ""  # "end" of the model's own, "length", "time", "stopped" or "not run"; empty while it may grow

    def stopped(self) -> Answer:
        """The answer after a visitor's Stop."""
        return self if self.ending else replace(self, ending="stopped" if self.num_tokens else "not run")


def sample(model: PreTrainedModel, prompt: Tensor, sampling: Sampling) -> Iterator[int]:
    """The tokens that a model writes after a `prompt` (1, T), without end, each when it is asked for.

    They are those of `generate`, which cannot pause after each for another model.
    """
    cache, processors = DynamicCache(config=model.config), LogitsProcessorList()  # in the order of `generate`
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling.top_p))
    chance = torch.Generator(model.device).manual_seed(sampling.seed)
    ids = new = prompt
    while True:
        logits = model(input_ids=new, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
        scores = processors(ids, logits.float())
        if sampling.temperature > 0:
            new = torch.multinomial(scores.softmax(-1), 1, generator=chance)
        else:
            new = scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], dim=-1)
        yield int(new)


def write(
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampling: Sampling,
    max_seconds: float,
    blank: Answer,
) -> Iterator[Answer]:
    """A model's answer to a prompt of token ids, as it grows by a token, on a clock of its own.

    First comes the `blank` one, when the model is loaded and has written two hidden tokens: what is slow only once is
    over then.
    """
    model = load()
    ids = torch.tensor([prompt], device=model.device)  # (1, T)
    parameters, dtype = model.num_parameters(), str(model.dtype).removeprefix("torch.")
    blank = replace(blank, num_parameters=parameters, num_layers=plan_of(model).depth, dtype=dtype)
    weights, cache = model.get_memory_footprint(), kv_bytes_per_token(model)
    ends = model.generation_config.eos_token_id
    list(islice(sample(model, ids[:, -WARM_UP_TOKENS:], Sampling()), 2))
    yield blank
    growing, tokens, seconds, ending = sample(model, ids, sampling), [], [], ""
    while not ending:
        start = time.perf_counter()
        tokens.append(next(growing))
        seconds.append(time.perf_counter() - start)
        if tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            ending = "end"
        elif len(tokens) >= sampling.max_new_tokens:
            ending = "length"
        elif sum(seconds) > max_seconds:
            ending = "time"
        first, *rest = seconds
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        yield replace(
            blank,
            text=text if ending else text.rstrip("\ufffd"),  # half a character, whose rest follows
            num_tokens=len(tokens),
            time_to_first_token=first,
            tokens_per_second=len(rest) / sum(rest) if rest else None,
            memory_bytes=weights + cache * (len(prompt) + len(tokens)),
            ending=ending,
        )


def write_in_turn(answers: list[Answer], writers: dict[int, Iterator[Answer]]) -> Iterator[list[Answer]]:
    """The `answers`, of which those with a writer grow by a token in turn; several times a second, also while models
    load.

    Closing it stops the models after their token. One thread computes it all, and ends with it: every thread
    that ever computed on the CPU keeps a team of OpenMP threads, and more threads than cores halve the speed.
    """
    stop, failures, running = threading.Event(), [], dict(writers)

    def work() -> None:
        try:
            with DEVICE, torch.no_grad():
                while running:
                    for side, writer in list(running.items()):
                        if stop.is_set():
                            return
                        answers[side] = next(writer)
                        if answers[side].ending:
                            del running[side]
        except Exception as error:  # for the thread that reads
            failures.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        alive = True
        while alive:
            worker.join(SECONDS_BETWEEN_ANSWERS)
            alive = worker.is_alive()
            if failures:
                raise failures[0] from None
            yield list(answers)
    finally:
        stop.set()


@dataclass(frozen=True)
class Position:
    """One position of a text."""

    token: str  # the one there
    kl: float  # KL(teacher || student) of what comes next, in nats
    original: Expected
    compressed: Expected


def compare_next_tokens(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> list[Position]:
    """What two models expect next, at each of the T tokens `ids`, and how far apart they are."""
    batch = torch.tensor([ids], device=teacher.device)
    with DEVICE, torch.no_grad():
        logs = [model(input_ids=batch).logits[0].float().log_softmax(-1) for model in (teacher, student)]  # (T, V)
        kls = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).clamp(min=0).tolist()
        tokens = [tokenizer.decode([index]) for index in ids]
        return list(map(Position, tokens, kls, *(_expected(log, tokenizer) for log in logs)))


def _expected(log_probabilities: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[Expected]:
    values, indices = log_probabilities.exp().topk(min(TOP, log_probabilities.shape[-1]))
    rows = zip(indices.tolist(), values.tolist(), strict=True)
    return [tuple((tokenizer.decode([index]), share) for index, share in zip(*row, strict=True)) for row in rows]
