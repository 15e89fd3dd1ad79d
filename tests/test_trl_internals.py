"""What `hf_layerprune/_trl.py` and the trainers take from TRL and transformers without a promise of theirs.

When one of these fails after an upgrade, that is where to look.
"""

import inspect

import torch
import transformers
from conftest import tiny_config, tiny_model
from datasets import Dataset
from packaging.version import Version
from torch import nn
from transformers import Trainer
from trl import DistillationTrainer, SFTTrainer

from hf_layerprune._trl import redirect_forward, restore_forward, set_model


def test_sft_trainer_puts_its_head_in_the_instance_and_it_can_be_removed(tmp_path, tokenizer):
    model = tiny_model()
    trainer = SFTTrainer(
        model=model,
        args=tiny_config(tmp_path),
        train_dataset=Dataset.from_dict({"text": ["some text"] * 40}),
        processing_class=tokenizer,
    )
    assert "forward" in trainer.model.__dict__, "SFTTrainer no longer patches model.forward: drop restore_forward"
    restore_forward(trainer.model)
    assert trainer.model.forward.__func__ is type(model).forward

    other = tiny_model(seed=1)
    set_model(trainer, other)
    assert trainer.model is other and trainer.callback_handler.model is other
    for name in ("_prepare_dataset", "_formatting_func", "maybe_activation_offload_context"):
        assert hasattr(trainer, name), name


def test_the_on_policy_trainer_has_the_method_that_takes_token_ids():
    assert [*inspect.signature(DistillationTrainer._tokenize_prompts).parameters] == ["self", "prompts"]


def test_trainer_scales_for_accumulation_by_what_the_healing_says():
    source = inspect.getsource(Trainer)
    assert "self.current_gradient_accumulation_steps = " in source
    if Version(transformers.__version__) >= Version("5.19"):  # TRL does the same by other means before
        assert "self.loss_is_scaled_for_ga" in source


def test_torch_tells_whether_the_cpu_computes_in_bfloat16():
    assert torch.cpu._is_avx512_bf16_supported() in (True, False)
    assert torch.cpu._is_amx_tile_supported() in (True, False)


def test_redirect_forward_goes_through_the_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args):
            self.calls += 1
            return self.module(*args)

    module = nn.Linear(2, 2)
    wrapper = Wrapper(module)
    result = redirect_forward(wrapper, module, lambda x: module(x) + 1, torch.zeros(1, 2))
    assert wrapper.calls == 1
    assert torch.equal(result, module(torch.zeros(1, 2)) + 1)
