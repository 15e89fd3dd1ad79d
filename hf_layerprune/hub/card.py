"""The model card of a student: every number in it is from the report of its run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import report
from ..errors import LayerPruneError, first_line
from ..loading import resolve
from ..record import RunRecord
from .paths import hub_id, public_settings, without_local_paths
from .runs import Run

TEMPLATE = Path(__file__).parent.parent / "templates" / "model_card.md.jinja"
TAGS = ("hf_layerprune",)
CHAT_TEMPLATE = "chat_template.jinja"
TRACKIO = "trackio:"
"""Begins the tag that shows a run's Trackio page in the tab "Training metrics"."""
TEXTS = ("calibration_dataset", "dataset", "eval_dataset")
METRICS = {
    "perplexity": ("perplexity", "Perplexity"),
    "kl": ("hf_layerprune_kl", "KL divergence from the original model, nats per token"),
    "agreement": ("hf_layerprune_agreement", "Share of positions with the original's most likely token"),
}
"""Entries of a round's quality that become metrics of the card, their types and names there."""


@dataclass(frozen=True)
class Target:
    """Where a student goes."""

    number: int  # its round
    tag: str  # its depth, such as "28-layers"
    repo_id: str
    revision: str | None  # branch or tag by which it is loaded from there; `None` for main


def base_facts(base: str, token: str | None = None) -> tuple[ModelCardData, str]:
    """The license and languages that a student inherits from a model's card, and a note if it inherits no license."""
    try:
        data = ModelCard.load(hub_id(base) or Path(resolve(base)) / "README.md", token=token).data
    except Exception as error:  # no card, no network, broken metadata: each library has errors of its own
        return ModelCardData(), first_line(error)
    is_url = data.license_link is not None and "://" in data.license_link  # else a file that the student lacks
    link = data.license_link if is_url else None
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
    others: Sequence[Target] = (),
) -> ModelCard:
    """Make the card of the student after round `number` (from 1), for the repository or folder `model_name`.

    `base_model`, `tags` and `datasets` add to what the run's settings name; `facts` are what it inherits, by default
    from the card of a base model on this disk; `others` are the run's other depths.
    """
    public, settings = run.public_record(number), run.settings
    base = base_model or settings.get("model")
    origin, base_id = base or public.teacher.name, hub_id(base)
    if facts is None:
        facts = base_facts(base)[0] if base and not base_id else ModelCardData()
    tags = list(dict.fromkeys([*TAGS, *_methods(public), *public.tags, *tags]))
    plot = f"https://huggingface.co/{model_name}/resolve/{revision or 'main'}/quality.png"
    evaluated_on = hub_id(settings.get("eval_dataset") or settings.get("dataset"))
    metadata = ModelCardData(
        **facts.to_dict(),
        base_model_relation="finetune" if base_id else None,
        base_model=base_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=list(dict.fromkeys(filter(None, [*(hub_id(settings.get(key)) for key in TEXTS), *datasets]))) or None,
        tags=tags,
        thumbnail=plot if pushed and report.has_plots() else None,
        metrics=["perplexity"],
        model_name=model_name.split("/")[-1],
        eval_results=_eval_results(public, evaluated_on),
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        run=public,
        report=report,
        recipe=public_settings(settings),
        model_name=model_name,
        base_id=base_id,
        origin=without_local_paths(origin),
        origin_id=hub_id(origin),
        pushed=pushed,
        revision=revision,
        others=others,
        is_chat=_is_chat(run, number),
        trackio=next((tag.removeprefix(TRACKIO) for tag in tags if tag.startswith(TRACKIO)), None),
        evaluated_on=public.teacher.evaluated_on + (f" ({evaluated_on})" if evaluated_on else ""),
    )


def _methods(run: RunRecord) -> list[str]:
    """Tags of what was done to the original, in this run or before."""
    plan = run.rounds[-1].plan
    done = {
        "layer-pruning": plan.removed_layers or plan.merged,
        "pruned": plan.removed_layers or plan.merged,
        "layer-merging": plan.merged,
        "layer-parallelism": plan.parallel_pairs,
        "distillation": run.is_healed,
    }
    return [tag for tag, was_done in done.items() if was_done]


def _is_chat(run: Run, number: int) -> bool:
    """Whether the student of a round, if it is at hand, has a chat template."""
    try:
        return (run.student(number) / CHAT_TEMPLATE).is_file()
    except LayerPruneError:
        return False


def _eval_results(run: RunRecord, evaluated_on: str | None) -> list[EvalResult]:
    """The run's own numbers, on held-out text and on the tasks that chose the layers, if any did."""
    last, data = run.rounds[-1], evaluated_on or "held-out-text"
    text = f"{run.teacher.evaluated_on}, {run.teacher.quality.num_tokens:,} tokens"
    results = [(data, text, *METRICS[name], getattr(last.quality, name)) for name in METRICS]
    for name, task in last.tasks.results.items() if last.tasks else ():
        examples = f"{name}, {task.num_examples:,} examples"
        results.append((re.sub(r"[^\w.-]+", "-", name), examples, task.measure, task.measure, task.quality))
    return [
        EvalResult("text-generation", dataset, name, metric, value, "Text Generation", metric_name=metric_name)
        for dataset, name, metric, metric_name, value in results
    ]
