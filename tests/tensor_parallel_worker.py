"""Every family with parallel layers, split over the processes it is run in, against itself in one process."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import BLOCKS, FAMILIES, family_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_layerprune import LayerPlan
from hf_layerprune.surgery import apply_plan


def whole(tensor):
    return getattr(tensor, "full_tensor", lambda: tensor)()


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    ids = torch.arange(24).view(2, 12) * 7 % 256
    for family in FAMILIES:
        model = apply_plan(family_model(family, num_layers=7), LayerPlan(BLOCKS, 7))
        if dist.get_rank() == 0:
            model.save_pretrained(folder / family)
        dist.barrier()
        split = AutoModelForCausalLM.from_pretrained(
            folder / family, distributed_config=DistributedConfig(tp_plan="auto")
        )
        with torch.no_grad():
            difference = (whole(split(ids, use_cache=False).logits) - model(ids).logits).abs().max()
            assert difference < 1e-4, (family, difference)
        for form in (split, model):
            form(ids, labels=ids, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.testing.assert_close(whole(split.get_parameter(name).grad), parameter.grad, atol=1e-5, rtol=1e-4)
        generated = split.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(generated, model.generate(ids, max_new_tokens=6, do_sample=False)), family
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
