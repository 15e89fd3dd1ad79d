import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batches, tiny_model

from hf_layerprune import LayerPruneError, LayerScores, evaluate_model, prune, score_layers
from hf_layerprune.scoring import CRITERIA


def naive_scores(model, batches, teacher, criterion):
    """Remove each layer, run the whole model, take the mean over all tokens: the slow reference."""
    scores = {}
    for layer in range(model.config.num_hidden_layers):
        student, total, count = prune(model, [layer]), 0.0, 0
        for batch in batches:
            with torch.no_grad():
                student_log = F.log_softmax(student(**batch).logits.double(), -1)
                teacher_log = F.log_softmax(teacher(**batch).logits.double(), -1)
            mask, ids = batch["attention_mask"], batch["input_ids"]
            for row in range(len(ids)):
                for t in range(ids.shape[1] - 1):
                    if mask[row, t] and mask[row, t + 1]:
                        p, q = teacher_log[row, t], student_log[row, t]
                        total += (p.exp() * (p - q)).sum() if criterion == "kl" else -q[ids[row, t + 1]]
                        count += 1
        scores[layer] = float(total) / count
    return scores


@pytest.mark.parametrize("criterion", ["kl", "loss"])
@pytest.mark.parametrize("own_teacher", [True, False])
def test_leave_one_out_equals_naive_removal(model, batches, criterion, own_teacher):
    teacher = model if own_teacher else tiny_model(seed=3)
    scores = score_layers(model, batches, criterion, teacher=teacher)
    expected = naive_scores(model, batches, teacher, criterion)
    assert scores.values == pytest.approx(expected, abs=1e-5)
    assert scores.num_tokens == 48
    whole = evaluate_model(model, batches, teacher)
    assert scores.baseline == pytest.approx(whole.kl if criterion == "kl" else whole.loss, abs=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation(batches, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    scores = score_layers(model, batches)
    assert scores.values == pytest.approx(naive_scores(model, batches, model, "kl"), abs=1e-5)


def test_block_influence_equals_the_formula_over_all_hidden_states(model, batches):
    total, count = torch.zeros(5, dtype=torch.float64), 0
    for batch in batches:
        states = model(**batch, output_hidden_states=True).hidden_states[:-1]
        # the last entry of hidden_states is behind the final norm, so the last layer is run by hand
        with torch.no_grad():
            captured = []
            handle = model.model.layers[-1].register_forward_hook(lambda _, __, out, into=captured: into.append(out))
            model(**batch)
            handle.remove()
        states = [*states, captured[0]]
        mask = batch["attention_mask"].bool()
        count += int(mask.sum())
        for layer in range(5):
            total[layer] += (1 - F.cosine_similarity(states[layer], states[layer + 1], dim=-1))[mask].double().sum()
    scores = score_layers(model, batches, "block_influence")
    assert list(scores.values.values()) == pytest.approx((total / count).tolist(), abs=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_padding_never_counts(model, criterion):
    short = random_batches(1, rows=2, length=6, padded=False)
    ids = torch.cat([short[0]["input_ids"], torch.full((2, 5), 9)], dim=1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 5)], dim=1).long()
    padded = [{"input_ids": ids, "attention_mask": mask}]
    expected = score_layers(model, short, criterion)
    assert score_layers(model, padded, criterion).values == pytest.approx(expected.values, abs=1e-5)


@pytest.mark.parametrize("criterion", ["kl", "block_influence"])
def test_planted_identity_layers_are_found(batches, criterion):
    model = tiny_model(num_layers=8)
    for layer in (2, 5):
        torch.nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
        torch.nn.init.zeros_(model.model.layers[layer].mlp.down_proj.weight)
    scores = score_layers(model, batches, criterion)
    assert set(scores.ranking[:2]) == {2, 5}
    assert scores.values[2] == pytest.approx(0, abs=1e-6)


def test_students_are_scored_in_teacher_indices_against_the_original_teacher(model, batches):
    student = prune(model, [1])
    scores = score_layers(student, batches, "kl", teacher=model)
    assert list(scores.values) == [0, 2, 3, 4]
    for layer in scores.values:
        expected = evaluate_model(prune(model, [1, layer]), batches, model).kl
        assert scores.values[layer] == pytest.approx(expected, abs=1e-5)


def test_protected_layers_are_left_out(model, batches):
    assert list(score_layers(model, batches, layers=[1, 2]).values) == [1, 2]
    with pytest.raises(LayerPruneError, match="all are protected"):
        score_layers(model, batches, layers=[])


def test_the_model_is_left_as_it_was(model, batches):
    model.train()
    before = [parameter.clone() for parameter in model.parameters()]
    score_layers(model, batches)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


def test_ties_go_to_the_deeper_layer_and_nan_comes_last():
    scores = LayerScores("kl", {0: 0.2, 1: 0.1, 2: 0.1, 3: math.nan, 4: math.inf}, 0.0, 1)
    assert scores.ranking == (2, 1, 0, 4, 3)
    assert scores.safest == 2
    with pytest.raises(LayerPruneError, match="broken"):
        _ = LayerScores("kl", {0: math.nan, 1: math.nan}, 0.0, 1).safest
    assert LayerScores.from_dict(scores.to_dict()).ranking == scores.ranking


def test_bad_requests_are_refused(model, batches):
    with pytest.raises(LayerPruneError, match="criterion='cosine'"):
        score_layers(model, batches, "cosine")
    with pytest.raises(LayerPruneError, match="not in the plan"):
        score_layers(model, batches, layers=[7])
    with pytest.raises(LayerPruneError, match="vocabulary"):
        score_layers(model, batches, teacher=tiny_model(vocab_size=300))
    with pytest.raises(LayerPruneError, match="no token to score"):
        score_layers(model, [])
