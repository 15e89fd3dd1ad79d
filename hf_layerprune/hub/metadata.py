"""The metadata of a card: what the Hub sorts, filters and compares models by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import first_line
from ..loading import resolve
from ..plan import LayerPlan
from .scrub import hub_id

TAGS = ("hf_layerprune", "layer-pruning", "pruned", "distillation")
PARALLEL_TAG = "layer-parallelism"
GENERATION = {"task_type": "text-generation", "task_name": "Text Generation"}
METRICS = {
    "perplexity": "Perplexity",
    "kl": "KL divergence from the original model, nats per token",
    "agreement": "Share of positions with the original's most likely token",
}
"""Entries of a record that a card's `model-index` has, and their names there."""


@dataclass(frozen=True)
class BaseFacts:
    """What a student inherits from its base model's card.

    Attributes:
        license (`str`, *optional*): the license, as the Hub names it.
        license_name (`str`, *optional*): name of a license the Hub has no name for.
        license_link (`str`, *optional*): where it can be read.
        language (`list[str]`, *optional*): languages the base model knows.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None


def base_facts(base: str, token: str | None = None) -> tuple[BaseFacts, str]:
    """What the card of a model says, and, where it says nothing of a license, why.

    Args:
        base (`str`): a folder, `"embedded"`, or a Hub id, maybe with `@revision`.
        token (`str`, *optional*): for a private base model.
    """
    repo_id, readme = hub_id(base), Path(resolve(base)) / "README.md"
    if repo_id is None and not readme.is_file():
        return BaseFacts(), "it has no README.md"
    try:
        if repo_id is None:
            card = ModelCard(readme.read_text(encoding="utf-8"))
        else:
            card = ModelCard.load(repo_id, token=token)
    except Exception as error:  # no card, no network, broken metadata: each library below has errors of its own
        return BaseFacts(), first_line(error)
    data = card.data
    link = data.license_link
    if link is not None and "://" not in link:  # a file beside the base model's card, which the student's has not
        link = None if repo_id is None else f"https://huggingface.co/{repo_id}/blob/main/{link}"
    facts = BaseFacts(data.license, data.license_name, link, data.language)
    return facts, "" if facts.license else "its card names none"


def card_metadata(
    report: dict[str, Any],
    model_name: str,
    base_model: str | None,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    facts: BaseFacts | None = None,
    evaluated_on: str | None = None,
) -> ModelCardData:
    """The metadata of the student a report ends with.

    Args:
        report (`dict`): teacher, rounds, settings and environment of a run.
        model_name (`str`): name of the student on the Hub.
        base_model (`str`, *optional*): Hub id of the model it was made from.
        tags (`Sequence[str]`, *optional*): added to the library's own.
        datasets (`Sequence[str]`, *optional*): Hub ids of the data it was made with.
        facts ([`BaseFacts`], *optional*): what it inherits.
        evaluated_on (`str`, *optional*): Hub id of the data the quality was measured on.
    """
    facts = facts or BaseFacts()
    record = report["rounds"][-1]
    parallel = [PARALLEL_TAG] if LayerPlan.from_dict(record["plan"]).parallel_pairs else []
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=list(datasets) or None,
        tags=list(dict.fromkeys([*TAGS, *parallel, *tags])),
        metrics=["perplexity"],
        model_name=model_name.split("/")[-1],
        eval_results=_eval_results(report, record, evaluated_on),
        **({"base_model_relation": "finetune"} if base_model else {}),
    )


def _eval_results(report: dict[str, Any], record: dict[str, Any], evaluated_on: str | None) -> list[EvalResult]:
    """The run's own numbers, on held-out text and on the tasks that chose the layers, if any did."""
    teacher = report["teacher"]
    text = [
        EvalResult(
            **GENERATION,
            dataset_type=evaluated_on or "held-out-text",
            dataset_name=f"{teacher['evaluated_on']}, {teacher['num_tokens']:,} tokens",
            metric_type=name if name == "perplexity" else f"hf_layerprune_{name}",
            metric_name=label,
            metric_value=record[name],
        )
        for name, label in METRICS.items()
    ]
    tasks = [
        EvalResult(
            **GENERATION,
            dataset_type=re.sub(r"[^\w.-]+", "-", name),
            dataset_name=f"{name}, {result['num_examples']:,} examples",
            metric_type=result["measure"],
            metric_name=result["measure"],
            metric_value=result["quality"],
        )
        for name, result in record.get("tasks", {"results": {}})["results"].items()
    ]
    return text + tasks
