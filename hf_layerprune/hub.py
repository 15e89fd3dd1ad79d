"""The model card of a run, made of what the run measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .report import render_markdown, was_healed

TAGS = ("hf_layerprune", "layer-pruning", "pruned", "distillation")
PARALLEL_TAG = "layer-parallelism"

USE = """
## Use

```python
from transformers import pipeline

pipe = pipeline("text-generation", model="{model_name}"{options})
pipe("Once upon a time", max_new_tokens=50)
```

{kind}

## How
"""
PLAIN = "A plain `Qwen2ForCausalLM`; `config.layer_plan` says which layers of the original it holds."
PARALLEL = """A `PrunedQwen2ForCausalLM`: its code lies beside the weights, hence `trust_remote_code` (not needed where
`hf_layerprune` is imported). `config.layer_plan` says which layers of the original it holds, and which run in
parallel, as one layer."""
DISTILLATION = """
Iterative Layer-wise Distillation (https://huggingface.co/papers/2511.05085): each round measures what every possible
edit of the layers would cost, makes the cheapest, and heals the student against the original model.
"""
PARALLELISM = """
Layer parallelism (https://huggingface.co/papers/2502.02790): neighbouring layers read the same input and their outputs
are added, which makes them one wider layer.
"""


def model_card(report: dict[str, Any], model_name: str, base_model: str, tags: Sequence[str] = ()) -> ModelCard:
    """A card whose every number is from `report` (the content of `report.json`).

    Args:
        report (`dict`): teacher, rounds, settings and environment of a run.
        model_name (`str`): name of the student on the Hub.
        base_model (`str`): the teacher; named in the metadata only if it is no local folder.
        tags (`Sequence[str]`, *optional*): added to the library's own.
    """
    rounds = report["rounds"]
    parallel = any(len(block) > 1 for block in rounds[-1]["plan"]["blocks"])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=None if base_model == "embedded" or Path(base_model).exists() else base_model,
        tags=list(dict.fromkeys([*TAGS, *([PARALLEL_TAG] if parallel else []), *tags])),
    )
    options = ", trust_remote_code=True" if parallel else ""
    body = render_markdown(report) + USE.format(
        model_name=model_name, options=options, kind=PARALLEL if parallel else PLAIN
    )
    body += DISTILLATION if any(was_healed(record) for record in rounds) else ""
    body += PARALLELISM if parallel else ""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
