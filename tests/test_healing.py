import copy

import pytest
import torch
from conftest import tiny_config, tiny_model
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from trl.models.activation_offloading import OffloadActivations

from hf_layerprune import IterativeLayerDistillTrainer, prune
from hf_layerprune._trl import keep_weights_in_place
from hf_layerprune.trainer import healing
from hf_layerprune.trainer.healing import HealingTrainer


def make_healing(tmp_path, tokenizer, teacher, blocks=(0, 1, 2, 3), peft_config=None, **changes):
    """The healing of a student without layer 2 whose `blocks` are trained."""
    sentence = "It was the best of times, it was the worst of times."
    rows = [{"text": sentence[: 9 * n]} for n in (3, 1, 2, 1, 1, 2, 3, 1) * 2]
    trainer = IterativeLayerDistillTrainer(
        model=teacher,
        args=tiny_config(tmp_path, **changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    return HealingTrainer(
        trainer, prune(teacher, [2], share_weights=True), list(blocks), trainer.train_dataset, tmp_path
    )


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", [(0, 1, 2, 3), (1, 2)])
def test_activation_offloading_gives_the_same_gradients(tmp_path, tokenizer, monkeypatch, checkpointing, trained):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))  # offload to itself
    offloading = OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=1)
    trained_layers = "all" if len(trained) == 4 else "neighbours"
    settings = {"packing": False, "lm_weight": 0.1, "trained_layers": trained_layers}
    trainer = make_healing(tmp_path, tokenizer, tiny_model(), trained, **settings)
    student = trainer.model.train()
    trainer.accelerator.prepare_model(student)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    batch = next(iter(trainer.get_train_dataloader()))
    results = []
    for on in (False, True):
        if on:
            trainer.owner.args.activation_offloading = True
            trainer.owner.maybe_activation_offload_context = offloading
            keep_weights_in_place(trainer.owner, student)
        student.zero_grad()
        trainer.training_step(student, copy.copy(batch), torch.tensor(20))
        results.append(gradients(trainer))
    assert offloading.tensor_id > 0 and not offloading.tracker, "what was saved was moved and came back"
    assert offloading.param_storages == {p.untyped_storage().data_ptr() for p in student.parameters()}
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0, msg=name)


def test_each_part_of_the_loss_is_logged(tmp_path, tokenizer):
    trainer = make_healing(tmp_path, tokenizer, tiny_model(), lm_weight=0.1, hidden_weight=1.0, max_steps=2)
    trainer.train()
    logged = trainer.state.log_history[0]
    for name in ("loss", "kl_loss", "hidden_loss", "final_hidden_loss", "lm_loss"):
        assert logged[name] > 0, name
    weighted = logged["kl_loss"] + (logged["hidden_loss"] + logged["final_hidden_loss"]) / 2 + 0.1 * logged["lm_loss"]
    assert logged["loss"] == pytest.approx(weighted, rel=1e-3)


class Waits(TorchDispatchMode):
    """Names the operations that a GPU is waited for: values that Python reads, and selections by a mask."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = "index" in name and len(args) > 1 and isinstance(args[1], (list, tuple)) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )  # fmt: skip
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_hardly_waits_for_the_device(tmp_path, tokenizer):
    trainer = make_healing(tmp_path, tokenizer, tiny_model(), (1, 2), packing=False, trained_layers="neighbours")
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all() and trainer.compared
    with Waits() as waits:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(20)).backward()
    # the labels and the places that count; and two of transformers, which looks at the teacher's mask
    assert len(waits.names) <= 4, waits.names


def test_completion_only_masks_reach_the_loss(tmp_path, tokenizer):
    rows = [{"prompt": "The answer to everything is ", "completion": "forty-two."}] * 4
    teacher = tiny_model()
    trainer = IterativeLayerDistillTrainer(
        model=teacher,
        args=tiny_config(tmp_path, packing=False, max_length=64),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inner = HealingTrainer(trainer, prune(teacher, [1]), [0], trainer.train_dataset, tmp_path)
    batch = next(iter(inner.get_train_dataloader()))
    parts = inner.loss_parts(inner.model, batch)
    assert parts["num_tokens"] == 2 * len("forty-two." + "\0")  # two rows; the end token counts


def test_the_layers_of_both_models_are_compiled_while_they_heal(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(healing, "COMPILER", "eager")
    results, seen = [], []
    for on in (False, True):
        torch.compiler.reset()
        trainer = make_healing(
            tmp_path / str(on), tokenizer, tiny_model(), (1, 2), trained_layers="neighbours", compile_layers=on
        )
        torch._dynamo.utils.counters.clear()
        healed, _ = trainer.heal(torch.float32)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        results.append({name: weight.clone() for name, weight in healed.named_parameters()})
        compiled = [m for m in (*healed.modules(), *trainer.teacher.modules()) if m._compiled_call_impl is not None]
        assert not compiled, "rows of other lengths follow"
    assert seen[0] == 0 and seen[1] > 1
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], msg=name)
