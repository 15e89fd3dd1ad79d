"""What the page and the API do with a request: check it, queue it, let both models answer or say what they expect."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError, first_line
from .catalog import ModelStore, Pairing
from .comparison import Comparison
from .generation import Answer, Position, Sampling, compare_next_tokens, write, write_in_turn
from .settings import DemoSettings, Limits

SECONDS_BETWEEN_LOOKS = 0.3  # how often a waiting visitor sees their place in line
SECONDS_UNTIL_GONE = 15.0  # a visitor who has not asked for this long has left
SECONDS_FOR_EXAMPLE = 20  # most that answering the first example takes before anybody comes
GPU_SECONDS, STARTING_SECONDS, SECONDS_PER_TOKEN = 60, 15, 0.1
"""A call on ZeroGPU: the longest (longer ones are refused to many visitors), its start, each token of both models."""
Turn = tuple[str, str, str]  # what the visitor wrote, what the teacher answered, what the student answered


class Line:
    """A line in which at most `most` wait for the device; the first is served."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seconds = 10.0  # that a visit takes, lately
        self._seen: dict[object, float] = {}  # when each was seen last, in the order of the line

    @contextmanager
    def place(self) -> Iterator[Callable[[], int]]:
        """A place in the line; the function says how many are ahead, and must be called now and then to keep it."""
        ticket = object()
        if self._ahead(ticket) > self.most:
            del self._seen[ticket]
            raise LayerPruneError(f"{self.most} visitors are waiting already; try again in a minute")
        try:
            yield partial(self._ahead, ticket)
        finally:
            del self._seen[ticket]

    def told(self, ahead: int) -> str:
        """How long the wait is, in words."""
        return f"{ahead} visitor{'s' if ahead > 1 else ''} ahead, about {max(1, round(ahead * self.seconds))} s"

    def took(self, seconds: float) -> None:
        """Learn how long a visit takes."""
        self.seconds += 0.3 * (seconds - self.seconds)

    def _ahead(self, ticket: object) -> int:
        now = self._seen[ticket] = time.monotonic()  # who was there keeps his place
        others = list(self._seen.items())
        before = others[: [one for one, _ in others].index(ticket)]
        return sum(now - seen < SECONDS_UNTIL_GONE for _, seen in before)


