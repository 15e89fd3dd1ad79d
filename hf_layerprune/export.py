"""Write a model as one file for other programs: GGUF, which llama.cpp and Ollama run.

`export_gguf` writes the weights tensor by tensor, so it needs the memory of the model and of its largest tensor. The
names and the format are those of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .errors import LayerPruneError
from .gguf_vocabulary import vocabulary_of
from .loading import require_gguf
from .models import PrunedQwen2Config
from .surgery import check_in_memory, check_model, plan_of

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

OUTTYPES = ("f32", "f16", "bf16", "q8_0")
ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}  # as llama.cpp calls them
ROPE_TYPES = ("default", "llama3", "linear", "yarn")
YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
"""Settings of YaRN that llama.cpp has as well."""


def check_exportable(config: PretrainedConfig) -> None:
    """Raise [`LayerPruneError`] unless llama.cpp computes what a model of `config`, a supported one, does."""
    if config.model_type == PrunedQwen2Config.model_type:
        blocks = ", ".join("|".join(map(str, block)) for block in plan_of(config).parallel_pairs) or "none"
        raise LayerPruneError(
            f"layers run in parallel ({blocks}), and llama.cpp has layers of one width only; serve it with "
            "transformers or vLLM, or undo it with hf_layerprune.unparallelize"
        )
    rope, act = config.rope_parameters, config.hidden_act
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES or (kind == "llama3" and ARCHITECTURES[config.model_type] != "llama"):
        raise LayerPruneError(f"its rotary positions are scaled ({kind}), which llama.cpp does not do here")
    if kind == "yarn" and (others := {key for key, value in rope.items() if value is not None} - YARN):
        raise LayerPruneError(f"YaRN with {', '.join(sorted(others))} cannot be written into a GGUF file")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or act != "silu":
        raise LayerPruneError(
            f"llama.cpp has no {config.model_type} with hidden_act={act!r} and rotary settings {rope}"
        )
    if config.model_type == "qwen3" and config.attention_bias:
        raise LayerPruneError("llama.cpp has no Qwen3 with attention_bias")
    if config.model_type == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise LayerPruneError(f"llama.cpp has no Qwen2 with head_dim={_head_dim(config)}: heads must fill hidden_size")


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    outtype: str = "f16",
    *,
    name: str | None = None,
    on_tensor: Callable[[], None] = lambda: None,
) -> Path:
    """Write a model and its tokenizer as a GGUF file, which replaces any file at `path` once it is complete.

    Args:
        model (`PreTrainedModel`): a plain Qwen2, Qwen3, Llama or Mistral; students with removed or merged layers are.
        tokenizer (`PreTrainedTokenizerBase`): the model's own.
        path (`str` or `Path`): file to write.
        outtype (`str`, *optional*, defaults to `"f16"`): type of the matrices: f32, f16, bf16, or q8_0, which rounds
            blocks of 32 weights to 8 bits (rows that do not divide by 32 become f16). Norms and biases stay f32.
        name (`str`, *optional*): name of the model in the file; the file's own by default.
        on_tensor (`Callable`, *optional*): called after each tensor.

    Raises:
        [`LayerPruneError`]: if llama.cpp would compute or tokenize something else, or without the `gguf` package.
    """
    if outtype not in OUTTYPES:
        raise LayerPruneError(f"outtype={outtype!r} is unknown; choose {', '.join(OUTTYPES)}")
    require_gguf()
    check_model(model)
    check_in_memory(model)
    check_exportable(model.config)
    vocabulary, path = vocabulary_of(tokenizer, model.config), Path(path)
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with closing(GGUFWriter(temporary, ARCHITECTURES[model.config.model_type])) as writer:
            writer.add_name(name or path.stem)
            _add_shape(writer, model.config)
            for name_of_field, value in vocabulary.items():
                getattr(writer, f"add_{name_of_field}")(value)
            _write_tensors(writer, model, outtype, on_tensor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_shape(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Add the sizes of a model, and how its positions are rotated."""
    from gguf import RopeScalingType

    head_dim, rope = _head_dim(config), config.rope_parameters
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):  # those of Llama 3 are a tensor
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _tensors(model: PreTrainedModel, outtype: str) -> Iterator[tuple[str, torch.Tensor, GGMLQuantizationType]]:
    """The tensors of a file by their names there, as the model has them, and their types; a head that is tied is none.

    Vectors stay f32; rows that do not divide into the blocks of q8_0 become f16.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map

    config = model.config
    kind = getattr(MODEL_ARCH, ARCHITECTURES[config.model_type].upper())
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    for key, tensor in model.named_parameters():
        matrix_type = "F16" if outtype == "q8_0" and tensor.shape[-1] % 32 else outtype.upper()
        kept = GGMLQuantizationType["F32" if tensor.ndim == 1 else matrix_type]
        yield names.get_name(key, try_suffixes=(".weight", ".bias")), tensor.detach(), kept
    if config.rope_parameters.get("rope_type") == "llama3":
        dims = torch.arange(0, _head_dim(config), 2) / _head_dim(config)
        plain = config.rope_parameters["rope_theta"] ** -dims
        yield "rope_freqs.weight", plain / ROPE_INIT_FUNCTIONS["llama3"](config)[0], GGMLQuantizationType.F32


def _write_tensors(writer: GGUFWriter, model: PreTrainedModel, outtype: str, on_tensor: Callable[[], None]) -> None:
    """Write the head of the file, which holds the size of each tensor, then one tensor after the other."""
    from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, LlamaFileType

    file_type = LlamaFileType.ALL_F32 if outtype == "f32" else LlamaFileType[f"MOSTLY_{outtype.upper()}"]
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for name, tensor, kept in _tensors(model, outtype):
        block, size = GGML_QUANT_SIZES[kept]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor, kept in _tensors(model, outtype):
        writer.write_tensor_data(_values(name, tensor, model.config, kept))
        on_tensor()


def _values(name: str, tensor: torch.Tensor, config: PretrainedConfig, kept: GGMLQuantizationType) -> np.ndarray:
    """A tensor as it is stored. llama.cpp rotates neighbouring pairs in a head of a Llama, transformers its halves."""
    from gguf import quants

    values = tensor.to("cpu", torch.float32)
    if ARCHITECTURES[config.model_type] == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape)
    return quants.quantize(np.ascontiguousarray(values.numpy()), kept)
