"""What a run writes down of its teacher and of every round: the entries of `report.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..benchmark import benchmark_models
from ..evaluation import EvaluationReport
from ..plan import LayerPlan
from ..surgery import plan_of, prune


def teacher_record(name: str, teacher: PreTrainedModel, report: EvaluationReport, evaluated_on: str) -> dict[str, Any]:
    """Size and quality of the teacher; of a local model only the folder's name is told, not where it lies."""
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "num_layers": teacher.config.num_hidden_layers,
        "num_parameters": teacher.num_parameters(),
        "loss": report.loss,
        "perplexity": report.perplexity,
        "num_tokens": report.num_tokens,
        "evaluated_on": evaluated_on,
    }


def round_record(
    number: int, student: PreTrainedModel, criterion: str, current: dict[str, Any], after: EvaluationReport
) -> dict[str, Any]:
    """One finished round; `current` is what [`RunState`] knew of it, `after` the healed student's quality."""
    before, unhealed = current["before_healing"], current["unhealed"]
    return {
        "round": number,
        "num_layers": student.config.num_hidden_layers,
        "removed_layer": current["removed_layers"][0],
        "removed_layers": current["removed_layers"],
        "criterion": criterion,
        "scores": current["scores"][0]["values"],
        "all_scores": current["scores"],
        "perplexity_unhealed": unhealed["perplexity"],
        "loss_unhealed": unhealed["loss"],
        "perplexity_before_healing": before["perplexity"],
        "loss_before_healing": before["loss"],
        "kl_before_healing": before["kl"],
        **after.to_dict(),
        "num_parameters": student.num_parameters(),
        "seconds_scoring": current["seconds_scoring"],
        "seconds_healing": current["seconds_healing"],
        "train_tokens": current["train_tokens"],
        "plan": plan_of(student).to_dict(),
    }


def add_speed(teacher: PreTrainedModel, teacher_entry: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    """Time every depth side by side and add it to the records. Speed depends on shapes only: no student is loaded."""
    kept = set(plan_of(teacher).layers)
    plans = [LayerPlan.from_dict(record["plan"]) for record in rounds]
    students = [prune(teacher, sorted(kept - set(plan.layers)), share_weights=True) for plan in plans]
    reports = benchmark_models([teacher, *students])
    for record, report in zip([teacher_entry, *rounds], reports, strict=True):
        record |= report.to_dict()
