"""The models that a demo offers: a teacher, its students by depth, what their run measured; and those in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError
from ..hub import Run, load_run
from ..hub.paths import hub_id
from ..hub.push import depth_tag
from ..hub.runs import hub_errors
from ..loading import EMBEDDED, is_gguf, load_config, load_model, load_tokenizer, resolve, split_revision
from ..plan import LayerPlan
from ..record import RoundRecord, RunRecord
from ..report import plot_layer_map, plot_quality
from ..surgery import apply_plan, plan_of
from .generation import Sampling
from .settings import DemoSettings, Limits, ModelEntry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
EXAMPLES = (
    "The old man looked out of the window and",
    "She opened the letter slowly, and when she had read it",
    "It was a dark and stormy night;",
)
CHAT_EXAMPLES = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about a lighthouse.",
    "Name three differences between a list and a tuple in Python.",
)


@dataclass(frozen=True)
class DemoModel:
    """A model to load: a teacher or a student."""

    name: str  # folder, Hub id with a revision or without, or "embedded"
    plan: LayerPlan  # the teacher's layers in it
    round: int = 0  # that made it, from 1; 0 without a run
    base: DemoModel | None = None  # whose layers are put into the plan's blocks in memory, where no file holds them


@dataclass(frozen=True)
class Pairing:
    """A teacher and the students that it is compared with."""

    name: str  # what the visitor chooses by
    original: str  # what to call the teacher
    teacher: DemoModel
    students: tuple[DemoModel, ...]  # deepest first, beginning with the original itself
    tokenizer: PreTrainedTokenizerBase  # of all of them
    context: int  # positions that a prompt and its answer share
    samplings: tuple[Sampling, ...]  # of a text to continue and of a chat, as the teacher's checkpoint says
    run: RunRecord | None = None
    description: str = ""
    examples: tuple[str, ...] = ()  # prompts to click

    @property
    def can_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def prompts(self, chat: bool) -> tuple[str, ...]:
        """Examples to choose from."""
        return self.examples or (CHAT_EXAMPLES if chat else EXAMPLES)

    @property
    def depths(self) -> list[int]:
        """Depths to choose from, deepest first."""
        return [student.plan.depth for student in self.students]

    def student(self, depth: Any = None) -> DemoModel:
        """The student with the nearest depth; the shallowest for `None` and 0."""
        if depth in (None, 0):
            return self.students[-1]
        if not isinstance(depth, (int, float)):
            raise LayerPruneError(f"depth={depth!r:.50} must be a number of layers")
        return min(self.students, key=lambda student: (abs(student.plan.depth - depth), student.plan.depth))

    def round(self, depth: int) -> RoundRecord | None:
        """What the run measured of a student; `None` without a run."""
        number = self.student(depth).round
        return self.run.rounds[number - 1] if self.run and number else None

    def models(self, depth: int) -> tuple[DemoModel, DemoModel]:
        """The original, and the student of a depth."""
        return self.teacher, self.student(depth)

    def names(self, depth: int) -> tuple[str, str]:
        """What to call the two models: their Hub ids, or the last part of a folder."""
        teacher, student = self.original, self.student(depth)
        if student == self.teacher:
            return teacher, teacher
        if student.base is not None:
            return teacher, f"{teacher} in {student.plan.depth} layers"
        name = public_name(student.name)
        return teacher, self.name if self.run and "/" not in name else name

    def layer_map(self, depth: int) -> Figure | None:
        """What each edit cost in the rounds up to a depth; `None` without a round."""
        record = self.round(depth)
        return record and plot_layer_map(self.run.until(record.number))

    def quality(self) -> Figure | None:
        """Perplexity against depth; `None` without a run."""
        return self.run and plot_quality(self.run)


def open_catalog(settings: DemoSettings, on_message: Callable[[str], None] = lambda text: None) -> dict[str, Pairing]:
    """Open every entry of a list, by name; `on_message` is called with each that cannot be opened, and why."""
    pairings: dict[str, Pairing] = {}
    for entry in settings.models:
        try:
            pairings[entry.name] = _open(entry, settings.limits)
        except LayerPruneError as error:
            if len(settings.models) == 1:
                raise
            on_message(f"left out: {entry.name}: {error}")
    if not pairings:
        raise LayerPruneError("no model of the list can be opened")
    return pairings


def _open(entry: ModelEntry, limits: Limits) -> Pairing:
    run = None if entry.run is None else load_run(entry.run)
    name = str(entry.teacher) if run is None else teacher_of(entry, run)
    config, own = load_config(name), GenerationConfig()  # where the checkpoint has none
    with suppress(OSError, ValueError):
        if not is_gguf(name):
            own = GenerationConfig.from_pretrained(resolve(name), revision=split_revision(name)[1] or "main")
    context, teacher = config.max_position_embeddings, DemoModel(name, plan_of(config))
    if run is not None:
        students = _students(run)
    elif entry.plan is not None:
        students = [DemoModel(name, LayerPlan(entry.plan, teacher.plan.num_teacher_layers), base=teacher)]
    else:
        students = [DemoModel(str(entry.student), plan_of(load_config(str(entry.student))))]
    if entry.teacher is not None and entry.plan is None:
        _check_vocabulary(students[0].name, name, config)
    by_depth = {student.plan.depth: student for student in (teacher, *students)}  # of one depth the later
    return Pairing(
        name=entry.name,
        teacher=teacher,
        students=tuple(by_depth[depth] for depth in sorted(by_depth, reverse=True)),
        tokenizer=load_tokenizer(name),
        context=context,
        samplings=tuple(Sampling.of_checkpoint(own, limits, context, chat) for chat in (False, True)),
        original=public_name(name if run is None or entry.teacher else run.record.teacher.name),
        run=run and run.record,
        description=entry.description,
        examples=tuple(entry.examples),
    )


def _check_vocabulary(student: str, teacher: str, config: PretrainedConfig) -> None:
    if (size := load_config(student).vocab_size) != config.vocab_size:
        raise LayerPruneError(
            f"{student} has a vocabulary of {size} tokens and {teacher} one of {config.vocab_size}; compare models "
            "with the same tokenizer"
        )


def _students(run: Run) -> list[DemoModel]:
    """The student of every round that was kept or has a tag."""
    rounds, kept = run.record.rounds, {}
    if run.revision is not None:
        with hub_errors(f"looking at {run.name}"):
            tags = {ref.name: ref.target_commit for ref in HfApi().list_repo_refs(run.name).tags}
        kept = {one.number: f"{run.name}@{tags[tag]}" for one in rounds if (tag := depth_tag(one.depth)) in tags}
        kept[len(rounds)] = f"{run.name}@{run.revision}"
    else:
        for number in range(1, len(rounds) + 1):
            with suppress(LayerPruneError):  # `parallelize` keeps the last one only
                kept[number] = str(run.student(number))
    if not kept:
        raise LayerPruneError(f"{run.name} no longer holds any student")
    return [DemoModel(name, rounds[number - 1].plan, number) for number, name in kept.items()]


def teacher_of(entry: ModelEntry, run: Run) -> str:
    """The teacher in the list, or else in the run: in its settings if it is on this machine, else in its report.

    Of a local model a report holds the name of its folder only, which elsewhere may be anything.
    """
    settings = run.settings
    name = str(entry.teacher or settings.get("teacher") or settings.get("model") or run.record.teacher.name)
    if not entry.teacher and name != EMBEDDED and hub_id(name) is None and not (settings and Path(name).is_absolute()):
        raise LayerPruneError(
            f"{entry.run} was made from {name!r}, which is not a model on the Hub; name its original, as teacher"
        )
    return name


def public_name(name: str) -> str:
    """The Hub id in a name, without its revision; of a model on this machine the last part of its folder."""
    on_hub = None if Path(name).exists() else hub_id(name)
    return on_hub or Path(name).name


class ModelStore:
    """The models of a demo in memory, each loaded once; the least recently used makes room for the next."""

    def __init__(self, max_models: int, dtype: str = "auto") -> None:
        self.dtype = dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sizes: dict[DemoModel, tuple[int, str]] = {}  # parameters and dtype of every model that was loaded
        self._kept, self._lock = lru_cache(max_models)(self._load), threading.RLock()

    def get(self, wanted: DemoModel) -> PreTrainedModel:
        """The model on the device; errors name no folder."""
        with self._lock:
            model = self._kept(wanted)
        self.sizes[wanted] = model.num_parameters(), str(model.dtype).removeprefix("torch.")
        return model

    def _load(self, wanted: DemoModel) -> PreTrainedModel:
        if wanted.base is not None:
            return apply_plan(self.get(wanted.base), wanted.plan, share_weights=True)
        try:
            model = load_model(wanted.name, self.dtype, self.device)
        except LayerPruneError as error:
            logger.warning("loading %s: %s", wanted.name, error)
            raise LayerPruneError(str(error).replace(wanted.name, Path(wanted.name).name)) from error
        return model.eval().to(self.device)
