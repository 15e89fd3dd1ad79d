"""Load models and tokenizers a user names; every mistake is one clear line.

A student made elsewhere does not say which of its teacher's layers it holds: `with_plan` finds them by its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.integrations.gguf import read_gguf_metadata
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available

from .architectures import check_supported
from .data import EMBEDDED_MODEL
from .environment import native_dtype
from .errors import LayerPruneError, first_line, is_out_of_memory, needs_extra
from .plan import LayerPlan
from .surgery import plan_of, prune

LOADING_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError,
    AttributeError, TypeError,  # of a dtype that torch lacks, of a file that holds no settings
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
BESIDE_WEIGHTS = (
    "revision", "trust_remote_code", "token", "gguf_file", "cache_dir", "local_files_only", "subfolder",
)  # fmt: skip
"""Options of a model that its config and its tokenizer need too."""
GGUF_DTYPE = torch.bfloat16
"""A GGUF file names no dtype to save a student in: it counts as a checkpoint in this one, and is rounded to it."""
LLAMA3_ROPE = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
}  # fmt: skip
EMBEDDED = "embedded"
"""Name of the model that comes with the package, wherever a model is named."""

CLEARLY_NEARER = 0.7
"""Largest distance to the nearest layer of the teacher, over that to the second nearest; unrelated layers: about 1."""
NUMBERS_PER_TENSOR = 2**16  # that are compared, from all over it


def resolve(name_or_path: str) -> str:
    """Where a named model is: the package's own folder for `"embedded"`, `model` in the output folder of a run, else
    the name without its `@revision`."""
    if name_or_path == EMBEDDED:
        return EMBEDDED_MODEL
    folder = Path(name_or_path)
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    return split_revision(name_or_path)[0]


def split_revision(name_or_path: str) -> tuple[str, str | None]:
    """The name of a model and the revision in it, as in `"user/name@28-layers"`; a folder has none."""
    name, at, revision = name_or_path.partition("@")
    return (name, revision) if at and not Path(name_or_path).exists() else (name_or_path, None)


def one_revision(name_or_path: str, revision: str | None) -> str | None:
    """The revision in the name, or `revision`; `None` is the main one. Two that differ are an error."""
    named = split_revision(name_or_path)[1]
    if named is not None and revision not in (None, named):
        raise LayerPruneError(f"{name_or_path} names another revision than revision={revision!r}; give one")
    return revision if named is None else named


def gguf_name(name_or_path: str, gguf_file: str | None) -> str:
    """One name for a GGUF file in a folder or a repository: `"folder/file.gguf"`, `"user/name/file.gguf@revision"`."""
    if gguf_file is None:
        return name_or_path
    name, revision = split_revision(name_or_path)
    return f"{name.rstrip('/')}/{gguf_file}" + (f"@{revision}" if revision else "")


def require_gguf() -> None:
    """Raise [`LayerPruneError`] if the package that reads and writes GGUF files is missing."""
    if find_spec("gguf") is None:
        raise needs_extra("gguf, which reads and writes GGUF files,", "gguf")


def is_gguf(name_or_path: str) -> bool:
    """Whether a name is that of a GGUF file, here or in a repository on the Hub."""
    name = split_revision(name_or_path)[0]
    return name.lower().endswith(".gguf") and not Path(name).is_dir()


def beside_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """Select the options that also apply to loading the config and the tokenizer."""
    return {key: options[key] for key in BESIDE_WEIGHTS if key in options}


def name_of(model: PreTrainedModel) -> str:
    """The name a model was loaded by."""
    name = model.config._name_or_path
    return EMBEDDED if name == EMBEDDED_MODEL else name


def _source(name_or_path: str | Path, kwargs: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """The full name of a model, its folder or Hub id, and the options of `from_pretrained`, with its revision."""
    options = {"trust_remote_code": False} | kwargs
    name = gguf_name(str(name_or_path), options.pop("gguf_file", None))
    bare, revision = split_revision(name)[0], one_revision(name, options.pop("revision", None))
    if revision is not None:
        options["revision"] = revision
    if not is_gguf(name):
        return name, resolve(name), options
    require_gguf()
    path = Path(bare).absolute()
    if not path.is_file():  # on the Hub
        if bare.count("/") < 2:
            raise LayerPruneError(f"{name} does not exist; give the path of a GGUF file, or user/name/file.gguf")
        user, repository, file = bare.split("/", 2)
        where = {key: value for key, value in beside_weights(options).items() if key != "trust_remote_code"}
        try:
            path = Path(cached_file(f"{user}/{repository}", file, **where))
        except LOADING_ERRORS as error:
            raise LayerPruneError(f"{name} cannot be loaded: {first_line(error)}") from error
        options = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    return name, str(path.parent), options | {"gguf_file": str(path)}


def load_config(name_or_path: str | Path, **kwargs: Any) -> PretrainedConfig:
    """Load the config of a model; [`LayerPruneError`] if there is none, or its architecture is not supported."""
    name, source, options = _source(name_or_path, kwargs)
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        raise LayerPruneError(f"{name} cannot be loaded as a model: {_reason(error, source, options)}") from error
    try:
        if "gguf_file" in options:
            config.name_or_path, config.dtype = name, GGUF_DTYPE
            _complete(config, options["gguf_file"])
        check_supported(config)
        plan_of(config)
    except LayerPruneError as error:
        raise LayerPruneError(f"{name}: {error}") from None
    return config


def _reason(error: Exception, source: str, options: Mapping[str, Any]) -> str:
    folder = Path(source, options.get("subfolder", ""))
    if not folder.exists() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        return "the folder does not exist"
    if folder.is_file() and folder.suffix != ".json":
        return "it is a file; name the folder that it is in"
    if "gguf_file" in options or not folder.is_dir() or any(folder.glob("model*.safetensors")):
        return first_line(error)
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter alone; merge it into its model (merge_and_unload of PEFT), and save that"
    if any(folder.glob("pytorch_model*.bin")):
        return "its weights are pickled (.bin), which can run code; load them elsewhere and save them as safetensors"
    if (folder / "config.json").is_file():
        return first_line(error)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    return "it has no config.json" + (f"; name one of its GGUF files, {', '.join(files)}" if files else "")


def _complete(config: PretrainedConfig, path: str) -> None:
    """Take what a GGUF file says and transformers does not read, in place: the head size of a Qwen3, whether a Llama
    has biases, and that positions are scaled as in Llama 3."""
    metadata, tensors = read_gguf_metadata(path)
    architecture = metadata["general.architecture"]
    if (size := metadata.get(f"{architecture}.attention.key_length")) is not None:
        config.head_dim = size
    if config.model_type == "llama":
        config.attention_bias, config.mlp_bias = "blk.0.attn_q.bias" in tensors, "blk.0.ffn_up.bias" in tensors
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        from gguf import GGUFReader

        (factors,) = (tensor.data for tensor in GGUFReader(path).tensors if tensor.name == "rope_freqs.weight")
        factors, plain = torch.tensor(factors), config.rope_parameters
        config.rope_parameters = plain | LLAMA3_ROPE | {"factor": factors.max().item()}
        expected = factors * ROPE_INIT_FUNCTIONS["llama3"](config)[0]
        exponents = torch.arange(len(factors)) / len(factors)
        kind = "none" if torch.allclose(expected, plain["rope_theta"] ** -exponents, rtol=1e-4) else "rope_freqs"
    if kind != "none":
        raise LayerPruneError(f"its rotary positions are scaled ({kind}), which is not read; use its original")


def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    for_device: str | torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub: safetensors, or a GGUF file, dequantized to bfloat16.

    Args:
        name_or_path (`str` or `Path`):
            Folder, Hub id, perhaps with a revision (`"user/name@28-layers"`), or GGUF file: a path, or
            `"user/name/file.gguf"` for one on the Hub (`gguf_file="file.gguf"` means the same).
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): dtype of the weights in memory; `"auto"` is
            the checkpoint's own, and bfloat16 for a GGUF file.
        for_device (`str` or `torch.device`, *optional*): where the model will compute; there `"auto"` is float32 on a
            CPU that would have to emulate the checkpoint's dtype.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        [`LayerPruneError`]: if there is no model, its architecture is not supported, or its weights do not fit its
            config (no tensor is ever left random).
    """
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LayerPruneError(f"dtype={dtype!r} is unknown; choose auto, float32, bfloat16 or float16")
    keep_models_whole()
    config = load_config(name_or_path, **beside_weights(kwargs))
    name, source, options = _source(name_or_path, kwargs)
    if is_packed := "gguf_file" in options:
        options |= {"config": config, "quantization_config": GgufConfig(dequantize=True)}
    if dtype == "auto" and for_device is not None:
        dtype = native_dtype(config.dtype, torch.device(for_device)) or "auto"
    options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are reported here, by name
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise LayerPruneError(f"{name} cannot be loaded as a model: {_reason(error, source, options)}") from error
    wrong = [f"{key} has shape {(*found,)} instead of {(*wanted,)}" for key, found, wanted in info["mismatched_keys"]]
    wrong += [f"{key} is missing" for key in info["missing_keys"]]
    wrong += [f"{key} is not in the model" for key in info["unexpected_keys"]]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise LayerPruneError(f"{name}: weights do not fit the config: {', '.join(sorted(wrong)[:5])}{more}")
    if is_packed:
        model.name_or_path = model.config.name_or_path = name
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(GGUF_DTYPE))
    return model


