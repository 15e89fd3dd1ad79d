"""The model card of a run, made of what the run measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .report import render_markdown

TAGS = ("hf_layerprune", "layer-pruning", "pruned", "distillation")

USE = """
## Use

```python
from transformers import pipeline

pipe = pipeline("text-generation", model="{model_name}")
pipe("Once upon a time", max_new_tokens=50)
```

The student is a plain `Qwen2ForCausalLM`; `config.layer_plan` says which layers of the original it holds.

## How

Iterative Layer-wise Distillation (https://huggingface.co/papers/2511.05085): each round scores every layer by what
leaving it out costs, removes the least important, and heals the student against the original model.
"""


def model_card(report: dict[str, Any], model_name: str, base_model: str, tags: Sequence[str] = ()) -> ModelCard:
    """A card whose every number is from `report` (the content of `report.json`).

    Args:
        report (`dict`): teacher, rounds, settings and environment of a run.
        model_name (`str`): name of the student on the Hub.
        base_model (`str`): the teacher; named in the metadata only if it is no local folder.
        tags (`Sequence[str]`, *optional*): added to the library's own.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=None if base_model == "embedded" or Path(base_model).exists() else base_model,
        tags=[*TAGS, *(tag for tag in tags if tag not in TAGS)],
    )
    body = render_markdown(report)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}{USE.format(model_name=model_name)}")
