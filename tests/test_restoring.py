"""`restore`: the teacher's own layers put back into a student."""

import copy

import pytest
import torch
from conftest import random_batches, tiny_model
from families import FAMILIES, family_model

from hf_layerprune import LayerPlan, LayerPruneError, compensate, evaluate_model, merge, parallelize, prune, restore
from hf_layerprune.surgery import plan_of


def healed(student, seed=7):
    """Every weight of a student moved a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_back_is_the_teacher(family, batches):
    teacher = family_model(family, num_layers=6)
    restored = restore(prune(teacher, [1, 2, 4]), teacher, [1, 2, 4])
    assert type(restored) is type(teacher) and plan_of(restored) == LayerPlan.identity(6)
    assert restored.config.to_dict() == prune(teacher, []).config.to_dict()
    assert torch.equal(restored(**batches[0]).logits, teacher(**batches[0]).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_comes_back_next_to_parallel_layers(family, batches):
    teacher = family_model(family, num_layers=6)
    restored = restore(parallelize(prune(teacher, [1]), [(3, 4)]), teacher, [1])
    expected = parallelize(teacher, [(3, 4)])
    assert plan_of(restored) == plan_of(expected)
    assert torch.equal(restored(**batches[0]).logits, expected(**batches[0]).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_named_layers_are_the_teachers_and_all_else_is_the_students(tied):
    teacher = tiny_model(num_layers=7, tie_word_embeddings=tied)
    student = healed(prune(teacher, [2, 3, 5]))
    before = copy.deepcopy([student.state_dict(), teacher.state_dict()])
    restored = restore(student, teacher, [1, 2, 5])
    assert plan_of(restored) == LayerPlan(((0,), (1,), (2,), (4,), (5,), (6,)), 7)
    sources = [student.model.layers[0], *(teacher.model.layers[n] for n in (1, 2)), student.model.layers[2]]
    sources += [teacher.model.layers[5], student.model.layers[3]]
    for layer, source in zip(restored.model.layers, sources, strict=True):
        for mine, theirs in zip(layer.parameters(), source.parameters(), strict=True):
            assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert [layer.self_attn.layer_idx for layer in restored.model.layers] == list(range(6))
    assert torch.equal(restored.lm_head.weight, student.lm_head.weight)
    assert torch.equal(restored.model.embed_tokens.weight, student.model.embed_tokens.weight)
    assert torch.equal(restored.model.norm.weight, student.model.norm.weight)
    assert (restored.lm_head.weight is restored.model.embed_tokens.weight) == tied
    restored.requires_grad_(False).model.layers[0].mlp.up_proj.weight.zero_()
    for model, tensors in zip((student, teacher), before, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    shared = restore(student, teacher, [1], share_weights=True)
    assert (
        shared.model.layers[0].mlp.up_proj.weight.data_ptr() == student.model.layers[0].mlp.up_proj.weight.data_ptr()
    )


def test_every_layer_put_back_comes_nearer_to_the_teacher(batches):
    teacher = tiny_model(num_layers=8)
    student = prune(teacher, [2, 4, 6])
    found = [evaluate_model(student, batches, teacher).kl]
    found += [
        evaluate_model(restore(student, teacher, back), batches, teacher).kl for back in ([2], [2, 4], [2, 4, 6])
    ]
    assert found[0] > found[1] > found[2] > found[3] == pytest.approx(0, abs=1e-6)


def test_a_repaired_layer_is_put_back_with_its_gap(batches):
    teacher = tiny_model(num_layers=6)
    repaired = compensate(prune(teacher, [3]), batches, "least_squares", teacher)
    restored = restore(repaired, teacher, [2, 3])
    assert torch.equal(restored(**batches[0]).logits, teacher(**batches[0]).logits)


def test_blocks_of_several_layers_stay_or_go_as_a_whole(batches):
    teacher = tiny_model(num_layers=8)
    student = healed(merge(parallelize(prune(teacher, [1]), [(2, 3)]), [(5, 6)], batches))
    restored = restore(student, teacher, [1])
    assert plan_of(restored) == LayerPlan(((0,), (1,), (2, 3), (4,), (5, 6), (7,)), 8, ((5, 6),))
    for n, m in ((1, 2), (3, 4)):
        for mine, theirs in zip(
            restored.model.layers[m].parameters(), student.model.layers[n].parameters(), strict=True
        ):
            assert torch.equal(mine, theirs)
    plain = restore(student, teacher, [2, 3, 5, 6])
    assert plan_of(plain) == LayerPlan(((0,), (2,), (3,), (4,), (5,), (6,), (7,)), 8)
    assert type(plain) is type(teacher)
    with pytest.raises(LayerPruneError, match="name them all"):
        restore(student, teacher, [2])
    with pytest.raises(LayerPruneError, match="not single layers of the teacher"):
        restore(student, teacher, [8])
    with pytest.raises(LayerPruneError, match="not single layers of the teacher"):
        restore(prune(teacher, [1, 2]), prune(teacher, [1]), [1])
    with pytest.raises(LayerPruneError, match="teacher: layers 5 and 8"):
        restore(prune(tiny_model(num_layers=5), [1]), teacher, [1])


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_key_value_heads": 4}, {"intermediate_size": 96}])
def test_another_models_student_is_refused(changes):
    other = prune(tiny_model(num_layers=5, **changes), [1])
    with pytest.raises(LayerPruneError, match="not made from this teacher"):
        restore(other, tiny_model(num_layers=5), [1])
    with pytest.raises(LayerPruneError, match="not made from this teacher"):
        restore(prune(family_model("llama"), [1]), tiny_model(num_layers=5), [1])


def test_a_student_with_a_head_of_its_own_keeps_it(batches):
    teacher = tiny_model(num_layers=5, tie_word_embeddings=True)
    student = prune(teacher, [2])
    student.lm_head.weight = torch.nn.Parameter(2 * student.lm_head.weight.detach())
    student.config.tie_word_embeddings = False
    restored = restore(student, teacher, [2])
    assert not restored.config.tie_word_embeddings
    torch.testing.assert_close(restored(**batches[0]).logits, 2 * teacher(**batches[0]).logits)


def test_a_restored_model_saves_and_loads(tmp_path):
    teacher, batch = tiny_model(num_layers=6), random_batches(1)[0]
    restored = restore(healed(prune(teacher, [2, 3])), teacher, [2])
    restored.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path).eval()
    assert plan_of(loaded) == plan_of(restored) and torch.equal(loaded(**batch).logits, restored(**batch).logits)
