"""How sure a choice is, and races between candidates."""

import math
from functools import partial

import pytest
import torch
from conftest import random_batches, tiny_model

from hf_layerprune import LayerPruneError, prune, score_layers
from hf_layerprune.data import valid_next_tokens
from hf_layerprune.evaluation import evaluate_model
from hf_layerprune.plan import Edit
from hf_layerprune.scoring import Race, Scores, contiguous_stretch, score
from hf_layerprune.scoring.race import collect, quantile
from hf_layerprune.scoring.scores import Evidence


def evidence_of(sums, counts):
    """Evidence of one part; `sums` hold the model as it is first."""
    evidence = Evidence(len(sums))
    evidence.add(0, range(len(sums)), torch.tensor(sums, dtype=torch.float64), torch.tensor(counts))
    return evidence


class Table:
    """Data whose results are known beforehand: `values` `(1 + C, chunks, rows of a chunk)`."""

    def __init__(self, values):
        self.values, self.asked = values, []

    @property
    def kind(self):
        return 1.0, [partial(self.measure, chunk) for chunk in range(self.values.shape[1])]

    def measure(self, chunk, which):
        self.asked.append((chunk, tuple(which)))
        return self.values[[0, *which], chunk], torch.ones(self.values.shape[2])

    def mean(self):
        return self.values.flatten(1).mean(1)


def table(means, rows=64, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, rows, generator=generator, dtype=torch.float64)
    own = noise * torch.randn(1 + len(means), rows, generator=generator, dtype=torch.float64)
    own[0] = 0
    return Table((torch.tensor([0.0, *means], dtype=torch.float64)[:, None] + 10 * shared + own)[:, :, None])


def race(measure, savings, race=None):
    return collect([measure.kind], savings if isinstance(savings, list) else [1.0] * savings, race)


# ------------------------------------------------------------------------------------------------ certainty


def test_a_value_is_the_mean_over_tokens_and_its_error_that_of_a_ratio():
    evidence = evidence_of([[0.0, 0.0, 0.0], [2.0, 6.0, 4.0]], [1, 2, 2])
    assert evidence.value(1) == 12 / 5
    deviations = [2 - 2.4, 6 - 4.8, 4 - 4.8]
    expected = math.sqrt(3 / 2 * sum(d * d for d in deviations)) / 5
    assert evidence.standard_error(1) == pytest.approx(expected)
    assert math.isnan(evidence_of([[0.0], [1.0]], [4]).standard_error(1))


def test_differences_are_paired_row_by_row():
    first = [1.0, 5.0, 9.0, 2.0]
    evidence = evidence_of([[0.0] * 4, first, [v + 0.1 for v in first]], [1] * 4)
    assert evidence.standard_error(1) > 1
    assert evidence.compare([1, 2], [1.0, 1.0])[1].tolist() == pytest.approx([0, 0], abs=1e-12)
    prices, errors = evidence.compare([1, 2], [1.0, 2.0])  # the second costs as much and saves twice as much
    assert prices.tolist() == pytest.approx([2 * 4.25, 4.35]) and errors[1] == 0
    assert errors[0] == pytest.approx(evidence.standard_error(1))


def test_parts_are_weighed():
    evidence = Evidence(2, [3.0, 1.0])
    evidence.add(0, [0, 1], torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.ones(2))
    evidence.add(1, [0, 1], torch.tensor([[0.0, 0.0], [10.0, 30.0]]), torch.ones(2))
    assert evidence.value(1) == (3 * 2 + 20) / 4
    assert evidence.standard_error(1) == pytest.approx(math.sqrt((3 / 4 * 1) ** 2 + (1 / 4 * 10) ** 2))


@pytest.mark.parametrize("rows, expected", [(6, 2.571), (31, 2.042), (10**6, 1.960)])
def test_quantiles_are_those_of_student(rows, expected):
    assert quantile(0.975, rows) == pytest.approx(expected, abs=0.03)


def test_scores_say_how_sure_they_are(model, batches):
    scores = score_layers(model, batches)
    assert set(scores.standard_errors) == set(scores.values) and not scores.dropped
    assert all(error > 0 for error in scores.standard_errors.values())
    rows = []  # by hand: KL of every row without layer 2
    student = prune(model, [2])
    for batch in batches:
        for n in range(len(batch["input_ids"])):
            row = {key: value[n : n + 1] for key, value in batch.items()}
            rows.append((evaluate_model(student, [row], model).kl, int(valid_next_tokens(row)[0].sum())))
    mean = sum(kl * count for kl, count in rows) / sum(count for _, count in rows)
    assert scores.values[2] == pytest.approx(mean, rel=1e-4)
    squares = sum((count * (kl - mean)) ** 2 for kl, count in rows)
    expected = math.sqrt(squares * len(rows) / (len(rows) - 1)) / sum(count for _, count in rows)
    assert scores.standard_errors[2] == pytest.approx(expected, rel=1e-3)
    assert scores.margin > 0
    assert scores.to_dict()["certainty"] == scores.certainty


