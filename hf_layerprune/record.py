"""The record of a run: what was done to the teacher, what it cost and what is left of its quality.

A [`RunRecord`] is the only form in which a run passes between modules. The trainer extends it, `report.json` and
`run_state.json` hold it, and the report, the model card, the Hub and the demo read it. Records are frozen;
`record_reader.py` checks JSON once, when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel

from .architectures import architecture_of
from .benchmark import BenchmarkReport
from .budget import BlockCosts
from .evaluation import EvaluationReport
from .files import write_atomically
from .plan import Edit, LayerPlan
from .scoring import Scores
from .surgery import plan_of
from .tasks import TaskReport

if TYPE_CHECKING:
    from typing_extensions import Self

PLAN_FILE, REPORT_FILE, STATE_FILE = "plan.json", "report.json", "run_state.json"
Phase = Literal["choosing", "edited", "healed"]
"""How far a round has come: it chooses edits; they are made and measured; the student is healed and saved."""


@dataclass(frozen=True)
class Speed:
    """
    Attributes:
        report ([`BenchmarkReport`]): the measured speed; ratios are to the teacher.
        dtype (`str`): dtype of the weights, such as `"bfloat16"`.
        prompt_tokens (`int`): length of the prompt.
        new_tokens (`int`): tokens generated after it.
    """

    report: BenchmarkReport
    dtype: str
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return (
            f"weights in {self.dtype}, a prompt of {self.prompt_tokens} tokens and {self.new_tokens} new ones, batch "
            f"{self.report.batch_size}"
        )


@dataclass(frozen=True)
class ModelRecord:
    """A model as it was measured: the teacher, or the student of a round.

    Attributes:
        plan ([`LayerPlan`]): the teacher's layers it holds.
        architecture (`str`): its family, such as `"Qwen2"`.
        num_parameters (`int`): a tied head counts once.
        quality ([`EvaluationReport`]): on the evaluation data; a student's after healing.
        tasks ([`TaskReport`], *optional*): on the tasks that choose layers, where tasks do.
        speed ([`Speed`], *optional*): measured at the end of a run.
    """

    plan: LayerPlan
    architecture: str
    num_parameters: int
    quality: EvaluationReport
    tasks: TaskReport | None = None
    speed: Speed | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, quality: EvaluationReport, **details: Any) -> Self:
        """The record of a model that was measured."""
        architecture = architecture_of(model.config).name
        return cls(plan_of(model), architecture, model.num_parameters(), quality, **details)

    @property
    def depth(self) -> int:
        return self.plan.depth

    def to_dict(self) -> dict[str, Any]:
        data = {"architecture": self.architecture, "num_layers": self.depth, "num_parameters": self.num_parameters}
        data |= {name: value for name, value in self.quality.to_dict().items() if value is not None}
        data |= {} if self.tasks is None else {"tasks": self.tasks.to_dict()}
        if self.speed is not None:
            data |= self.speed.report.to_dict()
            data |= {name: value for name, value in vars(self.speed).items() if name != "report"}
        return data


@dataclass(frozen=True)
class TeacherRecord(ModelRecord):
    """The teacher.

    Attributes:
        name (`str`): Hub id, or the name of a local folder without its path.
        evaluated_on (`str`): `"evaluation data"`, or `"calibration data"` where no other was given.
    """

    name: str = "model"
    evaluated_on: str = "evaluation data"

    def to_dict(self) -> dict[str, Any]:
        data = {"name": self.name} | super().to_dict() | {"evaluated_on": self.evaluated_on}
        is_whole = self.depth == self.plan.num_teacher_layers == len(self.plan.layers)
        return data if is_whole else data | {"plan": self.plan.to_dict()}


@dataclass(frozen=True)
class Healing:
    """
    Attributes:
        num_tokens (`int`): tokens that the student was trained on.
        seconds (`float`): wall time.
    """

    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class RoundRecord(ModelRecord):
    """One finished round.

    Attributes:
        number (`int`): from 1.
        edits (`tuple[Edit, ...]`): the edits that the round made, in order.
        criterion (`str`): what chose them.
        scores (`tuple[Scores[Edit], ...]`): what every possible edit cost, for each choice that was scored.
        seconds_scoring (`float`): wall time of the choice.
        unhealed ([`EvaluationReport`], *optional*): the teacher after all edits of the run, without any training.
        before_healing ([`EvaluationReport`], *optional*): the student after this round's edits.
        healing ([`Healing`], *optional*): `None` for a round without healing.
        files (`dict[str, str]`): SHA-256 of each file of the saved student.
    """

    number: int = 1
    edits: tuple[Edit, ...] = ()
    criterion: str = ""
    scores: tuple[Scores[Edit], ...] = ()
    seconds_scoring: float = 0.0
    unhealed: EvaluationReport | None = None
    before_healing: EvaluationReport | None = None
    healing: Healing | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def removed_layers(self) -> list[int]:
        """Teacher layers that the round removed, in the order of the edits."""
        return [edit.layers[0] for edit in self.edits if edit.kind == "remove"]

    def to_dict(self) -> dict[str, Any]:
        scores = [scores.to_dict() for scores in self.scores]
        data = {
            "round": self.number,
            "edits": [edit.label for edit in self.edits],
            "removed_layer": next(iter(self.removed_layers), None),
            "removed_layers": self.removed_layers,
            "criterion": self.criterion,
            "scores": scores[0]["values"] if scores else {},
            "all_scores": scores,
            **super().to_dict(),
            "plan": self.plan.to_dict(),
            "seconds_scoring": self.seconds_scoring,
            "weights": self.files,
        }
        for state in ("unhealed", "before_healing"):
            report: EvaluationReport | None = getattr(self, state)
            data |= (
                {}
                if report is None
                else {f"{key}_{state}": getattr(report, key) for key in ("perplexity", "loss", "kl")}
            )
        if self.healing is not None:
            data |= {"seconds_healing": self.healing.seconds, "train_tokens": self.healing.num_tokens}
        return data


@dataclass(frozen=True)
class RoundInProgress:
    """The round that a run is in; what of it is known is not computed again after a resume.

    Attributes:
        wanted (`int`): edits that the round is to make.
        phase (`str`): how far it has come; see [`Phase`].
        edits, scores, seconds_scoring, unhealed, before_healing, healing, files: as in [`RoundRecord`].
        order (`tuple[Edit, ...]`): edits in the order they are made, where one scoring chooses all of the round.
    """

    wanted: int
    phase: Phase = "choosing"
    edits: tuple[Edit, ...] = ()
    scores: tuple[Scores[Edit], ...] = ()
    seconds_scoring: float = 0.0
    order: tuple[Edit, ...] = ()
    unhealed: EvaluationReport | None = None
    before_healing: EvaluationReport | None = None
    healing: Healing | None = None
    files: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        by_label = {name: [edit.label for edit in getattr(self, name)] for name in ("edits", "order")}
        records = {name: getattr(self, name) for name in ("unhealed", "before_healing", "healing")}
        return (
            vars(self)
            | by_label
            | {name: None if record is None else asdict(record) for name, record in records.items()}
            | {"scores": [scores.to_dict() for scores in self.scores]}
        )


@dataclass(frozen=True)
class Done:
    """What a run finished last.

    Attributes:
        phase (`str`): such as `"choosing"`, `"checkpoint"` or `"round"`.
        round (`int`): the round it was in; 0 before the first.
        step (`int`, *optional*): the step of a checkpoint.
    """

    phase: str
    round: int = 0
    step: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run, finished or not.

    Attributes:
        settings (`dict[str, Any]`): the settings that decide the result, as JSON values.
        teacher ([`TeacherRecord`], *optional*): `None` until it is measured.
        rounds (`tuple[RoundRecord, ...]`): the finished rounds.
        current ([`RoundInProgress`], *optional*): the round after them, once it has begun.
        order (`tuple[Edit, ...]`): for a run that scores once, its edits in the order they are made.
        latency ([`BlockCosts`], *optional*): what a block costs in time, where the target is a latency.
        seconds (`dict[str, float]`): wall time of each phase, over all sessions of the run.
        environment (`dict[str, str]`): hardware and versions that the numbers were measured with.
        done ([`Done`], *optional*): what was finished last.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherRecord | None = None
    rounds: tuple[RoundRecord, ...] = ()
    current: RoundInProgress | None = None
    order: tuple[Edit, ...] = ()
    latency: BlockCosts | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    done: Done | None = None

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All edits of the finished rounds, in order."""
        return tuple(edit for record in self.rounds for edit in record.edits)

    @property
    def is_healed(self) -> bool:
        """Whether any student was trained."""
        return any(record.healing is not None for record in self.rounds)

    @property
    def start(self) -> LayerPlan:
        """The plan of the model that the run started from, which may be a student already."""
        plan = self.settings.get("plan")
        return LayerPlan.from_dict(plan) if isinstance(plan, Mapping) else self.teacher.plan

    @property
    def weighed_by(self) -> str:
        """What the cost of an edit is divided by: `"time"`, `"parameters"`, or empty for layers."""
        if self.settings.get("target_latency") or self.settings.get("target") == "latency":
            return "time"
        if self.settings.get("target_num_parameters") or self.settings.get("target") == "parameters":
            return "parameters"
        return ""

    @property
    def cost_unit(self) -> str:
        """The unit of the costs of edits, where they have one."""
        return "nats per token" if self.rounds[-1].criterion in ("kl", "loss") and not self.weighed_by else ""

    def until(self, number: int) -> RunRecord:
        """The run as it was after round `number`."""
        return replace(self, rounds=self.rounds[:number], current=None)

    def with_round(self, record: RoundRecord) -> RunRecord:
        """The run after another round."""
        return replace(self, rounds=(*self.rounds, record), current=None)

    def last_costs(self) -> dict[Edit, float]:
        """What each edit cost when it was measured last; for one that was made, that is when it was chosen."""
        every = (scores.values for record in self.rounds for scores in record.scores)
        return {edit: cost for values in every for edit, cost in values.items() if math.isfinite(cost)}

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`."""
        seconds = {"total": sum(self.seconds.values()), "phases": self.seconds}
        return {
            "teacher": None if self.teacher is None else self.teacher.to_dict(),
            "rounds": [record.to_dict() for record in self.rounds],
            "settings": self.settings,
            "environment": self.environment,
        } | ({"seconds": seconds} if self.seconds else {})

    def save_state(self, folder: Path) -> None:
        """Write `run_state.json`, from which a run resumes."""
        state = self.to_dict() | {
            "current": None if self.current is None else self.current.to_dict(),
            "order": [edit.label for edit in self.order],
            "latency": None if self.latency is None else asdict(self.latency),
            "done": None if self.done is None else asdict(self.done),
        }
        write_atomically(folder / STATE_FILE, json.dumps(state, indent=1))  # NaN and infinity stay
