import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model
from datasets import Dataset
from transformers import TrainerCallback
from trl.models.activation_offloading import OffloadActivations

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError, prune
from hf_layerprune.surgery import plan_of, unshare_parameters
from hf_layerprune.trainer._trl import leave_weights, swap_model
from hf_layerprune.trainer.targets import HiddenStateMap
from hf_layerprune.trainer.towers import shared_depth
from hf_layerprune.trainer.trainable import make_trainable


def make_trainer(tmp_path, tokenizer, teacher, removed=(2,), **changes):
    """A trainer in the middle of a round: student without `removed`, everything trained."""
    sentence = "It was the best of times, it was the worst of times."
    rows = [{"text": sentence[: 9 * n]} for n in (3, 1, 2, 1, 1, 2, 3, 1) * 2]
    trainer = IterativeLayerDistillTrainer(
        model=teacher,
        args=tiny_config(tmp_path, **changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    student = prune(teacher, list(removed))
    unshare_parameters(student.parameters())
    student.requires_grad_(True)
    plan = plan_of(student)
    trainer.hidden_state_map = HiddenStateMap.of(plan, plan_of(teacher), list(range(plan.depth)))
    swap_model(trainer, student)
    return trainer


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def relative_mse(x, y):
    return (x - y).pow(2).mean(-1) / y.pow(2).mean(-1)


def dense_divergence(p, q, beta):
    if beta in (0, 1):
        return ((p.exp() * (p - q)) if beta == 0 else (q.exp() * (q - p))).sum()
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum()


def reference_parts(student, teacher, batch, states, distance=relative_mse, beta=0.0, updates=False):
    """The three parts of the loss per token, from full logits and all hidden states, one row at a time."""
    kl = hidden = final = 0.0
    count = 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        row = ids[None, :length]
        s, t = student(row, output_hidden_states=True), teacher(row, output_hidden_states=True)
        p, q = F.log_softmax(t.logits[0, :-1], -1), F.log_softmax(s.logits[0, :-1], -1)
        kl = kl + dense_divergence(p, q, beta)
        distances = []
        for a, b, start in zip(states.student, states.teacher, states.teacher_start, strict=True):
            x, y = s.hidden_states[a + 1][0, :-1], t.hidden_states[b + 1][0, :-1]
            if updates:
                x, y = x - s.hidden_states[a][0, :-1], y - t.hidden_states[start][0, :-1]
            distances.append(distance(x, y).sum())
        hidden = hidden + torch.stack(distances).mean()
        x, y = s.hidden_states[-1][0, :-1], t.hidden_states[-1][0, :-1]
        final = final + distance(x, y).sum()
        count += length - 1
    return kl / count, hidden / count, final / count


def test_loss_and_gradients_equal_the_plain_formula(tmp_path, tokenizer):
    teacher = tiny_model()
    trainer = make_trainer(tmp_path, tokenizer, teacher, packing=False, kl_weight=0.7, hidden_weight=0.4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all(), "rows of different length, so that padding matters"
    loss = trainer.compute_loss(trainer.model, copy.copy(batch))
    loss.backward()
    ours = gradients(trainer)
    trainer.model.zero_grad()
    kl, hidden, final = reference_parts(trainer.model, teacher, batch, trainer.hidden_state_map)
    expected = 0.7 * kl + 0.4 * (hidden + final) / 2
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    reference = gradients(trainer)
    assert set(ours) == set(reference) == {name for name, _ in trainer.model.named_parameters()}
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("trained", [(0, 1, 2, 3), (1, 2)])
@pytest.mark.parametrize(
    "switches",
    [
        {"beta": 0.4},
        {"beta": 1.0},
        {"hidden_distance": "cosine"},
        {"hidden_target": "updates"},
        {"beta": 0.6, "hidden_distance": "cosine", "hidden_target": "updates"},
    ],
    ids=str,
)
def test_every_switch_equals_the_plain_formula(tmp_path, tokenizer, switches, trained):
    teacher = tiny_model()
    trainer = make_trainer(tmp_path, tokenizer, teacher, packing=False, kl_weight=0.7, hidden_weight=0.4, **switches)
    student = make_trainable(prune(teacher, [2], share_weights=True), list(trained), everything=len(trained) == 4)
    trainer.hidden_state_map = HiddenStateMap.of(plan_of(student), plan_of(teacher), list(trained))
    trainer.shared_depth = shared_depth(student, teacher)
    assert trainer.shared_depth == (None if len(trained) == 4 else 1)
    swap_model(trainer, student)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, copy.copy(batch))
    loss.backward()
    ours = gradients(trainer)
    trainer.model.zero_grad()
    how = {
        "distance": relative_mse
        if "hidden_distance" not in switches
        else lambda x, y: 1 - F.cosine_similarity(x, y, -1),
        "beta": switches.get("beta", 0.0),
        "updates": "hidden_target" in switches,
    }
    kl, hidden, final = reference_parts(trainer.model, teacher, batch, trainer.hidden_state_map, **how)
    expected = 0.7 * kl + 0.4 * (hidden + final) / 2
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    reference = gradients(trainer)
    assert set(ours) == set(reference)
    for name, gradient in reference.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)


@pytest.mark.parametrize("rows, steps", [(8, 1), (2, 4)])
def test_balanced_parts_have_one_size_however_steps_are_split(tmp_path, tokenizer, rows, steps):
    trainer = make_trainer(
        tmp_path / str(rows), tokenizer, tiny_model(), loss_preset="balanced", max_steps=3, logging_steps=1,
        per_device_train_batch_size=rows, gradient_accumulation_steps=steps, learning_rate=0.0, weight_decay=0.0,
    )  # fmt: skip
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(trainer.balance.weight)

    trainer.add_callback(Watch())
    super(IterativeLayerDistillTrainer, trainer).train()
    first, second, third = trainer.state.log_history[:3]
    hidden = [(entry["hidden_loss"] + entry["final_hidden_loss"]) / 2 for entry in (first, second, third)]
    assert first["loss"] == pytest.approx(first["kl_loss"] + hidden[0], rel=0.02)
    assert second["loss"] == pytest.approx(second["kl_loss"] + weights[0] * hidden[1], rel=0.02)
    assert weights[0] == pytest.approx(first["kl_loss"] / hidden[0], rel=0.02)
    assert weights[1] == pytest.approx(second["kl_loss"] / hidden[1], rel=0.02)


def test_lm_part_is_added(tmp_path, tokenizer):
    teacher = tiny_model()
    trainer = make_trainer(tmp_path, tokenizer, teacher, lm_weight=0.5, kl_weight=0.0, hidden_weight=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, copy.copy(batch))
    expected = 0.5 * trainer.model(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_every_accumulation_split_gives_the_same_gradients(tmp_path, tokenizer, packing):
    teacher = tiny_model()
    results = []
    for rows, steps in ((8, 1), (1, 8), (2, 4)):
        trainer = make_trainer(
            tmp_path / str(rows), tokenizer, teacher, packing=packing, max_steps=1, learning_rate=0.0,
            weight_decay=0.0, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_grad_norm=1e9,
        )  # fmt: skip
        captured = {}

        def keep(optimizer, args, kwargs, trainer=trainer, into=captured):
            into.update(gradients(trainer))

        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(keep)
        super(IterativeLayerDistillTrainer, trainer).train()
        assert captured
        results.append(captured)
    for other in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_paper_preset_is_the_authors_sum(tmp_path, tokenizer):
    teacher = tiny_model()
    trainer = make_trainer(tmp_path, tokenizer, teacher, loss_preset="paper")
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, copy.copy(batch))
    with torch.no_grad():
        s = trainer.model(**batch, output_hidden_states=True)
        t = teacher(**batch, output_hidden_states=True)
        keep = batch["attention_mask"][:, 1:].bool()
        p, q = F.log_softmax(t.logits[:, :-1], -1)[keep], F.log_softmax(s.logits[:, :-1], -1)[keep]
        expected = (p.exp() * (p - q)).sum() / 100
        a, b = trainer.hidden_state_map.student[-1], trainer.hidden_state_map.teacher[-1]
        expected += F.mse_loss(s.hidden_states[a + 1][:, :-1][keep], t.hidden_states[b + 1][:, :-1][keep])
        expected += F.mse_loss(s.hidden_states[-1][:, :-1][keep], t.hidden_states[-1][:, :-1][keep])
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, tokenizer):
    teacher = tiny_model()
    trainer = make_trainer(tmp_path, tokenizer, teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    results = []
    for checkpointing in (False, True):
        trainer.model.train()
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, copy.copy(batch)).backward()
        results.append(gradients(trainer))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", [(0, 1, 2, 3), (1, 2)])
