"""Read the record of a run: `report.json` and `plan.json` as outside input, and the state of a run that resumes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .benchmark import BenchmarkReport
from .budget import BlockLatency
from .errors import LayerPruneError
from .evaluation import EvaluationReport
from .losses import perplexity_of
from .plan import MAX_JSON_CHARACTERS, MAX_LAYERS, Edit, LayerPlan
from .record import STATE_FILE, Done, Healing, RoundInProgress, RoundRecord, RunRecord, Speed, TeacherRecord
from .scoring import Scores
from .tasks import TaskReport, TaskResult

MAX_REPORT_BYTES = 64_000_000
LABEL = re.compile(r"\d{1,5}(\|\d{1,5})*")


def read_plan(path: str | Path, name: str | None = None) -> LayerPlan:
    """The plan in a JSON file, which an error calls `name`.

    Raises:
        [`LayerPruneError`]: if it cannot be read, is too large, or is not a valid plan.
    """
    try:
        return LayerPlan.from_json(_read_text(Path(path), MAX_JSON_CHARACTERS))
    except LayerPruneError as error:
        raise LayerPruneError(f"{name or path}: {error}") from None


def read_report(path: str | Path, name: str | None = None) -> RunRecord:
    """The run in a `report.json`, which an error calls `name`.

    Raises:
        [`LayerPruneError`]: if it cannot be read, is too large, or lacks what every report has.
    """
    try:
        return parse_report(json.loads(_read_text(Path(path), MAX_REPORT_BYTES)))
    except LayerPruneError as error:
        raise LayerPruneError(f"{name or path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise LayerPruneError(f"{name or path} is not JSON: {error}") from None


def parse_report(data: Any) -> RunRecord:
    """The run in the content of a `report.json`.

    Raises:
        [`LayerPruneError`]: if a part is missing or has the wrong type.
    """
    parts = {name: _mapping(_mapping(data, "the report").get(name), name) for name in ("settings", "environment")}
    phases = _mapping(data.get("seconds", {"phases": {}}), "seconds").get("phases")
    environment = {str(name): str(value) for name, value in parts["environment"].items()}
    if "hardware" not in environment:
        raise LayerPruneError('the report needs a text "hardware" in "environment"')
    return RunRecord(
        settings=dict(parts["settings"]),
        teacher=_teacher(data.get("teacher")),
        rounds=_rounds(data.get("rounds")),
        seconds={str(name): _number(phases, name, "seconds") for name in _mapping(phases, "seconds")},
        environment=environment,
    )


def read_state(folder: Path) -> RunRecord | None:
    """The run that [`RunRecord.save_state`] wrote into `folder`; `None` where there is none.

    Raises:
        [`LayerPruneError`]: if the file is damaged.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord(
            settings=data["settings"],
            teacher=None if data["teacher"] is None else _teacher(data["teacher"]),
            rounds=_rounds(data["rounds"]),
            current=None if data["current"] is None else _in_progress(data["current"]),
            order=_edits(data["order"], "the run"),
            latency=None if data["latency"] is None else BlockLatency(**data["latency"]),
            seconds=data.get("seconds", {"phases": {}})["phases"],
            environment=data["environment"],
            done=None if data["done"] is None else Done(**data["done"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # LayerPruneError is a ValueError
        raise LayerPruneError(f"{path} is damaged ({error}); move {folder} away and start again") from error


def _read_text(path: Path, limit: int) -> str:
    try:
        if (size := path.stat().st_size) > limit:
            raise LayerPruneError(f"the file has {size:,} bytes; at most {limit:,} are read")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LayerPruneError(f"the file is not text: {error}") from None
    except OSError as error:
        raise LayerPruneError(f"the file cannot be read: {error.strerror or error}") from None


def _teacher(data: Any) -> TeacherRecord:
    what = "the teacher"
    measured = _measured(data, what)
    plan = LayerPlan.from_dict(data["plan"]) if "plan" in data else LayerPlan.identity(data["num_layers"])
    return TeacherRecord(
        plan, **measured, name=_text(data, "name", what), evaluated_on=_text(data, "evaluated_on", what)
    )


def _rounds(data: Any) -> tuple[RoundRecord, ...]:
    if not isinstance(data, list):
        raise LayerPruneError(f'the report needs a list "rounds", not {data!r:.80}')
    return tuple(_round(record, number) for number, record in enumerate(data, 1))


def _round(data: Any, number: int) -> RoundRecord:
    what = f"round {number}"
    measured = _measured(data, what)
    if data.get("round") != number:
        raise LayerPruneError(f'rounds are numbered by "round" from 1; {what} has round={data.get("round")!r:.80}')
    plan = LayerPlan.from_dict(data.get("plan"))
    if plan.depth != data["num_layers"]:
        raise LayerPruneError(f"{what} has num_layers={data['num_layers']} but a plan of {plan.depth} blocks")
    healing, scores = None, data.get("all_scores", [])
    if data.get("train_tokens") is not None:
        healing = Healing(_number(data, "train_tokens", what), _number(data, "seconds_healing", what))
    if not isinstance(scores, list):
        raise LayerPruneError(f"{what} has all_scores={scores!r:.80}; they must be a list")
    return RoundRecord(
        plan,
        **measured,
        number=number,
        edits=_edits(data.get("edits"), what),
        criterion=_text(data, "criterion", what),
        scores=tuple(parse_scores(choice, what) for choice in scores),
        seconds_scoring=_number(data, "seconds_scoring", what) if "seconds_scoring" in data else 0.0,
        unhealed=_earlier(data, "unhealed", what),
        before_healing=_earlier(data, "before_healing", what),
        healing=healing,
        files={str(name): str(digest) for name, digest in _mapping(data.get("weights", {}), what).items()},
    )


def _in_progress(data: dict[str, Any]) -> RoundInProgress:
    what = "the round in progress"
    data |= {name: _edits(data[name], what) for name in ("edits", "order")}
    data["scores"] = tuple(parse_scores(choice, what) for choice in data["scores"])
    for name, kind in (("unhealed", EvaluationReport), ("before_healing", EvaluationReport), ("healing", Healing)):
        data[name] = None if data[name] is None else kind(**data[name])
    return RoundInProgress(**data)


def _measured(data: Any, what: str) -> dict[str, Any]:
    """The fields of a [`ModelRecord`] except its plan."""
    depth, architecture = _mapping(data, what).get("num_layers"), data.get("architecture", "Qwen2")
    if type(depth) is not int or not 1 <= depth <= MAX_LAYERS:
        raise LayerPruneError(f"{what} has num_layers={depth!r:.80}; it must be 1..{MAX_LAYERS}")
    if not re.fullmatch(r"\w{1,50}", str(architecture)):
        raise LayerPruneError(f"{what} has architecture={architecture!r:.80}; it must be a name")
    quality = {name: _number(data, name, what) for name in ("loss", "num_tokens")}
    perplexity = data.get("perplexity")
    if perplexity is None or perplexity == math.inf:  # of a loss so high that it is infinite
        quality["perplexity"] = perplexity_of(quality["loss"])
    else:
        quality["perplexity"] = _number(data, "perplexity", what)
    compared = ("kl", "agreement")
    quality |= {name: None if data.get(name) is None else _number(data, name, what) for name in compared}
    speed = None
    if data.get("decode_tokens_per_second") is not None:
        report = BenchmarkReport(**{each.name: _number(data, each.name, what) for each in fields(BenchmarkReport)})
        tokens = (_number(data, name, what) for name in ("prompt_tokens", "new_tokens"))
        speed = Speed(report, _text(data, "dtype", what), *tokens)
    return {
        "architecture": str(architecture),
        "num_parameters": _number(data, "num_parameters", what),
        "quality": EvaluationReport(**quality),
        "tasks": None if data.get("tasks") is None else _tasks(data["tasks"], what),
        "speed": speed,
    }


def _earlier(data: Mapping[str, Any], state: str, what: str) -> EvaluationReport | None:
    """The quality of a round's student in an earlier state, where the round was healed."""
    if f"loss_{state}" not in data:
        return None
    loss, perplexity, kl = (_or_nan(data, f"{name}_{state}", what) for name in ("loss", "perplexity", "kl"))
    return EvaluationReport(loss, perplexity, kl, None, data["num_tokens"])


def _tasks(data: Any, what: str) -> TaskReport:
    results = _mapping(_mapping(data, f"tasks of {what}").get("results"), f"tasks of {what}")
    try:
        report = TaskReport({str(name): TaskResult(**result) for name, result in results.items()})
    except TypeError as error:
        raise LayerPruneError(f"{what} has tasks that cannot be read: {error}") from None
    for result in report.results.values():
        for name in ("quality", "cost", "num_examples", "weight"):
            _number(vars(result), name, f"a task of {what}")
        _text(vars(result), "measure", f"a task of {what}")
    return report


def parse_scores(data: Any, what: str = "the report") -> Scores:
    """The scores of one choice; JSON has null for a cost that is not finite."""
    values = dict(_mapping(data, f"scores of {what}"))
    certainty = str(values.pop("certainty", ""))
    for name in ("values", "standard_errors", "left", "savings"):
        given = _mapping(values.get(name, {}), f"{name} of {what}")
        costs = (_or_nan(given, label, what) for label in given)
        values[name] = dict(zip(_edits(list(given), what), costs, strict=True))
    values["baseline"] = _or_nan(values, "baseline", what) if "baseline" in values else 0.0
    if values.get("margin") is None and certainty and len(values.get("contenders", ())) == 2:
        values["margin"] = math.inf if "is ahead of" in certainty else math.nan
    values["contenders"] = _edits(values.get("contenders", []), what)
    try:
        return Scores(**values)
    except TypeError as error:
        raise LayerPruneError(f"{what} has scores that cannot be read: {error}") from None


def _edits(value: Any, what: str) -> tuple[Edit, ...]:
    if not isinstance(value, list) or not all(isinstance(label, str) and LABEL.fullmatch(label) for label in value):
        raise LayerPruneError(f'{what} has edits={value!r:.80}; they must be labels such as "7" or "4|5"')
    return tuple(Edit.from_label(label) for label in value)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise LayerPruneError(f"the report needs an object for {what}, not {value!r:.80}")
    return value


def _text(data: Mapping[str, Any], name: str, what: str) -> str:
    if not isinstance(data.get(name), str):
        raise LayerPruneError(f"{what} needs a text {name!r}, not {data.get(name)!r:.80}")
    return data[name]


def _or_nan(data: Mapping[str, Any], name: str, what: str) -> float:
    """A number that need not be finite; a report has null for one that is not."""
    value = data.get(name)
    if value is None:
        return math.nan
    return value if isinstance(value, float) and not math.isfinite(value) else _number(data, name, what)


def _number(data: Mapping[str, Any], name: str, what: str) -> Any:
    value = data.get(name)
    if type(value) not in (int, float) or not abs(value) < 2**63:  # NaN is not below it
        raise LayerPruneError(f"{what} has {name}={value!r:.80}; it must be a finite number")
    return value
