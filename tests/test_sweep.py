"""Scoring a model whose layers are not in memory: the same numbers from one reading of its weights."""

import gc

import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from conftest import VOCAB_SIZE, random_batches, tiny_model
from safetensors.torch import load_file

from hf_layerprune import LayerPruneError, parallelize, prune, score_layers
from hf_layerprune.cli.score import device_map
from hf_layerprune.loading import load_model
from hf_layerprune.plan import Edit
from hf_layerprune.scoring import Race, contiguous_block, score
from hf_layerprune.scoring.sweep import is_offloaded, sweep
from hf_layerprune.surgery import plan_of


def on_disk(model, folder, **kwargs):
    model.save_pretrained(folder / "model")
    where = device_map(str(folder / "model"), torch.device("cpu"))
    return load_model(str(folder / "model"), device_map=where, offload_folder=str(folder / "offload"), **kwargs)


@pytest.fixture
def read(monkeypatch):
    """Bytes of weights that were read, by name."""
    found, get = [], OffloadedWeightsLoader.__getitem__

    def counting(self, key):
        tensor = get(self, key)
        found.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
    return found


@pytest.mark.parametrize("criterion", ["kl", "loss"])
def test_the_same_numbers(model, batches, tmp_path, criterion):
    expected = score_layers(model, batches, criterion)
    offloaded = on_disk(model, tmp_path)
    assert is_offloaded(offloaded) and not is_offloaded(model)
    scores = score_layers(offloaded, batches, criterion)
    assert scores.values == pytest.approx(expected.values, rel=1e-5)
    assert scores.standard_errors == pytest.approx(expected.standard_errors, rel=1e-4)
    assert scores.baseline == pytest.approx(expected.baseline, abs=1e-6) and scores.num_tokens == expected.num_tokens


def test_against_a_teacher_in_memory_or_on_disk(batches, tmp_path):
    teacher = tiny_model(6)
    student = prune(teacher, [2])
    expected = score_layers(student, batches, teacher=teacher)
    offloaded = on_disk(student, tmp_path)
    assert score_layers(offloaded, batches, teacher=teacher).values == pytest.approx(expected.values, rel=1e-5)
    (tmp_path / "teacher").mkdir()
    there = on_disk(teacher, tmp_path / "teacher")
    assert score_layers(offloaded, batches, teacher=there).values == pytest.approx(expected.values, rel=1e-5)


def test_a_student_with_pairs(batches, tmp_path):
    student = parallelize(tiny_model(6), [(3, 4)])
    edits = [Edit.remove(n) for n in (0, 1, 2, 5)]
    expected = score(student, batches, edits)
    assert score(on_disk(student, tmp_path), batches, edits).values == pytest.approx(expected.values, rel=1e-5)


def test_every_weight_of_a_layer_is_read_once(model, tmp_path, read):
    offloaded = on_disk(model, tmp_path)
    read.clear()
    score_layers(offloaded, random_batches(4))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(read) == sum(w.numel() * w.element_size() for name, w in weights.items() if ".layers." in name)
    assert next(offloaded.model.layers[2].mlp.parameters()).device.type == "meta"  # and let go again


def test_little_memory_takes_more_sweeps_and_changes_nothing(model, batches, tmp_path, read):
    plans = [Edit.remove(n).apply(plan_of(model)) for n in range(5)]
    with torch.no_grad():
        offloaded = on_disk(model, tmp_path)
        whole = sweep(offloaded, batches, plans, "kl", offloaded)
        read_once = sum(read)
        tight = sweep(offloaded, batches, plans, "kl", offloaded, max_state_bytes=1)
    assert sum(read) == 6 * read_once
    torch.testing.assert_close(tight.sums[0], whole.sums[0])


@pytest.mark.parametrize("allowed", [3, 4, 7])
def test_no_more_states_are_held_than_allowed(model, tmp_path, allowed):
    batches = [{"input_ids": batch} for batch in torch.randint(0, VOCAB_SIZE, (5, 2, 8))]
    plans = [Edit.remove(n).apply(plan_of(model)) for n in range(5)]
    shape, most = (2, 8, model.config.hidden_size), 0

    def count(*_):
        nonlocal most
        gc.collect()
        held = {t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape}
        most = max(most, len(held))

    with torch.no_grad():
        offloaded = on_disk(model, tmp_path)
        for layer in offloaded.model.layers:
            layer.mlp.register_forward_pre_hook(count)
        bytes_of_all = 5 * 2 * 8 * model.config.hidden_size * 4
        sweep(offloaded, batches, plans, "kl", offloaded, max_state_bytes=allowed * bytes_of_all)
    inside = 4  # of the layer that runs: residual, normalized input, output of attention, their sum
    assert 5 * (allowed - 1) < most <= 5 * allowed + inside


def test_what_a_sweep_cannot_do_is_said(model, batches, tmp_path):
    offloaded = on_disk(model, tmp_path)
    with pytest.raises(LayerPruneError, match="not running layers in parallel"):
        score(offloaded, batches, [Edit.parallelize(1, 2)])
    with pytest.raises(LayerPruneError, match="leave out a race, or load it into memory"):
        score_layers(offloaded, batches, race=Race())
    for criterion in ("taylor", "block_influence"):
        with pytest.raises(LayerPruneError, match=f"leave out criterion='{criterion}'"):
            score_layers(offloaded, batches, criterion)
    with pytest.raises(LayerPruneError, match="leave out 'angular_distance'"):
        contiguous_block(offloaded, batches, 2)
    assert score_layers(offloaded, None, "tail").safest == 4


def test_an_embedding_on_disk_is_read_once(tmp_path, read):
    model = tiny_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    where = device_map(str(tmp_path / "model"), torch.device("cpu")) | {"model.embed_tokens": "disk"}
    offloaded = load_model(str(tmp_path / "model"), device_map=where, offload_folder=str(tmp_path / "offload"))
    read.clear()
    scores = score_layers(offloaded, random_batches(4))
    assert scores.values == pytest.approx(score_layers(model, random_batches(4)).values, rel=1e-5)
    assert sum(read) <= 1.2 * sum(w.numel() * w.element_size() for w in model.parameters())


def test_the_weights_are_let_go_when_a_layer_fails(model, batches, tmp_path, monkeypatch):
    offloaded = on_disk(model, tmp_path)
    monkeypatch.setattr(offloaded.model.layers[3].mlp.act_fn, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_layers(offloaded, batches)
    assert next(offloaded.model.layers[3].mlp.parameters()).device.type == "meta"
    monkeypatch.undo()
    assert score_layers(offloaded, batches).values == pytest.approx(score_layers(model, batches).values, rel=1e-5)
