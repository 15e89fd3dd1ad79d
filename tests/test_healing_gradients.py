"""Loss and gradients of an optimizer step are those of the plain formula: for every switch, however it is split."""

import pytest
import torch
from conftest import tiny_model
from healing_reference import loss_of_step
from peft import LoraConfig
from test_healing import gradients, make_healing

PACKING = {"packing": True, "packing_strategy": "bfd"}
TOGETHER = {
    "temperature": 1.6, "beta": 0.6, "lm_weight": 0.3, "gradient_checkpointing": True, **PACKING,
}  # fmt: skip
ALONE = [
    {},
    {"trained_layers": "all"},
    {"lora": True},
    {"temperature": 2.5},
    {"beta": 0.4},
    {"beta": 1.0},
    {"kl_weight": 0.0},
    {"lm_weight": 0.3},
    {"loss_preset": "paper"},
    {"gradient_checkpointing": True},
    PACKING,
]


def ready(tmp_path, tokenizer, lora=False, **changes):
    """A trainer in the middle of a round, with layer 2 removed and the layers beside the gap trained."""
    settings = {"packing": False, "trained_layers": "neighbours"}
    settings |= {} if changes.get("loss_preset") else {"kl_weight": 0.7, "hidden_weight": 0.4}
    settings |= {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e9}
    everything = (settings | changes).get("trained_layers") == "all"
    blocks = list(range(4)) if everything else [1, 2]
    peft = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = make_healing(tmp_path, tokenizer, tiny_model(), blocks, peft, **settings | changes)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, and so is the gradient of the other half
            torch.nn.init.normal_(parameter, std=0.2)
    assert trainer.shared_depth == (None if everything else 1)
    return trainer


def step(trainer):
    """Micro-batches and gradients of the step that a trainer takes."""
    batches, found, compute_loss = [], {}, trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        batches.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: found.update(gradients(trainer)))
    trainer.train()
    trainer.model.zero_grad()
    return batches, found


IN_MICRO_BATCHES = [*ALONE, TOGETHER | {"lora": True}, TOGETHER | {"trained_layers": "all"}]
AT_ONCE = [{}, TOGETHER]


@pytest.mark.parametrize(
    "rows, steps, switches",
    [*((2, 4, switches) for switches in IN_MICRO_BATCHES), *((8, 1, switches) for switches in AT_ONCE)],
    ids=str,
)
def test_a_step_is_that_of_the_plain_formula(tmp_path, tokenizer, switches, rows, steps):
    split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    trainer = ready(tmp_path, tokenizer, **switches, **split)
    batches, ours = step(trainer)
    assert len(batches) == steps and trainer.model.is_gradient_checkpointing == ("gradient_checkpointing" in switches)
    if "packing" in switches:
        assert all((batch["position_ids"] == 0).sum() > len(batch["input_ids"]) for batch in batches)
    else:
        assert any(not batch["attention_mask"].all() for batch in batches), "padding matters"
    expected = loss_of_step(trainer.model, trainer.teacher, batches, trainer.compared, trainer.args)
    expected.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)  # logged with few digits
    reference = gradients(trainer)
    assert ours.keys() == reference.keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, gradient in reference.items():
        assert gradient.norm() > 0 and (ours[name] - gradient).norm() < 1e-4 * gradient.norm(), name
