"""Read what a run wrote: plan and report, from a folder or the Hub, as outside input."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import LayerPruneError
from ..plan import MAX_JSON_CHARACTERS, MAX_LAYERS, LayerPlan

PLAN_FILE, REPORT_FILE = "plan.json", "report.json"
SIZE_LIMITS = {PLAN_FILE: MAX_JSON_CHARACTERS, REPORT_FILE: 64_000_000}
"""Bytes of a file that are read at most."""
MEASURES = ("num_parameters", "loss", "perplexity")
ROUND_MEASURES = (*MEASURES, "kl", "agreement")
OPTIONAL_MEASURES = (
    "loss_unhealed", "perplexity_unhealed", "kl_unhealed", "loss_before_healing", "perplexity_before_healing",
    "kl_before_healing", "prefill_tokens_per_second", "prefill_ratio", "decode_tokens_per_second", "decode_ratio",
    "time_to_first_token", "peak_memory_bytes", "kv_bytes_per_token", "batch_size", "prompt_tokens", "new_tokens",
)  # fmt: skip
LABEL = re.compile(r"\d{1,5}(\|\d{1,5})*")


def read_plan(path: str | Path, name: str | None = None) -> LayerPlan:
    """The plan in a JSON file, which an error calls `name`.

    Raises:
        [`LayerPruneError`]: if it cannot be read, is too large, or is not a valid plan.
    """
    try:
        return LayerPlan.from_json(_read_text(Path(path), SIZE_LIMITS[PLAN_FILE]))
    except LayerPruneError as error:
        raise LayerPruneError(f"{name or path}: {error}") from None


def read_report(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """The report in a JSON file, which an error calls `name`.

    Raises:
        [`LayerPruneError`]: if it cannot be read, is too large, or lacks what every report has.
    """
    try:
        report = json.loads(_read_text(Path(path), SIZE_LIMITS[REPORT_FILE]))
        check_report(report)
    except LayerPruneError as error:
        raise LayerPruneError(f"{name or path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise LayerPruneError(f"{name or path} is not JSON: {error}") from None
    return report


def check_report(report: Any) -> None:
    """Raise [`LayerPruneError`] unless `report` has the parts of a report, of the right types."""
    if not isinstance(report, dict) or not isinstance(report.get("rounds"), list):
        raise LayerPruneError('a report is an object with a list "rounds"')
    if any(not isinstance(report.get(part), dict) for part in ("teacher", "settings", "environment")):
        raise LayerPruneError('a report needs the objects "teacher", "settings" and "environment"')
    _check_record(report["teacher"], "the teacher", (*MEASURES, "num_tokens"))
    for part, name in (("teacher", "name"), ("teacher", "evaluated_on"), ("environment", "hardware")):
        if not isinstance(report[part].get(name), str):
            raise LayerPruneError(f"a report's {part} needs a text {name!r}, not {report[part].get(name)!r:.200}")
    for number, record in enumerate(report["rounds"], 1):
        what = f"round {number}"
        if not isinstance(record, dict) or record.get("round") != number:
            raise LayerPruneError(f'a report\'s rounds are objects numbered by "round" from 1; {what} is not')
        _check_record(record, what, ROUND_MEASURES)
        if not isinstance(record.get("criterion"), str):
            raise LayerPruneError(f"{what} has criterion={record.get('criterion')!r:.200}, which is no text")
        labels = record.get("edits")
        if not isinstance(labels, list) or any(not _is_label(label) for label in labels):
            raise LayerPruneError(f'{what} has edits={labels!r:.200}; they are labels such as "7" or "4|5"')
        plan = LayerPlan.from_dict(record.get("plan"))
        if plan.depth != record["num_layers"]:
            raise LayerPruneError(f"{what} has num_layers={record['num_layers']} but a plan of {plan.depth} blocks")
        _check_scores(record, what)


def _check_record(record: dict[str, Any], what: str, measures: tuple[str, ...]) -> None:
    if type(record.get("num_layers")) is not int or not 1 <= record["num_layers"] <= MAX_LAYERS:
        raise LayerPruneError(f"{what} has num_layers={record.get('num_layers')!r:.200}, which is no depth")
    if not re.fullmatch(r"\w{1,50}", str(record.get("architecture", "Qwen2"))):
        raise LayerPruneError(f"{what} has architecture={record['architecture']!r:.200}, which is no name")
    for name in (*measures, *(name for name in OPTIONAL_MEASURES if record.get(name) is not None)):
        if not _is_number(record.get(name)):
            raise LayerPruneError(f"{what} has {name}={record.get(name)!r:.200}, which is no number")


def _check_scores(record: dict[str, Any], what: str) -> None:
    """Scores are labels to numbers, or to null where one was none."""
    every = record.get("all_scores", [])
    if not isinstance(every, list) or not all(isinstance(scores, dict) for scores in every):
        raise LayerPruneError(f"{what} has all_scores that are no list of objects")
    for scores in (record.get("scores"), *(scores.get("values") for scores in every)):
        if not isinstance(scores, dict) or any(
            not _is_label(label) or not (cost is None or _is_number(cost)) for label, cost in scores.items()
        ):
            raise LayerPruneError(f"{what} has scores={scores!r:.200}; they are labels and numbers")


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and LABEL.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63 or type(value) is float and math.isfinite(value)


def _read_text(path: Path, limit: int) -> str:
    try:
        if (size := path.stat().st_size) > limit:
            raise LayerPruneError(f"the file has {size:,} bytes; at most {limit:,} are read")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LayerPruneError(f"the file is no text: {error}") from None
    except OSError as error:
        raise LayerPruneError(f"the file cannot be read: {error.strerror or error}") from None