@pytest.mark.parametrize("criterion", ["tail", "random", "taylor"])
def test_what_is_no_measurement_has_no_error(model, batches, criterion):
    scores = score_layers(model, batches, criterion)
    assert scores.standard_errors == {} and scores.certainty == "" and scores.margin is None


def test_certainty_in_words():
    near = evidence_of([[0.0] * 6, [1.0, 2, 3, 4, 5, 6], [2.0, 1, 4, 3, 6, 5.2]], [1] * 6)
    text = Scores.of("kl", [7, 4], near).certainty
    assert text.startswith("7 and 4 cannot be told apart (0.") and "more calibration data" in text
    clear = evidence_of([[0.0] * 6, [1.0, 1, 2, 1, 1, 2], [9.0, 9, 9, 8, 9, 9]], [1] * 6)
    assert Scores.of("kl", [7, 4], clear).certainty.startswith("7 is ahead of 4 by")
    scores = Scores("kl", {7: 1.0, 4: 0.5}, 0.0, 10, {7: 0.1, 4: 0.1}, dropped={4: 0.25}, contenders=(7,))
    assert scores.safest == 7  # never one that a race dropped, however low its cost was by then
    assert scores.certainty == "7 won the race against 4 after 25% of the data"


def test_a_tie_and_a_single_row_are_no_certainty():
    equal = evidence_of([[0.0] * 6, [1.0, 2, 1, 2, 1, 2], [1.0, 2, 1, 2, 1, 2]], [1] * 6)
    scores = Scores.of("kl", [4, 7], equal)
    assert scores.margin == 0 and scores.contenders == (7, 4) and scores.safest == 7
    assert scores.certainty.startswith("7 and 4 cannot be told apart (0.0 standard errors")
    single = Scores.of("kl", [4, 7], evidence_of([[0.0], [1.0], [2.0]], [9]))
    assert single.certainty.startswith("too little data to tell how sure the choice of 4 is")
    assert math.isnan(single.margin)
    constant = evidence_of([[0.0] * 3, [1.0] * 3, [2.0] * 3], [1] * 3)
    assert Scores.of("kl", [4, 7], constant).margin == math.inf


def test_certainty_is_about_the_best_two_by_what_they_save():
    evidence = evidence_of([[0.0] * 4, [1.0, 1.1, 1, 1], [2.0, 2, 2.1, 2], [4.0, 4, 4, 4.1]], [1] * 4)
    edits = [Edit.remove(n) for n in (5, 6, 7)]
    scores = Scores.of("kl", edits, evidence, savings=[1.0, 1.0, 10.0])
    assert scores.contenders == (edits[2], edits[0]) and scores.certainty.startswith("7 is ahead of 5 by")
    assert scores.to_dict()["contenders"] == ["7", "5"]


def test_one_price_ranks_says_how_sure_and_races_where_edits_gain():
    """Edits that lower the measure: of equal gains the larger saving is better, for everything that compares."""
    noise = table([0.0, 0.0, 0.0], noise=0.1).values
    costs = torch.tensor([0.0, -1.0, -1.1, 5.0])[:, None, None]  # gains x savings: -1.0 and -0.55
    measure = Table(noise + costs)
    edits, savings = [Edit.remove(3), Edit.parallelize(5, 6), Edit.remove(7)], [2.0, 1.0, 2.0]
    evidence, dropped = race(measure, savings)
    scores = Scores.of("loss", edits, evidence, dropped, savings)
    assert scores.safest == scores.ranking[0] == scores.contenders[0] == edits[0]
    assert scores.contenders[1] == edits[1] and scores.certainty.startswith("3 is ahead of 5|6 by")
    prices, errors = evidence.compare([1, 2], savings[:2])
    costs = [evidence.value(1) - evidence.value(0), evidence.value(2) - evidence.value(0)]
    assert prices.tolist() == pytest.approx([costs[0], costs[1] / 2]) and errors[0] == 0
    by_row = measure.values[1, :, 0] - measure.values[2, :, 0] / 2 - measure.values[0, :, 0] / 2
    assert errors[1] == pytest.approx(float(by_row.std()) / 8)
    assert scores.margin == pytest.approx(float(prices.diff() / errors[1]))
    assert scores.to_dict()["savings"] == {"3": 2.0, "5|6": 1.0, "7": 2.0}
    _, dropped = race(measure, savings, Race())
    assert set(dropped) == {2, 3}


# ------------------------------------------------------------------------------------------------ races


def test_the_clearly_worse_leave_early_and_are_measured_no_more():
    measure = table([0.0, 0.3, 5.0, 5.0, 5.0])
    evidence, dropped = race(measure, 5, Race(0.95))
    assert set(dropped) >= {3, 4, 5} and max(dropped[n] for n in (3, 4, 5)) < 0.5
    assert 1 not in dropped
    counts = [len(which) for _, which in measure.asked]
    assert counts == sorted(counts, reverse=True) and counts[0] == 5
    last = {n: max(i for i, (_, which) in enumerate(measure.asked, 1) if n in which) for n in range(1, 6)}
    for index, share in dropped.items():
        assert last[index] / 64 == pytest.approx(share)
        rows = [chunk for chunk, which in measure.asked if index in which]
        assert evidence.value(index) == pytest.approx(float(measure.values[index, rows].mean()))


