"""Blocks of Qwen3 layers on a mesh of tensor and data parallelism, against themselves in one process."""

import torch
import torch.distributed as dist
from families import BLOCKS, family_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_layerprune import LayerPlan
from hf_layerprune.surgery import apply_plan

PROJECTIONS = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}


def main() -> None:
    dist.init_process_group("gloo")
    ids = torch.arange(24).view(2, 12) * 7 % 256
    for names in (("tp", "dp"), ("dp", "tp")):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        whole, split = (apply_plan(family_model("qwen3", num_layers=7), LayerPlan(BLOCKS, 7)) for _ in range(2))
        for layer in split.model.layers:
            parallelize_module(layer, mesh["tp"], PROJECTIONS)
            if names == ("dp", "tp"):  # the only order in which both split the same weights
                fully_shard(layer, mesh=mesh["dp"])
        with torch.no_grad():
            difference = (split(ids, use_cache=False).logits - whole(ids, use_cache=False).logits).abs().max()
        assert difference < 1e-4, (names, difference)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
