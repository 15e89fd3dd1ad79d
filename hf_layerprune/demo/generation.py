"""What models answer, streamed, timed, and stopped after the current token; and what they expect next in a text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from queue import Empty

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..benchmark import Stopwatch, kv_bytes_per_token, weight_bytes
from ..errors import LayerPruneError
from ..forward import final_states, inference
from ..surgery import plan_of
from .settings import Limits

SECONDS_BETWEEN_ANSWERS = 0.12
DEVICE = threading.Lock()
"""Held by the one model that runs: a stopped one finishes its token before the next begins."""
WARM_UP_TOKENS = 128
"""Most tokens of the prompt that are read once before the clock starts."""
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "top_k": (0, 1000),
    "repetition_penalty": (1.0, 2.0),
    "seed": (0, 2**31 - 1),
}
ROWS_AT_ONCE = 16
"""Positions whose distributions are in memory at a time."""
TOP = 5
"""Tokens to show of what each model expects."""
Expected = tuple[tuple[str, float], ...]
"""The most likely next tokens and their probabilities."""


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
    def of_checkpoint(cls, config: GenerationConfig, limits: Limits, context: int) -> Sampling:
        """The values in a checkpoint's `generation_config.json`, cut to what the demo allows; greedy by default.

        An answer takes at most half of the `context`, so that there is room for a prompt.
        """
        own = cls(max_new_tokens=min(96, limits.max_new_tokens, max(1, context // 2)))
        names = ("temperature", "top_p", "top_k", "repetition_penalty") if config.do_sample else ()
        given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        return replace(
            own, **{name: min(max(value, RANGES[name][0]), RANGES[name][1]) for name, value in given.items()}
        )

    def changed(self, values: dict[str, int | float | None], limits: Limits) -> Sampling:
        """These settings with a visitor's in their place, where those are not `None`."""
        changes = {name: value for name, value in values.items() if value is not None}
        for name, value in changes.items():
            low, high = RANGES.get(name, (1, limits.max_new_tokens))
            whole = name in ("max_new_tokens", "top_k", "seed")
            # not `isinstance`: True is an int
            if type(value) not in (int, float) or not low <= value <= high or (whole and value != int(value)):
                kind = "a whole number" if whole else "a number"
                raise LayerPruneError(f"{name}={value!r:.50} must be {kind} from {low:g} to {high:,.10g}")
            changes[name] = int(value) if whole else float(value)
        return replace(self, **changes)

    def generation_config(self, own: GenerationConfig, max_seconds: float) -> GenerationConfig:
        """What `generate` takes, for a model whose own settings hold only its end and padding tokens."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            max_time=max_seconds,
            repetition_penalty=self.repetition_penalty,
            do_sample=self.temperature > 0,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
            **(drawn if self.temperature > 0 else {}),
        )


@dataclass(frozen=True)
class Answer:
    """What a model has written so far, and how fast."""

    text: str = ""
    num_tokens: int = 0  # new ones
    time_to_first_token: float | None = None  # seconds, from the call
    tokens_per_second: float | None = None  # of the new tokens after the first
    memory_bytes: int | None = None  # the weights and the KV cache, which must fit at least
    num_parameters: int | None = None
    num_layers: int | None = None
    ended: bool = False  # this is all of it
    out_of_time: bool = False  # the time limit ended it


class Clock(Stopwatch):
    """Stamps the time after every token, inside `generate`, and stops it on request."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.perf_counter()
        self.stop = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return super().__call__(input_ids, scores) | self.stop.is_set()


@dataclass
class Generation:
    """One call of `generate`, which runs in a thread of its own.

    Every thread that ever computed on the CPU keeps a team of OpenMP threads for as long as it lives; teams with more
    threads than cores halve the speed. So nothing computes in a thread that stays.
    """

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    prompt: list[int]  # token ids
    sampling: Sampling
    max_seconds: float  # after which it ends
    clock: Clock = field(default_factory=Clock)
    answer: Answer = Answer()
    failure: Exception | None = None
    _bytes: tuple[int, int] = (0, 0)  # of the weights, and of the KV cache per token

    def answers(self) -> Iterator[Answer]:
        """The answer as it grows, several times a second, also while the model loads. Closing it stops the model."""
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, timeout=SECONDS_BETWEEN_ANSWERS, skip_special_tokens=True
        )
        text, shown, ended = "", 0.0, False
        threading.Thread(target=self._run, args=(streamer,), daemon=True).start()
        try:
            while not ended:
                try:
                    text += next(streamer)
                except Empty:  # so that whoever reads can close it
                    pass
                except StopIteration:
                    ended = True
                    if self.failure is not None:
                        raise self.failure from None
                if ended or time.monotonic() - shown > SECONDS_BETWEEN_ANSWERS:
                    yield self._measured(text, ended)
                    shown = time.monotonic()
        finally:
            self.clock.stop.set()

    def _run(self, streamer: TextIteratorStreamer) -> None:
        try:
            with DEVICE:
                model = self.load()
                self.answer = Answer(num_parameters=model.num_parameters(), num_layers=plan_of(model).depth)
                self._bytes = weight_bytes(model), kv_bytes_per_token(model)
                if not self.clock.stop.is_set():
                    self._generate(model, streamer)
        except Exception as error:  # for the thread that reads
            self.failure = error
        finally:
            streamer.end()

    def _generate(self, model: PreTrainedModel, streamer: TextIteratorStreamer) -> None:
        ids = torch.tensor([self.prompt], device=model.device)  # (1, T)
        mask = torch.ones_like(ids)
        # two hidden tokens: what is slow only once, or since the other model ran, is over
        begin = {"input_ids": ids[:, -WARM_UP_TOKENS:], "attention_mask": mask[:, -WARM_UP_TOKENS:]}
        model.generate(**begin, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        torch.manual_seed(self.sampling.seed)
        self.clock.start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=mask,
            generation_config=self.sampling.generation_config(model.generation_config, self.max_seconds),
            stopping_criteria=StoppingCriteriaList([self.clock]),
            streamer=streamer,
        )

    def _measured(self, text: str, ended: bool) -> Answer:
        times, (weights, cache) = list(self.clock.times), self._bytes
        if not times:
            return replace(self.answer, ended=ended)
        return replace(
            self.answer,
            text=text,
            num_tokens=len(times),
            time_to_first_token=times[0] - self.clock.start,
            tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            memory_bytes=weights + cache * (len(self.prompt) + len(times)),
            ended=ended,
            out_of_time=ended and times[-1] - self.clock.start > self.max_seconds,
        )


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
    positions: list[Position] = []
    with inference(teacher, student):
        states = [final_states(model, {"input_ids": batch})[0] for model in (teacher, student)]  # (T, H)
        for start in range(0, len(ids), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logs = [
                model.get_output_embeddings()(state[rows]).float().log_softmax(-1)  # (rows, V)
                for model, state in zip((teacher, student), states, strict=True)
            ]
            kls = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).clamp(min=0).tolist()
            tokens = [tokenizer.decode([index]) for index in ids[rows]]
            positions += map(Position, tokens, kls, *(_expected(log, tokenizer) for log in logs))
    return positions


def _expected(log_probabilities: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[Expected]:
    values, indices = log_probabilities.exp().topk(min(TOP, log_probabilities.shape[-1]))
    rows = zip(indices.tolist(), values.tolist(), strict=True)
    return [tuple((tokenizer.decode([index]), share) for index, share in zip(*row, strict=True)) for row in rows]
