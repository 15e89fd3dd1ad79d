"""The models a demo offers, resolved: an original, its students by depth, and what the run says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..errors import LayerPruneError, first_line
from ..hub import load_run
from ..hub.paths import hub_id
from ..hub.push import depth_tag
from ..hub.runs import hub_errors
from ..loading import EMBEDDED, load_config
from ..plan import LayerPlan
from ..surgery import plan_of
from .settings import DemoSettings, ModelEntry


@dataclass(frozen=True)
class ModelSource:
    """What is loaded: a folder or Hub id, and perhaps a plan that is then applied.

    Attributes:
        name (`str`): folder, Hub id or `"embedded"`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        plan ([`LayerPlan`], *optional*): rearranges the layers of the loaded model.
    """

    name: str
    revision: str | None = None
    plan: LayerPlan | None = None


def revision_of(source: ModelSource) -> dict[str, str]:
    """The revision as an option of what loads it; none if it has none, or its name says it."""
    return {"revision": source.revision} if source.revision else {}


@dataclass(frozen=True)
class Pairing:
    """An original and the students it is compared with.

    Attributes:
        name (`str`): what the visitor chooses by.
        teacher ([`ModelSource`]): the original.
        students (`dict[int, ModelSource]`): the compressed models by depth, deepest first.
        plans (`dict[int, LayerPlan]`): which layers of the original each holds.
        report (`dict`, *optional*): what the run measured, where there was one.
        description (`str`): a sentence about it.
        examples (`tuple[str, ...]`): prompts to click.
    """

    name: str
    teacher: ModelSource
    students: dict[int, ModelSource]
    plans: dict[int, LayerPlan]
    report: dict[str, Any] | None = None
    description: str = ""
    examples: tuple[str, ...] = ()

    @property
    def depths(self) -> list[int]:
        """Depths to choose from, deepest first."""
        return sorted(self.students, reverse=True)

    def depth(self, wanted: Any) -> int:
        """The depth that is nearest to a wanted one; the shallowest for none, and for 0.

        Raises:
            [`LayerPruneError`]: if it is no number.
        """
        if wanted in (None, 0):
            return self.depths[-1]
        if type(wanted) not in (int, float) or not -1e9 < wanted < 1e9:
            raise LayerPruneError(f"depth={wanted!r:.50} must be a number of layers")
        return min(self.depths, key=lambda depth: (abs(depth - wanted), depth))

    def rounds(self, depth: int) -> list[dict[str, Any]]:
        """The records of the rounds that led to a depth; empty without a report."""
        every = self.report["rounds"] if self.report else []
        last = max((n for n, record in enumerate(every, 1) if record["num_layers"] == depth), default=0)
        return every[:last]


class Catalog:
    """Everything a visitor can choose, and nothing else."""

    def __init__(self, pairings: list[Pairing]) -> None:
        self._pairings = {pairing.name: pairing for pairing in pairings}

    @property
    def names(self) -> list[str]:
        return list(self._pairings)

    @property
    def first(self) -> Pairing:
        return next(iter(self._pairings.values()))

    def __getitem__(self, name: Any) -> Pairing:
        """The pairing of a name; the first one for an empty name.

        Raises:
            [`LayerPruneError`]: if the list has no such name.
        """
        if name in ("", None):
            return self.first
        if not isinstance(name, str) or name not in self._pairings:
            raise LayerPruneError(f"model={name!r:.100} is not on the list; choose one of {', '.join(self.names)}")
        return self._pairings[name]


def open_catalog(
    settings: DemoSettings,
    on_message: Callable[[str], None] = lambda text: None,
    draw: Callable[[Pairing, int], object] = lambda pairing, depth: None,
) -> Catalog:
    """Resolve the list of a demo; of several entries one that cannot be opened or drawn is left out, and told.

    Args:
        settings ([`DemoSettings`]): the list.
        on_message (`Callable`, *optional*): told what is left out.
        draw (`Callable`, *optional*): draws a pairing at a depth, to see whether it can be.

    Raises:
        [`LayerPruneError`]: if none can be opened.
    """
    pairings, problems = [], []
    for entry in settings.models:
        try:
            pairings.append(_drawn(_open(entry), draw))
        except LayerPruneError as error:
            problems.append(f"{entry.name}: {error}")
    if not pairings:
        raise LayerPruneError("; ".join(problems))
    for problem in problems:
        on_message(f"left out: {problem}")
    return Catalog(pairings)


def _drawn(pairing: Pairing, draw: Callable[[Pairing, int], object]) -> Pairing:
    """The pairing, once all of it was drawn: a report may hold anything."""
    try:
        for depth in pairing.depths:
            draw(pairing, depth)
    except Exception as error:
        raise LayerPruneError(f"its report cannot be drawn: {first_line(error):.200}") from error
    return pairing


def _open(entry: ModelEntry) -> Pairing:
    if entry.run is not None and Path(entry.run).is_dir() and (Path(entry.run) / "rounds").is_dir():
        return _local_run(entry)
    if entry.run is not None:
        return _single_or_pushed(entry)
    teacher = ModelSource(entry.teacher or EMBEDDED)
    config = load_config(teacher.name)
    if entry.plan is not None:
        plan = LayerPlan(entry.plan, plan_of(config).num_teacher_layers)
        student = ModelSource(teacher.name, plan=plan)
    else:
        student = ModelSource(str(entry.student))
        other = load_config(student.name)
        if other.vocab_size != config.vocab_size:
            raise LayerPruneError(
                f"{student.name} has a vocabulary of {other.vocab_size} tokens and {teacher.name} one of "
                f"{config.vocab_size}; compare models with the same tokenizer"
            )
        plan = plan_of(other)
    return _pairing(entry, teacher, {plan.depth: student}, {plan.depth: plan}, None)


def _local_run(entry: ModelEntry) -> Pairing:
    """A run on this machine: the student of every round that was kept."""
    run = load_run(str(entry.run))
    students, plans = {}, {}
    for number in range(1, len(run.report["rounds"]) + 1):
        plan = run.plan_after(number)
        try:
            students[plan.depth] = ModelSource(str(run.student(number)))  # of two rounds with one depth the later
        except LayerPruneError:
            continue
        plans[plan.depth] = plan
    if not students:
        raise LayerPruneError(f"{entry.run} no longer holds any student")
    return _pairing(entry, _teacher(entry, run.report, run.settings), students, plans, run.report)


def _single_or_pushed(entry: ModelEntry) -> Pairing:
    """A student that was pushed, with the tags of its other depths, or one that was downloaded."""
    run = load_run(str(entry.run))
    students, plans = {run.plan.depth: ModelSource(run.name, run.revision)}, {run.plan.depth: run.plan}
    if run.revision is not None:
        with hub_errors(f"looking at {run.name}"):
            tags = {ref.name: ref.target_commit for ref in HfApi().list_repo_refs(run.name).tags}
        for record in run.report["rounds"]:
            plan, tag = LayerPlan.from_dict(record["plan"]), depth_tag(record["num_layers"])
            if tag in tags and plan.depth not in students:
                students[plan.depth], plans[plan.depth] = ModelSource(run.name, tags[tag]), plan
    settings = run.settings if run.revision is None else {}
    return _pairing(entry, _teacher(entry, run.report, settings), students, plans, run.report)


def _teacher(entry: ModelEntry, report: dict[str, Any], settings: dict[str, Any]) -> ModelSource:
    """The original: what the list says, else the run: its `settings` where it lies here, else its report.

    A report tells of a local model the name of its folder only, which elsewhere may be anything.
    """
    if entry.teacher:
        return ModelSource(entry.teacher)
    name = str(settings.get("teacher") or settings.get("model") or report["teacher"]["name"])
    if name == EMBEDDED or hub_id(name) is not None or settings and Path(name).is_absolute():
        return ModelSource(name)
    origin = f"{name}, which is no model on the Hub" if name else "what it does not say"
    raise LayerPruneError(f"{entry.run} was made from {origin}; name its original, as teacher")


def _pairing(
    entry: ModelEntry,
    teacher: ModelSource,
    students: dict[int, ModelSource],
    plans: dict[int, LayerPlan],
    report: dict[str, Any] | None,
) -> Pairing:
    ordered = dict(sorted(students.items(), reverse=True))
    return Pairing(entry.name, teacher, ordered, plans, report, entry.description, entry.examples)
