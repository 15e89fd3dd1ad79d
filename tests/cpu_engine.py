"""`hf-layerprune` in a process without a GPU, inside an engine that accelerate would only use on GPUs.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 --mixed_precision no \
        tests/cpu_engine.py compress --config recipe.yaml

Accelerate is told that its processes have devices; torch and DeepSpeed do the rest on the CPU.
"""

import os
import sys

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState


def ignoring(initialize, position):
    """`__init__` that does not hear of `cpu`, its argument at `position`."""

    def patched(self, *args, **kwargs):
        kwargs.pop("cpu", None)
        initialize(self, *args[:position], *[False for _ in args[position : position + 1]], **kwargs)

    return patched


PartialState.__init__ = ignoring(PartialState.__init__, 0)
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
AcceleratorState.__init__ = ignoring(AcceleratorState.__init__, 1)
barrier = dist.barrier
dist.barrier = lambda *_, **__: barrier()  # gloo takes no device_ids

if __name__ == "__main__":
    from hf_layerprune.cli import main

    sys.exit(main(sys.argv[1:]))
