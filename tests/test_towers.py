"""What student and teacher have in common is held and run once, with the same loss and gradients."""

import copy

import pytest
import torch
from conftest import random_batches, tiny_config, tiny_model
from datasets import Dataset
from peft import LoraConfig

from hf_layerprune import IterativeLayerDistillTrainer, parallelize, prune
from hf_layerprune.data import valid_next_tokens
from hf_layerprune.surgery import plan_of, share_equal_weights
from hf_layerprune.trainer.healing import compared_states, run_towers, shared_depth
from hf_layerprune.trainer.rounds import Rounds
from hf_layerprune.trainer.trainable import make_trainable


def pair(blocks=(2, 3), removed=(3,), pairs=(), **changes):
    """A teacher, a student of it with trained `blocks`, and the states to compare."""
    teacher = tiny_model(6, **changes)
    student = prune(teacher, list(removed), share_weights=True)
    student = parallelize(student, pairs, share_weights=True) if pairs else student
    student = make_trainable(student, list(blocks), everything=False)
    return teacher, student, compared_states(plan_of(student), plan_of(teacher), list(blocks))


def loss_of(towers):
    pairs = [*zip(towers.student, towers.teacher, strict=True), (towers.student_final, towers.teacher_final)]
    return sum((own - its).pow(2).sum() for own, its in pairs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"removed": (1, 3), "blocks": (1, 2)},
        {"removed": (5,), "blocks": (4,)},
        {"pairs": [(4, 5)], "blocks": (3,)},
    ],
)
def test_states_and_gradients_are_those_of_two_whole_passes(settings, checkpointing):
    teacher, student, states = pair(**settings)
    depth = shared_depth(student, teacher)
    assert depth == min(settings.get("blocks", (2,))[0], *(settings.get("removed", (3,))))
    if checkpointing:
        student.train().gradient_checkpointing_enable({"use_reentrant": False})
    (batch,) = random_batches(1)
    valid, _ = valid_next_tokens(batch)
    results = []
    for shared in (depth, None):
        student.zero_grad()
        towers = run_towers(student, teacher, batch, valid, states, shared)
        loss = loss_of(towers)
        loss.backward()
        found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        results.append((loss.detach(), towers.student_final.detach(), towers.teacher_final, found))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_students_lower_blocks_do_not_run_and_nothing_is_stored_below_the_trained():
    teacher, student, states = pair(blocks=(3, 4), removed=(2,))
    (batch,) = random_batches(1)
    calls = []
    for position, layer in enumerate(student.model.layers):
        layer.register_forward_hook(lambda _, __, out, p=position: calls.append((p, out.requires_grad)))
    run_towers(student, teacher, batch, valid_next_tokens(batch)[0], states, shared_depth(student, teacher))
    assert calls == [(2, False), (3, True), (4, True)]


def test_what_stands_in_the_way_of_sharing():
    teacher, student, _ = pair()
    assert shared_depth(student, teacher) == 2
    copied = copy.deepcopy(student)
    assert shared_depth(copied, teacher) is None
    share_equal_weights(copied, teacher)
    assert shared_depth(copied, teacher) == 2
    assert {p.data_ptr() for p in copied.model.layers[2].parameters()} <= {
        p.data_ptr() for p in teacher.parameters()
    }  # equal until it is trained, and then it has memory of its own
    student.set_attn_implementation("eager")
    assert shared_depth(student, teacher) is None
    teacher, student, _ = pair(attention_dropout=0.1)
    assert shared_depth(student, teacher) is None
    teacher, student, _ = pair()
    assert shared_depth(make_trainable(student, list(range(5)), everything=True), teacher) is None


def test_only_equal_weights_are_shared():
    teacher = tiny_model(6)
    student = prune(teacher, [2])
    with torch.no_grad():
        student.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    share_equal_weights(student, teacher)
    theirs = {p.data_ptr() for p in teacher.parameters()}
    own = [name for name, p in student.named_parameters() if p.data_ptr() not in theirs]
    assert own == ["model.layers.3.mlp.up_proj.weight"]
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name])


def test_adapters_are_trained_above_the_shared_blocks():
    teacher = tiny_model(6)
    student = prune(teacher, [3], share_weights=True)
    adapted = make_trainable(student, [3], False, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert shared_depth(adapted, teacher) == 3


@pytest.fixture
def make(tmp_path, tokenizer):
    def build(folder="run", model=None, **changes):
        rows = [{"text": "It was the best of times, it was the worst of times. " * 2}] * 12
        settings = {"target_num_layers": 4, "trained_layers": "neighbours", "measure_speed": False, "max_steps": 2}
        return IterativeLayerDistillTrainer(
            model=model or tiny_model(6), args=tiny_config(tmp_path / folder, **settings | changes),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip

    return build


def test_rounds_hold_one_model_and_what_they_trained(make, healings, monkeypatch):
    trainer = make()
    held, heal = [], Rounds._heal

    def watched(self, student, plan):
        result = heal(self, student, plan)
        models = (trainer.teacher, trainer.start, result[0])
        storages = {p.data_ptr(): p.numel() for model in models for p in model.parameters()}
        held.append((sum(storages.values()), healings[-1].shared_depth))
        return result

    monkeypatch.setattr(Rounds, "_heal", watched)
    trainer.train()
    layer = sum(p.numel() for p in trainer.teacher.model.layers[0].parameters())
    for number, (numbers, depth) in enumerate(held, 1):
        assert depth is not None
        assert numbers <= trainer.teacher.num_parameters() + 2 * number * layer


def test_a_run_with_shared_blocks_ends_as_one_without(make, healings, monkeypatch):
    ours = make()
    ours.train()
    assert healings[-1].shared_depth is not None
    monkeypatch.setattr("hf_layerprune.trainer.healing.shared_depth", lambda *_: None)
    plain = make("plain")
    plain.train()
    assert healings[-1].shared_depth is None
    for (name, a), b in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
