"""One model's answer to one prompt: streamed, timed, and stopped after the current token."""

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
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..benchmark import kv_bytes_per_token, weight_bytes
from ..errors import LayerPruneError
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


@dataclass(frozen=True)
class Sampling:
    """Settings of one comparison, the same for both models.

    Attributes:
        max_new_tokens (`int`): longest answer, in tokens.
        temperature (`float`): 0 takes the most likely token every time.
        top_p (`float`): draw from the most likely tokens that hold this share of the probability.
        top_k (`int`): draw from so many most likely tokens; 0 is all.
        repetition_penalty (`float`): above 1, tokens that were there before become less likely.
        seed (`int`): seed of the random numbers, which are the same for both models.
    """

    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
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
        """These settings with others in their place where those are not `None`.

        Raises:
            [`LayerPruneError`]: if one is not a number, or out of range.
        """
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
    """What a model has written so far, and how fast.

    Attributes:
        text (`str`): the words.
        num_tokens (`int`): new tokens.
        time_to_first_token (`float`, *optional*): seconds from the call to the first new token.
        tokens_per_second (`float`, *optional*): new tokens after the first, divided by the time they took.
        memory_bytes (`int`, *optional*): the weights and the KV cache, which must fit at least.
        num_parameters (`int`, *optional*): of the model.
        num_layers (`int`, *optional*): of the model.
        ended (`bool`): whether this is all of it.
        out_of_time (`bool`): whether the time limit ended it.
    """

    text: str = ""
    num_tokens: int = 0
    time_to_first_token: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    num_parameters: int | None = None
    num_layers: int | None = None
    ended: bool = False
    out_of_time: bool = False


class Clock(StoppingCriteria):
    """Stamps the time after every token, inside `generate`, and stops it on request."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.stop = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.full((len(input_ids),), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


@dataclass
class Generation:
    """One call of `generate`, which runs in a thread of its own.

    Every thread that ever computed on the CPU keeps a team of OpenMP threads for as long as it lives; teams with more
    threads than cores halve the speed. So nothing computes in a thread that stays.

    Attributes:
        load (`Callable`): returns the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model.
        prompt (`list[int]`): token ids.
        sampling ([`Sampling`]): how to draw.
        max_seconds (`float`): ends it at the latest.
    """

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    prompt: list[int]
    sampling: Sampling
    max_seconds: float
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
