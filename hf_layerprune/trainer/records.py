"""What a run writes down of its teacher and of every round: the entries of `report.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import architecture_of
from ..benchmark import benchmark_models, num_runs
from ..edits import Edit
from ..environment import native_dtype
from ..evaluation import EvaluationReport
from ..hub.paths import without_local_paths
from ..plan import LayerPlan
from ..surgery import apply_plan, plan_of, prune
from ..tasks import PreparedTask
from ..tasks.evaluation import evaluate_prepared

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 5
"""How much text speed is measured on, and how often."""


def teacher_record(name: str, teacher: PreTrainedModel, report: EvaluationReport, evaluated_on: str) -> dict[str, Any]:
    """Size and quality of the teacher; of a local one the folder's name is told, not where it lies."""
    return {
        "name": without_local_paths(name),
        "architecture": architecture_of(teacher.config).name,
        "num_layers": teacher.config.num_hidden_layers,
        "num_parameters": teacher.num_parameters(),
        "loss": report.loss,
        "perplexity": report.perplexity,
        "num_tokens": report.num_tokens,
        "evaluated_on": evaluated_on,
    }


def student_record(
    number: int,
    student: PreTrainedModel,
    edits: list[str],
    criterion: str,
    scores: list[dict[str, Any]],
    report: EvaluationReport,
) -> dict[str, Any]:
    """What a student is, which edits (labels) led to it by which scores, and its quality."""
    made = [Edit.from_label(label) for label in edits]
    removed = [edit.layers[0] for edit in made if edit.kind == "remove"]
    return {
        "round": number,
        "architecture": architecture_of(student.config).name,
        "num_layers": student.config.num_hidden_layers,
        "edits": edits,
        "removed_layer": removed[0] if removed else None,
        "removed_layers": removed,
        "criterion": criterion,
        "scores": scores[0]["values"] if scores else {},
        "all_scores": scores,
        **report.to_dict(),
        "num_parameters": student.num_parameters(),
        "plan": plan_of(student).to_dict(),
    }


def round_record(
    number: int, student: PreTrainedModel, criterion: str, current: dict[str, Any], after: EvaluationReport
) -> dict[str, Any]:
    """One finished round; `current` is what [`RunState`] knew of it, `after` the healed student's quality."""
    record = student_record(number, student, current["edits"], criterion, current["scores"], after)
    record |= {"seconds_scoring": current["seconds_scoring"], "weights": current.get("weights", {})}
    if "before_healing" not in current:  # a run that does not heal
        return record
    before, unhealed = current["before_healing"], current["unhealed"]
    return record | {
        "perplexity_unhealed": unhealed["perplexity"],
        "loss_unhealed": unhealed["loss"],
        "kl_unhealed": unhealed["kl"],
        "perplexity_before_healing": before["perplexity"],
        "loss_before_healing": before["loss"],
        "kl_before_healing": before["kl"],
        "seconds_healing": current["seconds_healing"],
        "train_tokens": current["train_tokens"],
    }


def task_record(
    model: PreTrainedModel, tasks: list[PreparedTask], tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel
) -> dict[str, Any]:
    """Quality on the tasks that choose layers, if any do: name, measure, quality, cost and standard error of each."""
    return {"tasks": evaluate_prepared(model, tasks, tokenizer, teacher).to_dict()} if tasks else {}


def speed_runs(rounds: list[dict[str, Any]]) -> int:
    """How often [`add_speed`] calls `on_run`."""
    return num_runs(1 + len(rounds), REPEATS)


def add_speed(
    teacher: PreTrainedModel,
    teacher_entry: dict[str, Any],
    rounds: list[dict[str, Any]],
    dtype: torch.dtype,
    on_run: Callable[[], None] = lambda: None,
) -> None:
    """Time every depth side by side, in the dtype the students are saved in (float32 where the CPU would emulate it),
    and add it to the records.

    Speed depends on shapes and dtype only: no student is loaded.
    """
    dtype = native_dtype(dtype, teacher.device) or dtype
    models = [teacher if teacher.dtype == dtype else prune(teacher, [], share_weights=True).to(dtype)]
    for record in rounds:  # each made of the one before, so that blocks they have in common are one in memory
        models.append(apply_plan(models[-1], LayerPlan.from_dict(record["plan"]), share_weights=True))
    reports = benchmark_models(models, PROMPT_TOKENS, NEW_TOKENS, repeats=REPEATS, on_run=on_run)
    how = {"dtype": str(dtype).removeprefix("torch."), "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    for record, report in zip([teacher_entry, *rounds], reports, strict=True):
        record |= report.to_dict() | how
