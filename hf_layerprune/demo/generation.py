"""One model's answer, written in a thread of its own: streamed, timed, stopped at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ..errors import LayerPruneError, first_line
from .sampling import Sampling
from .store import LoadedModel

logger = logging.getLogger(__name__)

WAITING, LOADING, WRITING, DONE, STOPPED, FAILED = "waiting", "loading", "writing", "done", "stopped", "failed"
"""States of an answer, in the order they come."""
ENDED = (DONE, STOPPED, FAILED)
WARM_UP_TOKENS = 128
"""Most tokens of the prompt that are read once before the clock starts."""


@dataclass(frozen=True)
class Answer:
    """What a model has written so far, and how fast.

    Attributes:
        state (`str`): waiting, loading, writing, done, stopped or failed.
        text (`str`): the words.
        num_tokens (`int`): new tokens.
        time_to_first_token (`float`, *optional*): seconds from the call to the first new token.
        tokens_per_second (`float`, *optional*): new tokens after the first over the time they took.
        peak_memory_bytes (`int`, *optional*): the weights and the most memory that generating added; on a GPU
            measured, elsewhere (and where both models run at once) the KV cache, which is what must fit at least.
        memory_measured (`bool`): whether that memory was measured.
        num_parameters (`int`, *optional*): of the model.
        num_layers (`int`, *optional*): of the model.
        cut (`str`): why it ended before the model did: `"length"` or `"time"`; empty otherwise.
        error (`str`): what went wrong.
    """

    state: str = WAITING
    text: str = ""
    num_tokens: int = 0
    time_to_first_token: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    memory_measured: bool = False
    num_parameters: int | None = None
    num_layers: int | None = None
    cut: str = ""
    error: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class _Watch(StoppingCriteria):
    """Stamps the time after every token, inside `generate`, and ends it when asked to or out of time."""

    def __init__(self, stop: threading.Event, max_seconds: float) -> None:
        self.stop = stop
        self.times: list[float] = []
        self.deadline = time.perf_counter() + max_seconds
        self.late = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        self.late = self.times[-1] > self.deadline
        end = self.stop.is_set() or self.late
        return torch.full((len(input_ids),), end, dtype=torch.bool, device=input_ids.device)


class _Tokens(BaseStreamer):
    """Keeps the new tokens; whoever reads them makes words of them, so that `generate` does not wait for it."""

    def __init__(self) -> None:
        self.ids: list[int] | None = None  # until the prompt has been handed over

    def put(self, value: Tensor) -> None:
        self.ids = [] if self.ids is None else self.ids + value.flatten().tolist()

    def end(self) -> None:
        pass


class Generation:
    """The answer of one model to one prompt.

    Args:
        load (`Callable`): gives the model; what it raises is shown as the answer's error.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model.
        prompt (`list[int]`): token ids.
        sampling ([`Sampling`]): how to draw.
        max_seconds (`float`): when to end at the latest.
        alone (`bool`, *optional*, defaults to `True`): whether no other model runs, so that memory can be measured.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[int],
        sampling: Sampling,
        max_seconds: float,
        alone: bool = True,
    ) -> None:
        self._load = load
        self._prompt = prompt
        self._sampling = sampling
        self._max_seconds = max_seconds
        self._alone = alone
        self._stop = threading.Event()
        self._tokenizer = tokenizer
        self._tokens = _Tokens()
        self._watch: _Watch | None = None
        self._started_at = 0.0
        self._base = Answer()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write."""
        self._base = replace(self._base, state=LOADING)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the token that is being computed, and wait for that; for a model that loads it does not wait."""
        self._stop.set()
        if self._base.state != LOADING:  # else it sees that it was stopped before it writes
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it has ended, or for so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def answer(self) -> Answer:
        """What there is by now."""
        base, times = self._base, list(self._watch.times) if self._watch else []
        text = self._tokenizer.decode(self._tokens.ids or [], skip_special_tokens=True)
        text = text if base.ended else text.rstrip("\ufffd")  # of a character whose bytes are not all there
        first = times[0] - self._started_at if times else None
        rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
        return replace(base, text=text, num_tokens=len(times), time_to_first_token=first, tokens_per_second=rate)

    def _run(self) -> None:
        try:
            loaded = self._load()
            facts = {"num_parameters": loaded.num_parameters, "num_layers": loaded.num_layers}
            self._base = replace(self._base, state=WRITING, **facts)
            if not self._stop.is_set():
                self._generate(loaded)
            self._base = replace(self._base, state=STOPPED if self._stop.is_set() else DONE)
        except LayerPruneError as error:
            self._fail(str(error))
        except torch.OutOfMemoryError as error:
            logger.warning("generating: %s", error)
            self._fail("the device ran out of memory; try a shorter prompt, or one model after the other")
        except Exception as error:  # whatever it is, it is this model's alone: the other goes on
            logger.exception("generating")
            self._fail(f"{type(error).__name__}: {first_line(error):.200}")

    def _fail(self, message: str) -> None:
        self._base = replace(self._base, state=FAILED, error=message)

    def _generate(self, loaded: LoadedModel) -> None:
        model, on_gpu = loaded.model, loaded.model.device.type == "cuda"
        ids = torch.tensor([self._prompt], device=model.device)
        before = 0
        if self._alone:
            _warm_up(model, ids[:, -WARM_UP_TOKENS:])
        if on_gpu:
            torch.cuda.synchronize(model.device)
            if self._alone:
                torch.cuda.reset_peak_memory_stats(model.device)
                before = torch.cuda.memory_allocated(model.device)
        watch = _Watch(self._stop, self._max_seconds)
        self._started_at = time.perf_counter()
        self._watch = watch
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self._config(model.generation_config),
            logits_processor=self._sampling.processors(model.device),
            stopping_criteria=StoppingCriteriaList([watch]),
            streamer=self._tokens,
        )
        cache = loaded.kv_bytes_per_token * output.shape[1]
        measured = on_gpu and self._alone
        added = torch.cuda.max_memory_allocated(model.device) - before if measured else cache
        ends = model.generation_config.eos_token_id
        by_itself = int(output[0, -1]) in (ends if isinstance(ends, list) else [ends])
        cut = "" if by_itself or self._stop.is_set() else "time" if watch.late else "length"
        memory = loaded.weight_bytes + added
        self._base = replace(self._base, peak_memory_bytes=memory, memory_measured=measured, cut=cut)

    def _config(self, own: GenerationConfig) -> GenerationConfig:
        penalty = self._sampling.repetition_penalty
        return GenerationConfig(
            max_new_tokens=self._sampling.max_new_tokens,
            do_sample=False,  # drawn by the last of the processors
            repetition_penalty=penalty if penalty > 1 else None,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )


def _warm_up(model: PreTrainedModel, ids: Tensor) -> None:
    """Two tokens that nobody sees: what is slow only once, at this length or since the other model ran, is over."""
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2, do_sample=False)