def test_activation_offloading_gives_the_same_gradients(tmp_path, tokenizer, monkeypatch, checkpointing, trained):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))  # offload to itself
    offloading = OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=1)
    teacher = tiny_model()
    trainer = make_trainer(tmp_path, tokenizer, teacher, packing=False, lm_weight=0.1)
    student = make_trainable(prune(teacher, [2], share_weights=True), list(trained), everything=len(trained) == 4)
    trainer.shared_depth = shared_depth(student, teacher)
    trainer.hidden_state_map = HiddenStateMap.of(plan_of(student), plan_of(teacher), list(trained))
    swap_model(trainer, student.train())
    trainer.accelerator.prepare_model(student)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    batch = next(iter(trainer.get_train_dataloader()))
    results = []
    for on in (False, True):
        if on:
            trainer.args.activation_offloading, trainer.maybe_activation_offload_context = True, offloading
            leave_weights(trainer, student)
        student.zero_grad()
        trainer.training_step(student, copy.copy(batch), torch.tensor(20))
        results.append(gradients(trainer))
    assert offloading.tensor_id > 0 and not offloading.tracker, "what was saved was moved and came back"
    assert offloading.param_storages == {p.untyped_storage().data_ptr() for p in student.parameters()}
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0, msg=name)


def test_activation_offloading_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(LayerPruneError, match="activation_offloading"):
        tiny_config(tmp_path, activation_offloading=True)


def test_each_part_of_the_loss_is_logged(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, tiny_model(), lm_weight=0.1, hidden_weight=1.0, max_steps=2)
    super(IterativeLayerDistillTrainer, trainer).train()
    logged = trainer.state.log_history[0]
    for name in ("loss", "kl_loss", "hidden_loss", "final_hidden_loss", "lm_loss"):
        assert logged[name] > 0, name
    weighted = logged["kl_loss"] + (logged["hidden_loss"] + logged["final_hidden_loss"]) / 2 + 0.1 * logged["lm_loss"]
    assert logged["loss"] == pytest.approx(weighted, rel=1e-3)


def test_completion_only_masks_reach_the_loss(tmp_path, tokenizer):
    rows = [{"prompt": "The answer to everything is ", "completion": "forty-two."}] * 4
    teacher = tiny_model()
    trainer = IterativeLayerDistillTrainer(
        model=teacher,
        args=tiny_config(tmp_path, packing=False, max_length=64),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.hidden_state_map = HiddenStateMap((), ())
    batch = next(iter(trainer.get_train_dataloader()))
    parts = trainer.loss_parts(prune(teacher, [1]), batch)
    assert parts["num_tokens"] == 2 * len("forty-two." + "\0")  # two rows; the end token counts
