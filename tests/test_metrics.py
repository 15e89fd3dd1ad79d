import math

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from hf_layerprune import LayerPruneError
from hf_layerprune.tasks.metrics import corpus_score, sample_scores

PREDICTIONS = ["the cat sat on the mat", "a dog barked at me", "", "ok"]
REFERENCES = ["the cat is on the mat", "a dog barked at me", "there is nothing here", "ok"]


def test_exact_match_and_prefix_by_hand():
    assert sample_scores("exact_match", [" a b\n", "a"], ["a b", "b"]) == [1, 0]
    assert corpus_score("exact_match", [" a b\n", "a"], ["a b", "b"]) == 0.5
    texts = ["abcX", "abcd and more", ""], ["abcd", "abcd", "x"]
    assert sample_scores("prefix", *texts) == [0.75, 1, 0]
    assert corpus_score("prefix", *texts) == pytest.approx(1.75 / 3)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_the_package(name):
    scorer = RougeScorer([name])
    expected = [scorer.score(r, p)[name].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert sample_scores(name, PREDICTIONS, REFERENCES) == pytest.approx(expected)
    assert corpus_score(name, PREDICTIONS, REFERENCES) == pytest.approx(sum(expected) / 4)


def test_rouge_by_hand_and_in_another_script():
    assert sample_scores("rougeL", ["the cat sat"], ["the cat is on"]) == [pytest.approx(2 * 2 / (3 + 4))]
    assert sample_scores("rougeL", ["Кошка спит."], ["кошка ест"]) == [pytest.approx(0.5)]


def test_bleu_and_chrf_of_the_corpus_are_those_of_sacrebleu():
    assert corpus_score("bleu", PREDICTIONS, REFERENCES) == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert corpus_score("chrf", PREDICTIONS, REFERENCES) == sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score
    bleu, chrf = (sample_scores(name, PREDICTIONS, REFERENCES) for name in ("bleu", "chrf"))
    assert bleu[1] == bleu[3] == pytest.approx(1) and bleu[2] == 0
    assert all(0 <= score <= 1 for score in bleu + chrf)


def test_bleu_of_one_text_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples match, none of 3 fours (smoothed to 1 / 2 of 3)
    expected = (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25
    assert sample_scores("bleu", PREDICTIONS[:1], REFERENCES[:1]) == [pytest.approx(expected)]
    assert math.isclose(sample_scores("bleu", ["ok"], ["ok"])[0], 1)


def test_a_metric_of_evaluate_from_its_script(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "share.py").write_text(
        "import evaluate\nfrom datasets import Features, Value\n\n\n"
        "class Share(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = Features({'predictions': Value('string'), 'references': Value('string')})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'share': sum(p in r for p, r in zip(predictions, references)) / len(predictions)}\n"
    )
    name = f"evaluate:{tmp_path / 'share'}"
    assert sample_scores(name, ["the cat", "a dog"], ["the cat is", "no"]) == [1, 0]
    assert corpus_score(name, ["the cat", "a dog"], ["the cat is", "no"]) == 0.5
    with pytest.raises(LayerPruneError, match="'evaluate:.*nothing' cannot be loaded"):
        sample_scores(f"evaluate:{tmp_path / 'nothing'}", ["a"], ["a"])
    with pytest.raises(LayerPruneError, match="'magic' is unknown; choose one of exact_match"):
        sample_scores("magic", ["a"], ["a"])
