"""The record of a run: what was done to the teacher, what it cost and what is left of its quality.

A [`RunRecord`] is the only form in which a run passes between modules. The trainer extends it, `report.json` and
`run_state.json` hold it, and the report, the model card, the Hub and the demo read it. Records are frozen, and checked
once, when they are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import PreTrainedModel

from .architectures import architecture_of
from .benchmark import BenchmarkReport
from .budget import BlockCosts
from .errors import LayerPruneError
from .evaluation import EvaluationReport
from .plan import Edit, LayerPlan
from .scoring import Scores
from .surgery import plan_of
from .tasks import TaskReport

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_WHOLE = 2**63
LABEL = re.compile(r"\d{1,5}((\|\d{1,5})*|(\+\d{1,5})*)")
WANTED = {int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "an object"}

PLAN_FILE, REPORT_FILE, STATE_FILE = "plan.json", "report.json", "run_state.json"


@dataclass(frozen=True)
class Speed:
    """The speed of a model, and what was generated to measure it."""

    report: BenchmarkReport  # ratios are to the teacher
    dtype: str  # of the weights, such as "bfloat16"
    prompt_tokens: int
    new_tokens: int  # generated after the prompt

    def __str__(self) -> str:
        return (
            f"weights in {self.dtype}, a prompt of {self.prompt_tokens} tokens and {self.new_tokens} new ones, batch "
            f"{self.report.batch_size}"
        )


@dataclass(frozen=True)
class ModelRecord:
    """A model as it was measured: the teacher, or the student of a round."""

    plan: LayerPlan  # the teacher's layers it holds
    architecture: str  # its family, such as "Qwen2"
    num_parameters: int  # a tied head counts once
    quality: EvaluationReport  # on the evaluation data; a student's after healing
    tasks: TaskReport | None = None  # on the tasks that choose layers, where tasks do
    speed: Speed | None = None  # measured at the end of a run

    @classmethod
    def of(cls, model: PreTrainedModel, quality: EvaluationReport, **details: Any) -> Self:
        """Make the record of a model that was measured."""
        architecture = architecture_of(model.config).name
        return cls(plan_of(model), architecture, model.num_parameters(), quality, **details)

    @property
    def depth(self) -> int:
        return self.plan.depth


@dataclass(frozen=True)
class TeacherRecord(ModelRecord):
    """The teacher."""

    name: str = "model"  # Hub id, or the name of a local folder without its path
    evaluated_on: str = "evaluation data"  # or "calibration data" where no other was given


@dataclass(frozen=True)
class Healing:
    """What a healing took."""

    num_tokens: int  # that the student was trained on
    seconds: float
    on_policy: bool = False  # on the student's own answers, see `heal_on_policy`


@dataclass(frozen=True, kw_only=True)
class RoundWork:
    """What a round does, as far as it has come."""

    edits: tuple[Edit, ...] = ()  # in the order in which they were made
    scores: tuple[Scores[Edit], ...] = ()  # what every possible edit cost, for each choice that was scored
    seconds_scoring: float = 0.0  # wall time of the choices
    unhealed: EvaluationReport | None = None  # the teacher after all edits of the run, without any training
    before_healing: EvaluationReport | None = None  # the student after this round's edits
    healing: Healing | None = None  # `None` for a round without healing


@dataclass(frozen=True)
class RoundRecord(ModelRecord, RoundWork):
    """One finished round: its student, and what it did."""

    number: int = 1
    criterion: str = ""  # what chose the edits

    @property
    def is_on_policy(self) -> bool:
        """Whether it made no edit, but healed the student on its own answers."""
        return self.healing is not None and self.healing.on_policy


@dataclass(frozen=True)
class RoundInProgress(RoundWork):
    """The round that a run is in; what of it is known is not computed again after a resume."""

    wanted: int  # edits that it is to make
    # it chooses edits; they are made and measured; the student is healed and saved
    phase: Literal["choosing", "edited", "healed"] = "choosing"
    checkpoint: int | None = None  # step of the last whole checkpoint of its healing


@dataclass(frozen=True)
class RunRecord:
    """A run, finished or not."""

    settings: dict[str, Any] = field(default_factory=dict)  # those that decide the result, as JSON values
    teacher: TeacherRecord | None = None  # `None` until it is measured
    rounds: tuple[RoundRecord, ...] = ()  # the finished ones
    current: RoundInProgress | None = None  # the one after them, once it has begun
    # chosen by one scoring, in the order they are made: all of the run if it scores once, or the current round's
    order: tuple[Edit, ...] = ()
    latency: BlockCosts | None = None  # what a block costs in time, where the target is a latency
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase, over all sessions of the run
    environment: dict[str, str] = field(default_factory=dict)  # hardware and versions it was measured with
    tags: tuple[str, ...] = ()  # of a model on the Hub: `hf_jobs`, `trackio` and `trackio:URL`
    verb: Literal["compress", "parallelize"] = "compress"  # what made it; a run of `parallelize` cannot resume

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
        plan = self.settings.get("plan")  # of `parallelize` the name of a file
        return LayerPlan.from_dict(plan) if isinstance(plan, Mapping) else self.teacher.plan

    def until(self, number: int) -> RunRecord:
        """The run as it was after round `number`."""
        if not 1 <= number <= len(self.rounds):
            raise LayerPruneError(f"round={number} but the run has rounds 1..{len(self.rounds)}; choose one of them")
        return replace(self, rounds=self.rounds[:number], current=None)

    def with_round(self, record: RoundRecord) -> RunRecord:
        """The run after another round."""
        return replace(self, rounds=(*self.rounds, record), current=None)

    def to_json(self) -> str:
        """The content of `report.json` and `run_state.json`."""
        return json.dumps(_to_json_value(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; treats it as outside input."""
        return from_json_value(cls, json.loads(text), "the run")


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """The run in a `report.json` or `run_state.json`, which an error calls `name`."""
    return _read(path, name or str(path), RunRecord.from_json)


