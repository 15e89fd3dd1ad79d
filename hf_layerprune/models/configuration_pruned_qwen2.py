"""Configuration of PrunedQwen2: a Qwen2, or a relative of it, whose layers are the blocks of a layer plan.

This file is shipped inside checkpoints, so it imports nothing but transformers and the standard library.
"""

from transformers import Qwen2Config, Qwen3Config

# The plain models whose layers a block can hold: Qwen2's layers but for these fields, which say how attention differs.
PLAIN_MODELS = {
    "qwen2": {"attention_bias": True, "qk_norm": False},
    "qwen3": {"attention_bias": False, "qk_norm": True},
    "llama": {"attention_bias": False, "qk_norm": False},
    "mistral": {"attention_bias": False, "qk_norm": False},
}
FOREIGN_FIELDS = ("model_type", "architectures", "auto_map", "mlp_bias", "pretraining_tp")  # not of every plain model
WIDER = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # what n layers in parallel have n times
MAX_LAYERS = 10_000  # a plan is outside input; one that asks for more is a mistake, or meant to fill the memory


class PrunedQwen2Config(Qwen2Config):
    r"""
    A [`Qwen2Config`] with three more fields. `num_attention_heads`, `num_key_value_heads` and `intermediate_size` are
    those of ONE teacher layer; a block of `n` layers in parallel is `n` times as wide. `per_layer_config` says so in
    the form that transformers and vLLM read; it always follows from `layer_plan`.

    Args:
        layer_plan (`dict` or `LayerPlan`, *optional*):
            `{"num_teacher_layers": int, "blocks": [[int, ...], ...]}`: the teacher layers of each block, and under
            `"merged"` the blocks, if any, that were merged into one layer. Without it every layer is a block of its
            own. `num_hidden_layers` always equals the number of blocks.
        attention_bias (`bool`, *optional*, defaults to `True`):
            Whether the query, key and value projections have biases, as in Qwen2.
        qk_norm (`bool`, *optional*, defaults to `False`):
            Whether queries and keys are normalised head by head, as in Qwen3, which has no biases then.
    """

    model_type = "pruned_qwen2"

    layer_plan: dict | None = None
    attention_bias: bool = True
    qk_norm: bool = False

    def __post_init__(self, **kwargs):
        self.layer_plan = plan_in(self)
        blocks = self.layer_plan["blocks"]
        if self.num_hidden_layers != len(blocks):
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} but layer_plan has {len(blocks)} blocks")
        if {"attention_bias": self.attention_bias, "qk_norm": self.qk_norm} not in PLAIN_MODELS.values():
            raise ValueError("qk_norm=True needs attention_bias=False: no model has both")
        if self.qk_norm:
            self.base_model_tp_plan = Qwen3Config.base_model_tp_plan
        # `save_pretrained` adds only the class that is saved; add the bare decoder here
        kwargs["auto_map"] = {"AutoModel": "modeling_pruned_qwen2.PrunedQwen2Model"} | (kwargs.get("auto_map") or {})
        # said here, since it is the same in every block, however many heads that has
        kwargs["head_dim"] = kwargs.get("head_dim") or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs | {"per_layer_config": self._wide_blocks()})
        if len(self.layer_types) != len(blocks):
            raise ValueError(f"layer_types has {len(self.layer_types)} entries, layer_plan {len(blocks)} blocks")
        if "sliding_attention" in self.layer_types and any(width(self.layer_plan, n) > 1 for n in range(len(blocks))):
            raise ValueError("layer_plan runs layers in parallel, which sliding-window attention does not support")

    def __getattribute__(self, name):
        if name in WIDER:  # of one layer, so they can be read where blocks differ, which other configurations forbid
            return object.__getattribute__(self, name)
        return super().__getattribute__(name)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name in ("layer_plan", "num_hidden_layers") and hasattr(self, "head_dim"):  # not while `__init__` runs
            self.per_layer_config = self._wide_blocks()

    def _wide_blocks(self):
        """What `per_layer_config` holds: the widths of every block of several layers; `None` if there is none."""
        plan = checked_plan(self.layer_plan)
        if len(plan["blocks"]) != self.num_hidden_layers:  # one is about to follow the other
            return None
        times = {position: width(plan, position) for position in range(self.num_hidden_layers)}
        return {n: {name: t * getattr(self, name) for name in WIDER} for n, t in times.items() if t > 1} or None

    def to_dict(self):
        return super().to_dict() | older_rope(self)

    @classmethod
    def from_plain(cls, config, layer_plan):
        """The configuration of a model of `config` with its layers rearranged into `layer_plan`.

        `config` may be that of a plain model, one of `PLAIN_MODELS`, or a `PrunedQwen2Config`; the plan it records
        says which layers there are.
        """
        plan = checked_plan(layer_plan)
        had = plan_in(config)
        position_of = {layer: position for position, block in enumerate(had["blocks"]) for layer in block}
        wanted = [layer for block in plan["blocks"] for layer in block]
        if missing := [layer for layer in wanted if layer not in position_of]:
            raise ValueError(f"layer_plan asks for layers {missing}; the model has layers {sorted(position_of)}")
        if plan["num_teacher_layers"] != had["num_teacher_layers"]:
            raise ValueError(
                f"layer_plan is for a teacher of {plan['num_teacher_layers']} layers; the model's has "
                f"{had['num_teacher_layers']}"
            )
        merged = sorted(block for block in had.get("merged", []) if not {*block}.isdisjoint(wanted))
        if new := [block for block in plan.get("merged", []) if block not in merged]:
            raise ValueError(f"layer_plan merges layers {new}, which takes data: hf_layerprune.merge does it")
        if apart := [block for block in merged if block not in plan.get("merged", [])]:
            raise ValueError(f"layer_plan takes apart layers {apart}, which the model has merged into one")
        first = [position_of[block[0]] for block in plan["blocks"]]
        values = config.to_dict() | older_rope(config) | cls.attention_of(config)
        values |= {"layer_plan": plan, "num_hidden_layers": len(plan["blocks"])}
        if "layer_types" in values:
            values["layer_types"] = [config.layer_types[position] for position in first]
        windows_from = getattr(config, "max_window_layers", config.num_hidden_layers)
        values["max_window_layers"] = sum(position < windows_from for position in first)
        for key in FOREIGN_FIELDS:
            values.pop(key, None)
        return cls(**values, attn_implementation=config._attn_implementation)

    @classmethod
    def attention_of(cls, config):
        """The fields of `PLAIN_MODELS` for `config`, or a `ValueError` that says why there are none."""
        if config.model_type == cls.model_type:
            return {"attention_bias": config.attention_bias, "qk_norm": config.qk_norm}
        if config.model_type not in PLAIN_MODELS:
            raise ValueError(f"model_type={config.model_type!r}; layer_plan works on {', '.join(PLAIN_MODELS)}")
        fields = PLAIN_MODELS[config.model_type]
        for name, expected in (*fields.items(), ("mlp_bias", False)):
            if getattr(config, name, expected) != expected:
                raise ValueError(
                    f"{name}={getattr(config, name)}: biases that {config.model_type} models do not have by default "
                    "have no place in a block"
                )
        return fields


