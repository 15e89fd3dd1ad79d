"""One tiny random model per supported family: the rows of the test matrix."""

from __future__ import annotations

import torch
from conftest import VOCAB_SIZE
from transformers import PreTrainedModel

from hf_layerprune.architectures import ARCHITECTURES

FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # twice hidden_size / num_attention_heads
    "llama": {},
    "mistral": {"sliding_window": None},
}
"""What the config of each needs beside the common shape."""
BLOCKS = ((0,), (1, 2, 3), (4,), (5, 6))
"""A plan of seven layers: a group of three, and a pair."""


def family_model(family: str, num_layers: int = 5, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model whose layers matter: biases and norms away from their initial values."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": VOCAB_SIZE - 1,
        "initializer_range": 0.15,
    }
    architecture = ARCHITECTURES[family]
    model = architecture.model_class(architecture.config_class(**settings | FAMILIES.get(family, {}) | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()
