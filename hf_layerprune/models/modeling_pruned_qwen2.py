"""PrunedQwen2: Qwen2 with one decoder layer per block of a layer plan, as wide as the block has teacher layers.

This file is shipped inside checkpoints: it imports torch, transformers and its configuration, nothing else.
"""

from torch import nn
from transformers import Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .configuration_pruned_qwen2 import PrunedQwen2Config


class PrunedQwen2DecoderLayer(Qwen2DecoderLayer):
    """One block: `n` teacher layers side by side are one layer with `n` times the heads and neurons."""

    def __init__(self, config: PrunedQwen2Config, layer_idx: int):
        super().__init__(config.block_config(layer_idx), layer_idx)
        self.self_attn.config = config  # one shared object, so that `set_attn_implementation` reaches every block


class PrunedQwen2Model(Qwen2Model):
    config_class = PrunedQwen2Config
    _no_split_modules = ["PrunedQwen2DecoderLayer"]

    def __init__(self, config: PrunedQwen2Config):
        super().__init__(config)
        self.layers = nn.ModuleList(PrunedQwen2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class PrunedQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    _no_split_modules = ["PrunedQwen2DecoderLayer"]

    def __init__(self, config: PrunedQwen2Config):
        super().__init__(config)
        self.model = PrunedQwen2Model(config)
        self.post_init()


__all__ = ["PrunedQwen2ForCausalLM", "PrunedQwen2Model"]
