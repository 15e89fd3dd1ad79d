"""The model card of a student: every number in it is from the report of its run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import report as reports
from ..data import EMBEDDED_TEXTS
from ..errors import first_line
from ..loading import EMBEDDED, resolve
from ..plots import layer_map_text
from ..record import RoundRecord, RunRecord, TeacherRecord
from ..scoring import CRITERION_UNITS
from .paths import hub_id, without_local_paths
from .runs import RECIPE_FILE, Run

TEMPLATE = Path(__file__).parent.parent / "templates" / "model_card.md.jinja"
TAGS = ("hf_layerprune", "layer-pruning", "pruned", "distillation")
PARALLEL_TAG = "layer-parallelism"
METRICS = {
    "perplexity": "Perplexity",
    "kl": "KL divergence from the original model, nats per token",
    "agreement": "Share of positions with the original's most likely token",
}
"""Entries of a round that become metrics of the card, and their names there."""
TEXTS = dict(zip(("calibration_dataset", "dataset", "eval_dataset"), EMBEDDED_TEXTS, strict=True))
"""Settings that name a text, and the text of the package in its place where no data set was named."""


def base_facts(base: str, token: str | None = None) -> tuple[ModelCardData, str]:
    """Read what a student inherits, license and languages, from the card of a model; and why there is none, if so."""
    repo_id, readme = hub_id(base), Path(resolve(base)) / "README.md"
    if repo_id is None and not readme.is_file():
        return ModelCardData(), "it has no README.md"
    try:
        data = ModelCard.load(repo_id or readme, token=token).data
    except Exception as error:  # no card, no network, broken metadata: each library has errors of its own
        return ModelCardData(), first_line(error)
    link = data.license_link
    if link is not None and "://" not in link:  # a file next to the base model's card, which the student lacks
        link = f"https://huggingface.co/{repo_id}/blob/main/{link}" if repo_id else None
    facts = {"license": data.license, "license_name": data.license_name, "language": data.language}
    return ModelCardData(license_link=link, **facts), "" if data.license else "its card names none"


def run_card(
    run: Run,
    number: int,
    model_name: str,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    *,
    datasets: Sequence[str] = (),
    facts: ModelCardData | None = None,
    pushed: bool = False,
    revision: str | None = None,
    revisions: Sequence[str] = (),
) -> ModelCard:
    """Make the card of the student after round `number` (from 1), for the repository or folder `model_name`.

    `base_model`, `tags` and `datasets` add to what the run's settings name; `facts` are what it inherits, by default
    from the card of a base model on this disk. A `pushed` card goes to `revision`, by default main, together with a
    recipe; `revisions` hold other depths.
    """
    public, settings = run.public_record(number), run.settings
    teacher, record = public.teacher, public.rounds[-1]
    plan = record.plan
    base = base_model or settings.get("model")
    origin, base_id = base or teacher.name, hub_id(base)
    if facts is None:
        facts = base_facts(base)[0] if base and not base_id else ModelCardData()
    named = {key: hub_id(settings.get(key)) for key in TEXTS}
    evaluated_on = named["eval_dataset" if settings.get("eval_dataset") else "dataset"]
    metadata = ModelCardData(
        **facts.to_dict(),
        **({"base_model_relation": "finetune"} if base_id else {}),
        base_model=base_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=list(dict.fromkeys(filter(None, [*named.values(), *datasets]))) or None,
        tags=list(dict.fromkeys([*TAGS, *[PARALLEL_TAG] * bool(plan.parallel_pairs), *tags])),
        metrics=["perplexity"],
        model_name=model_name.split("/")[-1],
        eval_results=_eval_results(teacher, record, evaluated_on),
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        **_content(run, public),
        plan=plan,
        model_name=model_name,
        base_id=base_id,
        origin=without_local_paths(origin),
        origin_id=hub_id(origin),
        pushed=pushed,
        has_recipe=pushed or (run.folder / RECIPE_FILE).is_file(),
        revision=revision,
        revisions=[name for name in revisions if name != revision],
        evaluated_on=teacher.evaluated_on + (f" ({evaluated_on})" if evaluated_on else ""),
    )


def _content(run: Run, public: RunRecord) -> dict[str, Any]:
    """What the template says of the run: its numbers, and tables and sentences as in the report."""
    record, saved = public.rounds[-1], public.weighed_by
    unit = CRITERION_UNITS.get(record.criterion, record.criterion)
    own = run.settings.get("dataset") is None  # then it worked on the texts of the package
    texts = {key: run.settings.get(key) or (f"{EMBEDDED}:{text}" if own else None) for key, text in TEXTS.items()}
    return {
        "run": run,
        "teacher": public.teacher,
        "rounds": public.rounds,
        "environment": public.environment,
        "record": record,
        "start": public.start.depth,
        "healed": public.is_healed,
        "edits": public.edits,
        "texts": {key: _link(name) for key, name in (texts | {"tasks": run.settings.get("tasks")}).items() if name},
        "summary": reports.summary(public),
        "millions": reports.millions,
        "layer_map": layer_map_text(record.plan),
        "choices": _choices(public.rounds),
        "cost_explained": unit.replace("without the layer", "with the edit made")
        + (f", weighed by the {saved} an edit saves" if saved else ""),
        "quality_table": reports.quality_table(public),
        "task_table": reports.task_table(public),
    }


def _link(name: str) -> str:
    """A data set on the Hub as a link, others by their names."""
    if repo_id := hub_id(name):
        return f"[{repo_id}](https://huggingface.co/datasets/{repo_id})"
    return f"`{without_local_paths({'tasks': name})['tasks']}`"


def _eval_results(teacher: TeacherRecord, record: RoundRecord, evaluated_on: str | None) -> list[EvalResult]:
    """The run's own numbers, on held-out text and on the tasks that chose the layers, if any did."""

    def result(dataset: str, name: str, metric: str, metric_name: str, value: float) -> EvalResult:
        return EvalResult("text-generation", dataset, name, metric, value, "Text Generation", metric_name=metric_name)

    text, data = f"{teacher.evaluated_on}, {teacher.quality.num_tokens:,} tokens", evaluated_on or "held-out-text"
    metrics = {name: name if name == "perplexity" else f"hf_layerprune_{name}" for name in METRICS}
    results = [result(data, text, metrics[name], METRICS[name], getattr(record.quality, name)) for name in METRICS]
    for name, task in ({} if record.tasks is None else record.tasks.results).items():
        size = f"{name}, {task.num_examples:,} examples"
        results.append(result(re.sub(r"[^\w.-]+", "-", name), size, task.measure, task.measure, task.quality))
    return results


def _choices(rounds: Sequence[RoundRecord]) -> list[list[str]]:
    """Each edit with its cost, and the cheapest other one of the same scoring."""
    rows = []
    for record in rounds:
        for made, scores in zip(record.edits, record.scores, strict=False):
            costs = {edit: cost for edit, cost in scores.values.items() if math.isfinite(cost)}
            if made in costs:
                row = [str(record.number), made.label, f"{costs.pop(made):.4f}"]
                other = min(costs, key=costs.__getitem__, default=None)
                row += ["", ""] if other is None else [other.label, f"{costs[other]:.4f}"]
                rows.append([cell.replace("|", reports.BAR) for cell in row])
    return rows