def saved_dtype(name_or_path: str | Path, **kwargs: Any) -> torch.dtype:
    """The dtype of a checkpoint: what its config says or, where it says nothing, what its weights have."""
    options = beside_weights(kwargs)
    return load_config(name_or_path, **options).dtype or load_model(name_or_path, device_map="meta", **options).dtype


def keep_models_whole() -> None:
    """Keep the engine that launched this process from loading models in parts: each process has whole models here,
    except for the student while an engine trains it."""
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # by which transformers knows of it
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise LayerPruneError(
            "fsdp_cpu_ram_efficient_loading leaves every process but the first without a teacher; set it to false"
        )


def load_tokenizer(name_or_path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; [`LayerPruneError`] if there is none."""
    if not name_or_path:  # of a model made in memory; an empty path would be the current folder
        raise LayerPruneError("the model was not loaded by a name, so its tokenizer is unknown; give processing_class")
    name, source, options = _source(name_or_path, kwargs)
    folder, is_packed = Path(source, options.get("subfolder", "")), "gguf_file" in options
    if not is_packed and folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        # transformers would make an empty tokenizer without a word
        raise LayerPruneError(f"{name} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); save one next to the model")
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        reason = "it is a file, not the folder of a model" if folder.is_file() and not is_packed else first_line(error)
        if (folder / "tokenizer.model").is_file() and not (is_sentencepiece_available() and is_protobuf_available()):
            reason = "its tokenizer.model is read with pip install sentencepiece protobuf"
        raise LayerPruneError(
            f"{name} has no tokenizer that can be loaded ({reason}); save one next to the model or name another"
        ) from error


def with_plan(student: PreTrainedModel, teacher: PreTrainedModel, plan: LayerPlan | None = None) -> PreTrainedModel:
    """A student whose config says which layers of `teacher` it holds: by its own plan, else `plan`, else by search."""
    depth = student.config.num_hidden_layers
    if getattr(student.config, "layer_plan", None) is not None:
        if plan not in (None, plan_of(student)):
            raise LayerPruneError(f"plan={plan.to_json()} is not that of the student's config.json; leave it out")
        return student
    if plan is None:
        if depth >= len(plan_of(teacher).layers):
            return student
        plan = find_plan(student, teacher)
    if plan.parallel_pairs or plan.depth != depth:
        raise LayerPruneError(f"plan has {plan.depth} blocks, {len(plan.layers)} layers; the student has {depth}")
    student = prune(student, [], share_weights=True)
    student.config.layer_plan = plan.to_dict()
    return student


def find_plan(student: PreTrainedModel, teacher: PreTrainedModel) -> LayerPlan:
    """The plan that gives every layer of `student` the nearest layer of `teacher`; they must ascend.

    Healing moves layers; they stay far nearer to what they were than to any other layer. Raises [`LayerPruneError`] if
    a layer is about as near to another one.
    """
    plan, last = plan_of(teacher), -1
    if plan.depth < len(plan.layers):
        raise LayerPruneError(
            "the teacher has blocks of several layers; say which layers the student holds with --plan plan.json"
        )
    teacher_samples, layers = _samples(teacher), []
    for number, sample in enumerate(_samples(student)):
        distances = torch.stack([_distance(sample, other) for other in teacher_samples])
        (nearest, second), order = distances.topk(2, largest=False)
        if not nearest < CLEARLY_NEARER * second.clamp(max=1) or order[0] <= last:
            raise LayerPruneError(
                f"layer {number} of the student is not clearly one of the teacher's: its weights differ by "
                f"{nearest:.2f} of their size from layer {plan.layers[order[0]]} and by {second:.2f} from layer "
                f"{plan.layers[order[1]]}; say which layers it holds with --plan plan.json"
            )
        last = int(order[0])
        layers.append(plan.layers[last])
    return LayerPlan(tuple((layer,) for layer in layers), plan.num_teacher_layers)


def _samples(model: PreTrainedModel) -> list[list[Tensor]]:
    """Some weights of every matrix of each layer."""
    layers = (
        [part.detach().flatten() for part in layer.parameters() if part.dim() > 1] for layer in model.base_model.layers
    )
    return [[part[:: max(1, len(part) // NUMBERS_PER_TENSOR)].float().cpu() for part in parts] for parts in layers]


def _distance(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over the matrices of the norm of the difference over that of the teacher's."""
    if [part.shape for part in student] != [part.shape for part in teacher]:
        return torch.tensor(torch.inf)
    parts = [((a - b).norm(), b.norm()) for a, b in zip(student, teacher, strict=True)]
    return torch.stack([difference / norm if norm else (difference > 0).float() for difference, norm in parts]).mean()
