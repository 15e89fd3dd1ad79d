"""Recorded states are those that transformers returns, and what is replayed from them is the rest of the model."""

import pytest
import torch
from conftest import random_batches, tiny_model

from hf_layerprune import prune
from hf_layerprune.forward import final_states, inference, record, replay


@pytest.fixture
def run(model):
    """A model, a batch, and its states: of every block and of the final norm."""
    (batch,) = random_batches(1)
    with inference(model):
        yield model, batch, [*model(**batch, output_hidden_states=True).hidden_states[:-1], final_states(model, batch)]


def test_recorded_states_are_the_models(run):
    model, batch, states = run
    entered = []
    projection = model.model.layers[2].mlp.down_proj
    handle = projection.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    recording = record(model, batch, range(6), {2: projection})
    handle.remove()
    assert list(recording.states) == list(recording.arguments) == list(range(6))
    for number in range(5):
        assert torch.equal(recording.states[number], states[number])
    assert torch.equal(recording.final, states[5]) and torch.equal(model.model.norm(recording.states[5]), states[5])
    assert torch.equal(recording.inner[2], entered[0]) and list(recording.inner) == [2]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pass_stops_at_the_last_state(run):
    model, batch, states = run
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
    recording = record(model, batch, {3, 1}, stop=True)
    assert len(calls) == 3 and recording.final is None and recording.states.keys() == {1, 3}
    assert torch.equal(recording.states[3], states[3])
    for handle in handles:
        handle.remove()


def test_hooks_go_when_a_pass_fails(model):
    with pytest.raises(IndexError):
        record(model, {"input_ids": torch.tensor([[10**6]])}, [0])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_replayed_is_the_rest_of_the_model(run):
    model, batch, states = run
    recording = record(model, batch | {"labels": batch["input_ids"]}, [2, 3])
    replayed = replay(recording, 2, model.model.layers[2:], model.model.norm, {3})
    assert torch.equal(replayed.final, states[5]) and replayed.states.keys() == {3}
    assert torch.equal(replayed.states[3], states[3])
    without = replay(recording, 3, model.model.layers[4:], model.model.norm)  # state 3 to block 4: without layer 3
    assert torch.equal(without.final, final_states(prune(model, [3]), batch))


def test_inference_gives_every_model_its_mode_back():
    first, second = tiny_model().train(), tiny_model()
    with pytest.raises(ZeroDivisionError), inference(first, second):
        assert not first.training and not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert first.training and not second.training and torch.is_grad_enabled()