def test_a_race_ends_when_one_is_left():
    measure = table([0.0, 9.0, 9.0], noise=0.1)
    _, dropped = race(measure, 3, Race())
    assert set(dropped) == {2, 3} and len(measure.asked) < 10


def test_without_a_race_all_see_everything_in_order():
    measure = table([0.0, 9.0])
    _, dropped = race(measure, 2)
    assert not dropped and measure.asked == [(n, (1, 2)) for n in range(64)]


def test_the_race_chooses_what_all_data_would():
    wrong = 0
    for seed in range(40):
        measure = table([0.0, 0.1, 0.2, 1.0, 2.0, 3.0], seed=seed)
        evidence, dropped = race(measure, 6, Race(0.95, seed))
        scores = Scores.of("kl", list(range(6)), evidence, dropped)
        wrong += scores.safest != int(measure.mean()[1:].argmin())
    assert wrong <= 2


def test_data_of_which_little_is_seen_keeps_its_doubt():
    """Two kinds of data: one in many chunks that tell nothing, one in few that decide."""
    wrong, left_early = 0, 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        few = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
        few[0], few[2] = 0, few[2] + 0.1
        deciding = Table(few)
        measures = [table([0.0, 0.0], rows=64, noise=0.01, seed=seed), deciding]
        evidence, dropped = collect([measure.kind for measure in measures], [1.0, 1.0], Race(0.95, seed))
        scores = Scores.of("kl", [1, 2], evidence, dropped)
        whole = sum(measure.mean() for measure in measures)
        wrong += scores.safest != 1 + int(whole[1:].argmin())
        left_early += bool(dropped)
    assert wrong <= 2 and left_early


def test_data_in_one_chunk_does_not_stop_a_race():
    generator = torch.Generator().manual_seed(0)
    whole = Table(torch.randn(3, 1, 8, generator=generator, dtype=torch.float64) * 0.01)
    _, dropped = collect([table([0.0, 5.0], noise=0.1).kind, whole.kind], [1.0, 1.0], Race())
    assert dropped[2] < 0.5


def test_a_single_candidate_is_measured_on_everything():
    measure = table([1.0])
    race(measure, 1, Race())
    assert len(measure.asked) == 64


def test_the_order_is_drawn_by_the_seed():
    runs = []
    for seed in (1, 1, 2):
        measure = table([0.0, 0.1])
        race(measure, 2, Race(seed=seed))
        runs.append([chunk for chunk, _ in measure.asked])
    assert runs[0] == runs[1] != runs[2]


def test_a_race_is_for_the_least_cost_per_unit_saved():
    measure = table([2.0, 3.0, 8.0], noise=0.1)
    _, dropped = race(measure, [1.0, 2.0, 2.0], Race())  # prices 2, 1.5 and 4
    assert set(dropped) == {1, 3}


def test_an_output_that_is_no_number_loses():
    measure = table([0.0, 0.1, 0.2])
    measure.values[1] = math.nan
    _, dropped = race(measure, 3, Race())
    assert 1 in dropped and len(dropped) < 3


def test_layers_race_on_a_model():
    model = tiny_model(6)
    with torch.no_grad():
        for name, factor in ((2, 0.05), (4, 0.1)):
            model.model.layers[name].self_attn.o_proj.weight.mul_(factor)
            model.model.layers[name].mlp.down_proj.weight.mul_(factor)
    batches = random_batches(6, rows=8)
    seen = []
    full = score_layers(model, batches)
    scores = score_layers(model, batches, race=Race(0.95), on_batch=lambda: seen.append(1))
    assert scores.safest == full.safest == 2
    assert scores.dropped and set(scores.dropped) <= {0, 1, 3, 4, 5} and len(seen) <= len(batches)
    assert scores.ranking[0] == 2 and scores.values[2] == pytest.approx(full.values[2], rel=0.5)


def test_bad_races_are_refused(model, batches):
    with pytest.raises(LayerPruneError, match="confidence=1.5"):
        Race(1.5)
    with pytest.raises(LayerPruneError, match="races and compensation are for kl, loss"):
        score(model, batches, [Edit.remove(1)], "block_influence", race=Race())


# ------------------------------------------------------------------------------------------------ criteria


@pytest.mark.parametrize("criterion", ["kl", "block_influence", "angular_distance", "taylor"])
def test_planted_identity_layers_are_found(criterion):
    model = tiny_model(8)
    with torch.no_grad():
        for layer in (2, 3, 6):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    scores = score_layers(model, random_batches(3), criterion)
    assert set(scores.ranking[:3]) == {2, 3, 6}
    assert all(math.isfinite(value) for value in scores.values.values())
    if criterion == "angular_distance":
        assert contiguous_stretch(model, random_batches(3), 2) == (2, 3)
