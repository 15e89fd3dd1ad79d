"""Configuration of PrunedQwen2: a Qwen2 whose layers are the blocks of a layer plan.

This file is shipped inside checkpoints, so it imports nothing but transformers and the standard library.
"""

from copy import copy

from transformers import Qwen2Config


class PrunedQwen2Config(Qwen2Config):
    r"""
    A [`Qwen2Config`] with one more field. `num_attention_heads`, `num_key_value_heads` and `intermediate_size` are
    those of ONE teacher layer; a block of `n` layers is `n` times as wide.

    Args:
        layer_plan (`dict`, *optional*):
            `{"num_teacher_layers": int, "blocks": [[int, ...], ...]}`: the teacher layers of each block. Without it
            every layer is a block of its own. `num_hidden_layers` always equals the number of blocks.
    """

    model_type = "pruned_qwen2"

    layer_plan: dict | None = None

    def __post_init__(self, **kwargs):
        if self.layer_plan is None:
            blocks = [[layer] for layer in range(self.num_hidden_layers)]
            self.layer_plan = {"num_teacher_layers": self.num_hidden_layers, "blocks": blocks}
        blocks = self.layer_plan.get("blocks")
        if not blocks or not all(isinstance(block, (list, tuple)) and block for block in blocks):
            raise ValueError(f"layer_plan={self.layer_plan!r} needs a list of non-empty blocks")
        if self.num_hidden_layers != len(blocks):
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} but layer_plan has {len(blocks)} blocks")
        # `save_pretrained` fills in the class that is saved; the bare decoder has to be named by hand
        kwargs["auto_map"] = {"AutoModel": "modeling_pruned_qwen2.PrunedQwen2Model"} | (kwargs.get("auto_map") or {})
        super().__post_init__(**kwargs)
        if len(self.layer_types) != len(blocks):
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries but layer_plan has {len(blocks)} blocks"
            )

    def block_config(self, position):
        """The configuration of block `position` alone: this one, as many times wider as the block has layers."""
        width = len(self.layer_plan["blocks"][position])
        config = copy(self)
        config.head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        config.num_attention_heads = width * self.num_attention_heads
        config.num_key_value_heads = width * self.num_key_value_heads
        config.intermediate_size = width * self.intermediate_size
        return config


__all__ = ["PrunedQwen2Config"]