def read_state(folder: Path) -> RunRecord | None:
    """The run that `folder` holds, from which it resumes; `None` where there is none."""
    path = folder / STATE_FILE
    try:
        return read_run(path, f"{path} is damaged") if path.is_file() else None
    except LayerPruneError as error:
        raise LayerPruneError(f"{error}; move {folder} away and start again") from None


def read_plan(path: str | Path) -> LayerPlan:
    """The plan in a JSON file."""
    return _read(Path(path), str(path), LayerPlan.from_json)


def _read(path: Path, name: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LayerPruneError(f"{name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not text, not JSON, or a LayerPruneError
        raise LayerPruneError(f"{name}: {error}") from None


def _to_json_value(value: Any) -> Any:
    """Turn a value into what JSON has: an edit into its label, a float that is not finite into text."""
    if isinstance(value, LayerPlan):
        return value.to_dict()
    if isinstance(value, Edit):
        return value.label
    if is_dataclass(value):
        return {each.name: _to_json_value(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {_to_json_value(key): _to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json_value(kind: Any, data: Any, name: str) -> Any:
    """Turn what [`_to_json_value`] made back into a value of type `kind`; errors call it `name`.

    Fields with defaults may be missing, and entries that are not fields are ignored.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return data
    if origin in (Union, UnionType):  # X | None
        return None if data is None else from_json_value(arguments[0], data, name)
    if origin is Literal:
        return data if data in arguments else _refuse(name, data, f"one of {', '.join(arguments)}")
    if origin is LayerPlan:
        return LayerPlan.from_dict(data)
    if origin is Edit:
        is_label = isinstance(data, str) and LABEL.fullmatch(data)
        return Edit.from_label(data) if is_label else _refuse(name, data, 'a label such as "7", "4|5" or "4+5"')
    if is_dataclass(origin):
        return _dataclass(kind, _checked(dict, data, name), name)
    if origin is tuple:
        return tuple(from_json_value(arguments[0], item, name) for item in _checked(list, data, name))
    if origin is dict:
        items, (key_kind, item_kind) = _checked(dict, data, name).items(), arguments
        return {
            from_json_value(key_kind, key, name): from_json_value(item_kind, item, f"{name}.{key}")
            for key, item in items
        }
    if origin is float and (data in ("nan", "inf", "-inf") or type(data) is int):
        return float(_checked(int, data, name)) if type(data) is int else float(data)
    return _checked(origin, data, name)


def _dataclass(kind: Any, data: dict[str, Any], name: str) -> Any:
    origin, given = get_origin(kind) or kind, {}
    hints = get_type_hints(origin)
    for each in fields(origin):
        if each.name in data:
            hint = hints[each.name]
            hint = hint[get_args(kind)] if getattr(hint, "__parameters__", ()) else hint  # `Key` of `Scores[Edit]`
            given[each.name] = from_json_value(hint, data[each.name], f"{name}.{each.name}")
        elif each.default is MISSING and each.default_factory is MISSING:
            raise LayerPruneError(f"{name} lacks {each.name}")
    return origin(**given)


def _checked(kind: type, data: Any, name: str) -> Any:
    if type(data) is not kind or (kind is int and abs(data) >= MAX_WHOLE):
        _refuse(name, data, WANTED[kind])
    return data


def _refuse(name: str, data: Any, wanted: str) -> NoReturn:
    raise LayerPruneError(f"{name}={data!r:.80} must be {wanted}")
