"""One tiny random model per supported family: the rows of the test matrix."""

from __future__ import annotations

import torch
from conftest import SHAPE, with_layers_that_matter
from transformers import PreTrainedModel

from hf_layerprune.architectures import ARCHITECTURES
from hf_layerprune.models import PrunedQwen2ForCausalLM
from hf_layerprune.surgery import plan_of

FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # twice hidden_size / num_attention_heads
    "llama": {},
    "mistral": {"sliding_window": None},
}
"""What the config of each needs beside the common shape."""
BLOCKS = ((0,), (1, 2, 3), (4,), (5, 6))
"""A plan of seven layers: a group of three, and a pair."""


def pruned_qwen2(model: PreTrainedModel) -> PrunedQwen2ForCausalLM:
    """The same blocks as a PrunedQwen2."""
    return PrunedQwen2ForCausalLM.from_plain(model, plan_of(model))


def family_model(family: str, num_layers: int = 5, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model whose layers matter: biases and norms away from their initial values."""
    torch.manual_seed(seed)
    settings = SHAPE | {"num_hidden_layers": num_layers, "bos_token_id": None} | FAMILIES.get(family, {}) | changes
    architecture = ARCHITECTURES[family]
    return with_layers_that_matter(architecture.model_class(architecture.config_class(**settings)))
