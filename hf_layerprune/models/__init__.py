"""PrunedQwen2 and its registration with the Auto classes and as remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_pruned_qwen2 import PLAIN_MODELS, PrunedQwen2Config
from .modeling_pruned_qwen2 import PrunedQwen2ForCausalLM, PrunedQwen2Model

AutoConfig.register(PrunedQwen2Config.model_type, PrunedQwen2Config, exist_ok=True)
AutoModel.register(PrunedQwen2Config, PrunedQwen2Model, exist_ok=True)
AutoModelForCausalLM.register(PrunedQwen2Config, PrunedQwen2ForCausalLM, exist_ok=True)
PrunedQwen2Config.register_for_auto_class()
PrunedQwen2Model.register_for_auto_class("AutoModel")
PrunedQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PLAIN_MODELS", "PrunedQwen2Config", "PrunedQwen2ForCausalLM", "PrunedQwen2Model"]
