"""The models that a demo offers: a teacher, its students by depth, what their run measured; and those in memory.

The one module of the demo that reads the report of a run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

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
class ModelSource:
    """A model to load."""

    name: str  # folder, Hub id with a revision or without, or "embedded"
    plan: LayerPlan | None = None  # blocks that the layers of the loaded model are put into


@dataclass(frozen=True)
class Student:
    """A compressed model."""

    source: ModelSource
    plan: LayerPlan  # the teacher's layers in it
    round: int = 0  # that made it, from 1; 0 without a run


@dataclass(frozen=True)
class Pairing:
    """A teacher and the students that it is compared with."""

    name: str  # what the visitor chooses by
    teacher: ModelSource
    students: tuple[Student, ...]  # deepest first, beginning with the original itself
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

    def student(self, depth: Any = None) -> Student:
        """The student with the nearest depth; the shallowest for `None` and 0."""
        if depth in (None, 0):
            return self.students[-1]
        if type(depth) not in (int, float):  # not `isinstance`: True is an int
            raise LayerPruneError(f"depth={depth!r:.50} must be a number of layers")
        return min(self.students, key=lambda student: (abs(student.plan.depth - depth), student.plan.depth))

    def round(self, depth: int) -> RoundRecord | None:
        """What the run measured of a student; `None` without a run."""
        number = self.student(depth).round
        return self.run.rounds[number - 1] if self.run and number else None

    def source(self, side: int, depth: int) -> ModelSource:
        """The model of a side: 0 is the original, 1 the student."""
        return self.student(depth).source if side else self.teacher

    def names(self, depth: int) -> tuple[str, str]:
        """What to call the two models: their Hub ids, or the last part of a folder."""
        teacher = public_name(self.run.teacher.name if self.run else self.teacher.name)
        student = self.student(depth).source
        if student == self.teacher:
            return teacher, teacher
        if student.plan is not None:
            return teacher, f"{teacher} in {student.plan.depth} layers"
        name = public_name(student.name)
        return teacher, self.name if self.run and "/" not in name else name

    def layer_map(self, depth: int) -> Figure | None:
        """What each edit cost in the rounds up to a depth; `None` without a round."""
        number = self.student(depth).round
        return plot_layer_map(self.run.until(number)) if self.run and number else None

    def quality(self) -> Figure | None:
        """Perplexity against depth; `None` without a run."""
        return self.run and plot_quality(self.run)


def open_catalog(settings: DemoSettings, on_message: Callable[[str], None] = lambda text: None) -> dict[str, Pairing]:
    """Open every entry of a list, by name; `on_message` is called with each that cannot be opened, and why.

    Fails if none can be opened.
    """
    pairings: dict[str, Pairing] = {}
    problems = []
    for entry in settings.models:
        try:
            pairings[entry.name] = _open(entry, settings.limits)
        except LayerPruneError as error:
            problems.append(f"{entry.name}: {error}")
    if not pairings:
        raise LayerPruneError("; ".join(problems))
    for problem in problems:
        on_message(f"left out: {problem}")
    return pairings


def _open(entry: ModelEntry, limits: Limits) -> Pairing:
    teacher, students, run = (*_named(entry), None) if entry.run is None else _of_run(entry)
    config, own = load_config(teacher.name), _generation_config(teacher.name)
    context, original = config.max_position_embeddings, Student(teacher, plan_of(config))
    by_depth = {student.plan.depth: student for student in (original, *students)}  # of one depth the later
    return Pairing(
        name=entry.name,
        teacher=teacher,
        students=tuple(by_depth[depth] for depth in sorted(by_depth, reverse=True)),
        tokenizer=load_tokenizer(teacher.name),
        context=context,
        samplings=tuple(Sampling.of_checkpoint(own, limits, context, chat) for chat in (False, True)),
        run=run,
        description=entry.description,
        examples=tuple(entry.examples),
    )


def _named(entry: ModelEntry) -> tuple[ModelSource, list[Student]]:
    """A teacher, and a student or a plan."""
    teacher = ModelSource(entry.teacher or EMBEDDED)
    config = load_config(teacher.name)
    if entry.plan is not None:
        plan = LayerPlan(entry.plan, plan_of(config).num_teacher_layers)
        return teacher, [Student(ModelSource(teacher.name, plan), plan)]
    student = load_config(str(entry.student))
    if student.vocab_size != config.vocab_size:
        raise LayerPruneError(
            f"{entry.student} has a vocabulary of {student.vocab_size} tokens and {teacher.name} one of "
            f"{config.vocab_size}; compare models with the same tokenizer"
        )
    return teacher, [Student(ModelSource(str(entry.student)), plan_of(student))]


def _of_run(entry: ModelEntry) -> tuple[ModelSource, list[Student], RunRecord]:
    """The teacher of a run, the student of every round that was kept or has a tag, and what the run measured."""
    run, kept = load_run(str(entry.run)), {}
    rounds = run.record.rounds
    if run.revision is not None:
        with hub_errors(f"looking at {run.name}"):
            tags = {ref.name: ref.target_commit for ref in HfApi().list_repo_refs(run.name).tags}
        kept = {one.number: f"{run.name}@{tags[tag]}" for one in rounds if (tag := depth_tag(one.depth)) in tags}
        kept[len(rounds)] = f"{run.name}@{run.revision}"
    elif (run.folder / "rounds").is_dir():
        for number in range(1, len(rounds) + 1):
            with suppress(LayerPruneError):  # it was deleted
                kept[number] = str(run.student(number))
    else:  # of `parallelize`, or a downloaded student
        kept[len(rounds)] = run.name
    if not kept:
        raise LayerPruneError(f"{entry.run} no longer holds any student")
    students = [Student(ModelSource(name), rounds[number - 1].plan, number) for number, name in kept.items()]
    return ModelSource(teacher_of(entry, run)), students, run.record


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


def _generation_config(name: str) -> GenerationConfig:
    """The checkpoint's, or an empty one where it has none."""
    if is_gguf(name):
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(resolve(name), revision=split_revision(name)[1] or "main")
    except (OSError, ValueError):
        return GenerationConfig()


class ModelStore:
    """The models of a demo in memory, each loaded once; the least recently used makes room for the next."""

    def __init__(self, max_models: int, dtype: str = "auto") -> None:
        self.max_models = max_models
        self.dtype = dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sizes: dict[ModelSource, tuple[int, str]] = {}  # parameters and dtype of every model that was loaded
        self.models: dict[ModelSource, PreTrainedModel] = {}  # in memory, the most recently used last
        self._lock = threading.RLock()

    def get(self, source: ModelSource) -> PreTrainedModel:
        """The model of a source on the device; errors name no folder."""
        with self._lock:
            model = self.models[source] = self.models.pop(source, None) or self._load(source)
            self.sizes[source] = model.num_parameters(), str(model.dtype).removeprefix("torch.")
            while len(self.models) > self.max_models:
                del self.models[next(iter(self.models))]
            return model

    def _load(self, source: ModelSource) -> PreTrainedModel:
        if source.plan is not None:  # of the teacher's layers, whose weights it shares
            return apply_plan(self.get(ModelSource(source.name)), source.plan, share_weights=True)
        try:
            model = load_model(source.name, self.dtype, self.device)
        except LayerPruneError as error:
            logger.warning("loading %s: %s", source.name, error)
            raise LayerPruneError(str(error).replace(source.name, Path(source.name).name)) from error
        return model.eval().to(self.device)
