"""The models that a demo offers: a teacher, its students by depth, and what their run measured.

The one module of the demo that reads the report of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from matplotlib.figure import Figure
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..errors import LayerPruneError
from ..hub import load_run
from ..hub.paths import hub_id
from ..hub.push import depth_tag
from ..hub.runs import hub_errors
from ..loading import EMBEDDED, is_gguf, load_config, load_tokenizer, resolve, split_revision
from ..plan import LayerPlan
from ..plots import layer_map_text, plot_layer_map, plot_quality
from ..record import RunRecord
from ..surgery import plan_of
from .generation import Sampling
from .settings import DemoSettings, Limits, ModelEntry
from .store import ModelSource


@dataclass(frozen=True)
class Student:
    """A compressed model.

    Attributes:
        source ([`ModelSource`]): where it is loaded from.
        plan ([`LayerPlan`]): the teacher's layers in it.
        round (`int`): the round that made it, from 1; 0 without a run.
    """

    source: ModelSource
    plan: LayerPlan
    round: int = 0


@dataclass(frozen=True)
class Pairing:
    """A teacher and the students that it is compared with.

    Attributes:
        name (`str`): what the visitor chooses by.
        teacher ([`ModelSource`]): the original.
        students (`tuple[Student, ...]`): the compressed models, deepest first.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of all of them.
        context (`int`): positions that a prompt and its answer share.
        sampling ([`Sampling`]): as the teacher's checkpoint says.
        run ([`RunRecord`], *optional*): what the run measured.
        description (`str`): a sentence about it.
        examples (`tuple[str, ...]`): prompts to click.
    """

    name: str
    teacher: ModelSource
    students: tuple[Student, ...]
    tokenizer: PreTrainedTokenizerBase
    context: int
    sampling: Sampling
    run: RunRecord | None = None
    description: str = ""
    examples: tuple[str, ...] = ()

    @property
    def can_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def depths(self) -> list[int]:
        """Depths to choose from, deepest first."""
        return [student.plan.depth for student in self.students]

    def student(self, depth: Any = None) -> Student:
        """The student with the nearest depth; the shallowest for `None` and 0.

        Raises:
            [`LayerPruneError`]: if `depth` is not a number.
        """
        if depth in (None, 0):
            return self.students[-1]
        if type(depth) not in (int, float):  # not `isinstance`: True is an int
            raise LayerPruneError(f"depth={depth!r:.50} must be a number of layers")
        return min(self.students, key=lambda student: (abs(student.plan.depth - depth), student.plan.depth))

    def about_layers(self, depth: int) -> str:
        """What became of the teacher's layers, in Markdown."""
        plan = self.student(depth).plan
        return (
            f"{plan.num_teacher_layers} layers became {plan.depth}. A dot is a removed layer; brackets hold layers "
            f"that run in parallel, as one.\n\n```text\n{layer_map_text(plan)}\n```"
        )

    def layer_map(self, depth: int) -> Figure | None:
        """What each edit cost in the rounds up to a depth; `None` without a run."""
        return self.run and plot_layer_map(self.run.until(self.student(depth).round))

    def quality(self) -> Figure | None:
        """Perplexity against depth; `None` without a run."""
        return self.run and plot_quality(self.run)


def open_catalog(settings: DemoSettings, on_message: Callable[[str], None] = lambda text: None) -> dict[str, Pairing]:
    """Open every entry of a list; those that cannot be opened are left out.

    Args:
        settings ([`DemoSettings`]): the list.
        on_message (`Callable`, *optional*): called with what is left out, and why.

    Returns:
        `dict[str, Pairing]`: everything that a visitor can choose, by name.

    Raises:
        [`LayerPruneError`]: if none can be opened.
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
    if entry.run is None:
        teacher, students, run = *_named(entry), None
    elif (Path(entry.run) / "rounds").is_dir():
        teacher, students, run = _run_here(entry, entry.run)
    else:
        teacher, students, run = _pushed_run(entry, entry.run)
    by_depth = {student.plan.depth: student for student in students}  # of two with the same depth the later
    config = load_config(teacher.name, **teacher.options)
    return Pairing(
        name=entry.name,
        teacher=teacher,
        students=tuple(by_depth[depth] for depth in sorted(by_depth, reverse=True)),
        tokenizer=load_tokenizer(teacher.name, **teacher.options),
        context=config.max_position_embeddings,
        sampling=Sampling.of_checkpoint(_generation_config(teacher.name), limits, config.max_position_embeddings),
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
        return teacher, [Student(ModelSource(teacher.name, plan=plan), plan)]
    student = load_config(str(entry.student))
    if student.vocab_size != config.vocab_size:
        raise LayerPruneError(
            f"{entry.student} has a vocabulary of {student.vocab_size} tokens and {teacher.name} one of "
            f"{config.vocab_size}; compare models with the same tokenizer"
        )
    return teacher, [Student(ModelSource(str(entry.student)), plan_of(student))]


def _run_here(entry: ModelEntry, folder: str) -> tuple[ModelSource, list[Student], RunRecord]:
    """A run on this machine: the student of every round that was kept."""
    run, students = load_run(folder), []
    for number in range(1, len(run.record.rounds) + 1):
        try:
            students.append(Student(ModelSource(str(run.student(number))), run.record.rounds[number - 1].plan, number))
        except LayerPruneError:  # it was deleted
            continue
    if not students:
        raise LayerPruneError(f"{folder} no longer holds any student")
    return _teacher(entry, run.record, run.settings), students, run.record


def _pushed_run(entry: ModelEntry, name: str) -> tuple[ModelSource, list[Student], RunRecord]:
    """A pushed student with the tags of its other depths, or a downloaded one."""
    run = load_run(name)
    rounds, students = run.record.rounds, []
    if run.revision is not None:
        with hub_errors(f"looking at {run.name}"):
            tags = {ref.name: ref.target_commit for ref in HfApi().list_repo_refs(run.name).tags}
        for record in rounds:
            if (commit := tags.get(depth_tag(record.depth))) is not None:
                students.append(Student(ModelSource(run.name, commit), record.plan, record.number))
    students.append(Student(ModelSource(run.name, run.revision), run.plan, len(rounds)))
    return _teacher(entry, run.record, run.settings), students, run.record


def _teacher(entry: ModelEntry, run: RunRecord, settings: dict[str, Any]) -> ModelSource:
    """The teacher in the list, or else in the run: in its settings if it is on this machine, else in its report.

    Of a local model a report holds the name of its folder only, which elsewhere may be anything.
    """
    name = str(entry.teacher or settings.get("teacher") or settings.get("model") or run.teacher.name)
    if not entry.teacher and name != EMBEDDED and hub_id(name) is None and not (settings and Path(name).is_absolute()):
        raise LayerPruneError(
            f"{entry.run} was made from {name!r}, which is not a model on the Hub; name its original, as teacher"
        )
    return ModelSource(name)


def pushed_run(name: str, token: str | bool | None = None) -> tuple[str, LayerPlan]:
    """The name of a pushed run's teacher, and the plan of its student.

    Raises:
        [`LayerPruneError`]: if the Hub has no such run.
    """
    run = load_run(name, token=token)
    return run.record.teacher.name, run.plan


def _generation_config(name: str) -> GenerationConfig:
    """The checkpoint's, or an empty one where it has none."""
    if is_gguf(name):
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(resolve(name), revision=split_revision(name)[1] or "main")
    except (OSError, ValueError):
        return GenerationConfig()