def older_rope(config):
    """The `rope_parameters` of `config` as transformers 4 reads them, which does not know that name."""
    scaling = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in scaling:
        return {}
    theta, kind = scaling.pop("rope_theta"), scaling.get("rope_type", "default")
    if kind == "yarn" and scaling.get("original_max_position_embeddings") == config.max_position_embeddings:
        del scaling["original_max_position_embeddings"]  # the default, but transformers 4 then ignores the factor
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}


def width(plan, position):
    """How many layers wide block `position` is."""
    block = plan["blocks"][position]
    return 1 if block in plan.get("merged", []) else len(block)


def plan_in(config):
    """The plan that `config` records; without one each of its layers is a block of its own."""
    plan, depth = getattr(config, "layer_plan", None), config.num_hidden_layers
    return checked_plan({"num_teacher_layers": depth, "blocks": [[n] for n in range(depth)]} if plan is None else plan)


def checked_plan(plan):
    """A layer plan as plain lists and integers, or a `ValueError` that says what is wrong with it."""
    plan = plan.to_dict() if hasattr(plan, "to_dict") else plan
    if not isinstance(plan, dict) or set(plan) - {"merged"} != {"num_teacher_layers", "blocks"}:
        raise ValueError(f'layer_plan={plan!r:.200} needs the keys "num_teacher_layers" and "blocks"')
    depth, blocks, merged = plan["num_teacher_layers"], plan["blocks"], plan.get("merged") or []
    kinds = (list, tuple)
    if not all(isinstance(value, kinds) and all(isinstance(b, kinds) for b in value) for value in (blocks, merged)):
        raise ValueError(f"layer_plan={plan!r:.200} needs lists of lists of layers")
    blocks, merged = [list(block) for block in blocks], [list(block) for block in merged]
    layers = [layer for block in blocks for layer in block]
    if not blocks or not all(blocks) or any(type(number) is not int for number in (*layers, depth)):
        raise ValueError(f"layer_plan={plan!r:.200} needs integers, and at least one in every block")
    ascend = all(a < b for a, b in zip([-1, *layers], [*layers, depth], strict=True))
    if not ascend or depth > MAX_LAYERS:
        raise ValueError(
            f"layer_plan has layers {layers!r:.200} of {depth!r:.200}; they must ascend from 0 to at most one less, "
            f"and a teacher may have {MAX_LAYERS}"
        )
    if any(block not in blocks or len(block) < 2 for block in merged):
        raise ValueError(f"layer_plan has merged={merged!r:.200}; these must be blocks of several layers")
    return {"num_teacher_layers": depth, "blocks": blocks} | ({"merged": merged} if merged else {})


__all__ = ["PrunedQwen2Config"]
