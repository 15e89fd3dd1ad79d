import pytest
from rouge_score.rouge_scorer import RougeScorer

from hf_layerprune import LayerPruneError
from hf_layerprune.tasks.chunks import check_metric, text_score

PREDICTIONS = ["the cat sat on the mat", "a dog barked at me", "", "ok"]
REFERENCES = ["the cat is on the mat", "a dog barked at me", "there is nothing here", "ok"]


def test_exact_match_and_prefix_by_hand():
    assert [text_score("exact_match", "a b", text) for text in ("a b", "b")] == [1, 0]
    pairs = ("abcX", "abcd"), ("abcd and more", "abcd"), ("", "x")
    assert [text_score("prefix", *pair) for pair in pairs] == [0.75, 1, 0]


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_the_package(name):
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        expected = RougeScorer([name]).score(reference, prediction)[name].fmeasure
        assert text_score(name, prediction, reference) == pytest.approx(expected)


def test_rouge_by_hand_and_in_another_script():
    assert text_score("rougeL", "the cat sat", "the cat is on") == pytest.approx(2 * 2 / (3 + 4))
    assert text_score("rougeL", "Кошка спит.", "кошка ест") == pytest.approx(0.5)


def test_bleu_and_chrf():
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples match, none of 3 fours (smoothed to 1 / 2 of 3)
    expected = (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25
    pairs = list(zip(PREDICTIONS, REFERENCES, strict=True))
    bleu, chrf = ([text_score(name, *pair) for pair in pairs] for name in ("bleu", "chrf"))
    assert bleu == pytest.approx([expected, 1, 0, 1])
    assert chrf[1] == chrf[3] == pytest.approx(1) and all(0 <= score <= 1 for score in chrf)


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
    name = str(tmp_path / "share")
    check_metric(name)
    assert text_score(name, "the cat", "the cat is") == 1 and text_score(name, "a dog", "no") == 0
    with pytest.raises(LayerPruneError, match="nothing' is none of exact_match, .*, and evaluate cannot load it: "):
        check_metric(str(tmp_path / "nothing"))