class DemoService:
    """A demo, ready to answer."""

    def __init__(self, settings: DemoSettings, catalog: dict[str, Pairing]) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.catalog = catalog
        self.store = ModelStore(settings.limits.max_models, settings.dtype)
        self.line = Line(settings.limits.max_waiting)
        self.stored: dict[tuple[str, int, bool], Comparison] = {}  # answers to first examples: of a model, depth, mode
        self._compare, self._inspect = self._compare_on_device, self._inspect_on_device
        if on_zero_gpu():  # both run in a forked process: of an exception there only its kind comes back
            import spaces

            self._compare = spaces.GPU(duration=lambda *job: seconds_on_gpu(job[3].max_new_tokens))(self._compare)
            self._inspect = spaces.GPU(duration=lambda *job: STARTING_SECONDS)(self._inspect)

    def pairing(self, name: str = "") -> Pairing:
        """The pairing of a name; the first for an empty name."""
        if not isinstance(name, str) or (name and name not in self.catalog):
            raise LayerPruneError(f"model={name!r:.100} is not on the list; choose one of {', '.join(self.catalog)}")
        return self.catalog[name or next(iter(self.catalog))]

    def warm_up(self) -> None:
        """Load the first pairing and let it answer its first example; on ZeroGPU load as many as there is room for."""
        for name in list(self.catalog)[: self.limits.max_models // 2 if on_zero_gpu() else 1]:
            in_passing_thread(self._models, name, 0)
        if on_zero_gpu():  # which lends nothing before somebody comes
            return
        pairing, until = self.pairing(), 0.0
        chat = pairing.can_chat
        with suppress(LayerPruneError), closing(self.stream(pairing.prompts(chat)[0], chat=chat)) as growing:
            for comparison in growing:
                until = until or (comparison.original.num_tokens and time.monotonic() + SECONDS_FOR_EXAMPLE)
                self.stored[pairing.name, pairing.depths[-1], chat] = comparison.stopped()
                if 0 < until < time.monotonic():
                    break

    def blank(self, pairing: Pairing, depth: Any = None) -> Comparison:
        """What is known of both models before they answer."""
        records = (pairing.run and pairing.run.teacher, pairing.round(depth))
        answers = []
        for model, record in zip(pairing.models(depth), records, strict=True):
            known = record.num_parameters if record else None
            parameters, dtype = self.store.sizes.get(model, (known, None))
            answers.append(Answer(num_layers=model.plan.depth, num_parameters=parameters, dtype=dtype))
        return Comparison(*answers)

    def stream(
        self,
        prompt: str,
        model: str = "",
        depth: int = 0,
        chat: bool = False,
        sampling: dict[str, Any] | None = None,
        history: Sequence[Turn] = (),
        original: Answer | None = None,
    ) -> Iterator[Comparison]:
        """Compare two answers as they grow. Closing the iterator stops the models.

        The prompt is a text to continue or, with `chat`, the next message after `history`. `sampling` holds what
        differs from the teacher's [`Sampling`]. With an `original` answer only the student is asked.
        """
        pairing, limits = self.pairing(model), self.limits
        student, own = pairing.student(depth), pairing.samplings[chat]
        drawn = own.changed(sampling or {}, limits)
        prompts = encode(pairing.tokenizer, cleaned(prompt, limits), history if chat else None)
        for ids in prompts:
            check_length(ids, min(limits.max_prompt_tokens, pairing.context - 1))
            if len(ids) + drawn.max_new_tokens > pairing.context:
                raise LayerPruneError(
                    f"the prompt has {len(ids):,} tokens and shares the {pairing.context:,} positions of this model "
                    f"with the answer; ask for at most {pairing.context - len(ids):,} new tokens"
                )
        start = self.blank(pairing, depth)
        start = start if original is None else replace(start, original=original)
        with self.line.place() as ahead:
            yield start
            while number := ahead():
                yield replace(start, waiting=self.line.told(number))
                time.sleep(SECONDS_BETWEEN_LOOKS)
            began = time.monotonic()
            if on_zero_gpu():  # loading would be time on the GPU, and lost with the process that gets it
                in_passing_thread(self._models, pairing.name, student.plan.depth)
            with closing(self._compare(pairing.name, student.plan.depth, prompts, drawn, start)) as growing:
                for comparison in growing:
                    ahead()
                    yield comparison
            self.line.took(time.monotonic() - began)
        if prompt == pairing.prompts(chat)[0] and drawn == own and not history:
            self.stored[pairing.name, student.plan.depth, chat] = comparison

    def inspect(self, text: str, model: str = "", depth: int = 0) -> list[Position]:
        """What both models expect at every position of a text."""
        pairing = self.pairing(model)
        ids = pairing.tokenizer(cleaned(text, self.limits))["input_ids"]
        check_length(ids, min(self.limits.max_inspected_tokens, pairing.context))
        in_passing_thread(self._models, pairing.name, depth)
        return self._inspect(pairing.name, depth, ids)

    def most_new_tokens(self, pairing: Pairing) -> int:
        """The longest answer that the limits and the model allow."""
        return max(1, min(self.limits.max_new_tokens, pairing.context - 1))

    def _compare_on_device(
        self, name: str, depth: int, prompts: tuple[list[int], list[int]], sampling: Sampling, start: Comparison
    ) -> Iterator[Comparison]:
        pairing, answers = self.catalog[name], [start.original, start.compressed]
        seconds: float = self.limits.max_seconds
        if on_zero_gpu():  # both answers must end within the call
            seconds = min(seconds, (seconds_on_gpu(sampling.max_new_tokens) - 5) / 2)
        writers = {}
        for side, model in enumerate(pairing.models(depth)):
            if not answers[side].ending:
                load, rest = partial(self.store.get, model), (prompts[side], sampling, seconds, answers[side])
                writers[side] = write(load, pairing.tokenizer, *rest)
        with closing(write_in_turn(answers, writers)) as growing:
            for grown in growing:
                yield Comparison(*grown)

    def _inspect_on_device(self, name: str, depth: int, ids: list[int]) -> list[Position]:
        return in_passing_thread(compare_next_tokens, *self._models(name, depth), self.catalog[name].tokenizer, ids)

    def _models(self, name: str, depth: int) -> list[PreTrainedModel]:
        return [self.store.get(model) for model in self.catalog[name].models(depth)]


def cleaned(text: object, limits: Limits) -> str:
    """The text of a visitor, as a tokenizer takes it."""
    if not isinstance(text, str) or not text.strip():
        raise LayerPruneError("the prompt is empty; write something, or choose an example")
    if len(text) > limits.max_prompt_characters:
        raise LayerPruneError(f"the prompt has {len(text):,} characters; at most {limits.max_prompt_characters:,} fit")
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is not a character


def check_length(ids: list[int], most: int) -> None:
    """Raise [`LayerPruneError`] unless the prompt has 1 to `most` tokens."""
    if not 1 <= len(ids) <= most:
        raise LayerPruneError(f"the prompt has {len(ids):,} tokens; 1 to {most:,} are read; shorten it, or start over")


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, history: Sequence[Turn] | None = None
) -> tuple[list[int], list[int]]:
    """Token ids for both models, which differ once a conversation has diverged; without `history` those of a text."""
    if history is None:
        return (tokenizer(prompt)["input_ids"],) * 2
    if not tokenizer.chat_template:
        raise LayerPruneError("this model has no chat template; let it continue a text instead")
    prompts = []
    for side in (1, 2):
        texts = [text for turn in history for text in (turn[0], turn[side])] + [prompt]
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        try:
            prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except (TemplateError, ValueError, TypeError) as error:
            raise LayerPruneError(f"the chat template of this model fails: {first_line(error):.200}") from error
    return prompts[0], prompts[1]


def in_passing_thread(function: Callable[..., Any], *args: object) -> Any:
    """Call `function` in a thread that ends with the call; see [`write_in_turn`] for the reason."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function, *args).result()


def on_zero_gpu() -> bool:
    """Whether this is a Space on ZeroGPU hardware, which lends a GPU to each call that is marked for it."""
    return bool(os.environ.get("SPACES_ZERO_GPU"))


def seconds_on_gpu(num_tokens: int) -> int:
    """How long a call on ZeroGPU may take: the less is asked for, the sooner and the more often it is granted."""
    return min(GPU_SECONDS, round(STARTING_SECONDS + SECONDS_PER_TOKEN * num_tokens))
