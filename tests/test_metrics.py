import math

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from hf_layerprune import LayerPruneError
from hf_layerprune.tasks.metrics import Chrf, load_metric

PREDICTIONS = ["the cat sat on the mat", "a dog barked at me", "", "ok"]
REFERENCES = ["the cat is on the mat", "a dog barked at me", "there is nothing here", "ok"]


def test_exact_match_and_prefix_by_hand():
    exact = load_metric("exact_match").compute(predictions=[" a b\n", "a"], references=["a b", "b"])
    assert exact == {"exact_match": 0.5, "scores": [1.0, 0.0]}
    prefix = load_metric("prefix").compute(predictions=["abcX", "abcd and more", ""], references=["abcd", "abcd", "x"])
    assert prefix["scores"] == [0.75, 1.0, 0.0]
    assert prefix["prefix"] == pytest.approx(1.75 / 3)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_the_package(name):
    result = load_metric(name).compute(predictions=PREDICTIONS, references=REFERENCES)
    scorer = RougeScorer([name])
    expected = [scorer.score(r, p)[name].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert result["scores"] == pytest.approx(expected)
    assert result[name] == pytest.approx(sum(expected) / 4)


def test_rouge_by_hand_and_in_another_script():
    assert load_metric("rougeL").samples(["the cat sat"], ["the cat is on"]) == [pytest.approx(2 * 2 / (3 + 4))]
    assert load_metric("rougeL").samples(["Кошка спит."], ["кошка ест"]) == [pytest.approx(0.5)]


def test_bleu_and_chrf_of_the_corpus_are_those_of_sacrebleu():
    bleu = load_metric("bleu").compute(predictions=PREDICTIONS, references=REFERENCES)
    assert bleu["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert bleu["scores"][1] == bleu["scores"][3] == pytest.approx(1) and bleu["scores"][2] == 0
    chrf = Chrf().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert chrf["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score
    assert all(0 <= score <= 1 for score in chrf["scores"] + bleu["scores"])


def test_bleu_of_one_text_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples match, none of 3 fours (smoothed to 1 / 2 of 3)
    expected = (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25
    assert load_metric("bleu").samples(PREDICTIONS[:1], REFERENCES[:1]) == [pytest.approx(expected)]
    assert math.isclose(load_metric("bleu").samples(["ok"], ["ok"])[0], 1)


def test_an_unknown_metric():
    with pytest.raises(LayerPruneError, match="metric 'bertscore' is unknown; choose one of exact_match"):
        load_metric("bertscore")
