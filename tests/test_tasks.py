import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
import yaml
from conftest import END, byte_tokenizer, tiny_model
from datasets import Dataset, DatasetDict
from task_reference import nll

from hf_layerprune import LayerPruneError
from hf_layerprune.evaluation import sums_by_row
from hf_layerprune.forward import final_states
from hf_layerprune.tasks import (
    GenerationTask,
    KLTask,
    MultipleChoiceTask,
    PerplexityTask,
    evaluate_tasks,
)
from hf_layerprune.tasks import task as module
from hf_layerprune.tasks.evaluation import standard_error
from hf_layerprune.tasks.task import render

BLIMP = [
    {"sentence_good": good, "sentence_bad": bad}
    for good, bad in [
        ("Who should Derek hug after shocking Richard?", "Who should Derek hug Richard after shocking?"),
        ("Who has Colleen aggravated before kissing Judy?", "Who has Colleen aggravated Judy before kissing?"),
        ("Who does John leave while alarming Beverly?", "Who does John leave Beverly while alarming?"),
    ]
]
AGIEVAL = [
    {
        "passage": "The company sent three young staff members to the South for business trip.",
        "question": "So what are the three young people on business?",
        "options": ["(A)20-year-old accountant", "(B)24-year-old salesperson", "(C)20-year-old salesperson"],
        "label": "A",
        "answer": None,
    },
    {
        "passage": "These four communities are cultural area, leisure area, commercial area and service area.",
        "question": "Based on the above statement, which of the following can be derived?",
        "options": ["(A)Civic Park is north", "(B)The leisure area is southwest of the cultural area"],
        "label": "B",
        "answer": None,
    },
]
PAIR = {"prompt": "", "choices": ("sentence_good", "sentence_bad"), "answer": "sentence_good", "choice": "{choice}"}
PAIR_AS_YAML = PAIR | {"choices": list(PAIR["choices"])}
COMMONSENSE = {
    "question": "Where would you find a ferret that is not a pet?",
    "choices": {"label": ["A", "B", "C"], "text": ["own home", "north carolina", "great britain"]},
    "answerKey": "B",
}
GSM8K = [
    {
        "question": "How many bolts in total?",
        "answer": "It takes 2/2=<<2/2=1>>1 bolt.\nSo 2+1=<<2+1=3>>3 bolts\n#### 3",
    },
    {"question": "How much does she make?", "answer": "9 * 2 = $<<9*2=18>>18 every day.\n#### 18"},
]
MMLU = [
    {
        "question": f"What is {a} + 1?",
        "subject": subject,
        "choices": [str(a), str(a + 1), str(a + 2), "9"],
        "answer": 1,
    }
    for subject, a in [("sums", 1), ("other", 2), ("sums", 3), ("other", 4), ("sums", 5)]
]


def prompts(prepared, tokenizer):
    """What stands before the scored tokens of each row."""
    return [
        tokenizer.decode(ids[(mask == 1) & (labels == -100)])
        for chunk in prepared.chunks
        for ids, mask, labels in zip(*(chunk.batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True)
    ]


def test_minimal_pairs_by_hand(model, tokenizer, write):
    task = MultipleChoiceTask(write("blimp.jsonl", BLIMP), **PAIR)
    result = evaluate_tasks(model, [task], tokenizer, batch_size=4).results["blimp"]
    right = [
        nll(model, tokenizer, "", r["sentence_good"]) < nll(model, tokenizer, "", r["sentence_bad"]) for r in BLIMP
    ]
    assert (result.measure, result.quality, result.num_examples) == ("accuracy", pytest.approx(sum(right) / 3), 3)


def test_chunks_hold_whole_examples_and_reduce_many_candidates(model, tokenizer, write):
    prepared = MultipleChoiceTask(write("blimp.jsonl", BLIMP), **PAIR).prepare(tokenizer, batch_size=5)
    assert [len(chunk.batch["input_ids"]) for chunk in prepared.chunks] == [4, 2]
    assert prepared.statistic == "nll" and prepared.measure == "accuracy"
    sums = torch.tensor([[1, 2, 5, 4], [2, 2, 3, math.nan], [1, 2, 1, 2]], dtype=torch.float64)
    costs, weights = prepared.chunks[0].reduce(sums, torch.full((4,), 7))
    assert costs.tolist() == [[0, 1], [1, 1], [0, 0]] and weights.tolist() == [1, 1]


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes"])
def test_multiple_choice_by_hand(model, tokenizer, normalize):
    template = "{passage}\n{question}\nAnswer:"
    task = MultipleChoiceTask(
        Dataset.from_list(AGIEVAL), prompt=template, choices="options", answer="label", normalize=normalize, name="agi"
    )
    chunk = task.prepare(tokenizer, batch_size=2).chunks[1]
    assert chunk.sizes == (2,) and chunk.answers == (1,)
    row = AGIEVAL[1]
    expected = [nll(model, tokenizer, template.format(**row), " " + text) for text in row["options"]]
    sums, counts = sums_by_row(model, [final_states(model, chunk.batch)], chunk.batch, "nll")
    assert sums[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert counts.tolist() == [len(text) + 1 for text in row["options"]]
    divide = {"none": lambda t: 1, "tokens": lambda t: len(t) + 1, "bytes": len}[normalize]
    scores = [value / divide(text) for value, text in zip(expected, row["options"], strict=True)]
    costs, _ = chunk.reduce(sums, counts)
    assert costs.tolist() == [[float(scores[1] != min(scores))]]


@pytest.mark.parametrize(
    "row, settings, answer",
    [
        (COMMONSENSE, {"choices": "choices.text", "labels": "choices.label", "answer": "answerKey"}, 1),
        (MMLU[0], {}, 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, {}, 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "b"}, {}, 1),
        ({"question": "q", "choices": ["x", "y"], "answer": True}, {}, 1),
        ({"question": "q", "choices": ["1", "0"], "answer": "1"}, {}, 0),
        ({"question": "q", "choices": ["1", "0"], "answer": 1}, {}, 1),
        ({"question": "q", "choices": ["x", "y"], "l": ["1", "2"], "answer": "1"}, {"labels": "l"}, 0),
        ({"question": "q", "a": "x", "b": "y", "answer": "1"}, {"choices": ("a", "b")}, 1),
        ({"question": "q", "a": "x", "b": "y"}, {"choices": ("a", "b"), "answer": "b"}, 1),
    ],
)
def test_forms_of_an_answer(tokenizer, write, row, settings, answer):
    prepared = MultipleChoiceTask(write("rows.jsonl", [row]), **settings).prepare(tokenizer)
    assert prepared.chunks[0].answers == (answer,)


def test_few_shot_examples_are_shown_verbatim_and_never_scored(tokenizer):
    settings = {
        "prompt": "{question}\n{lettered_choices}\nAnswer:",
        "choice": " {letter}",
        "description": "On {subject}.\n",
    }
    own = MultipleChoiceTask(Dataset.from_list(MMLU), num_few_shot=1, few_shot_group="subject", **settings)
    shown = prompts(own.prepare(tokenizer), tokenizer)
    assert len(shown) == 3 * 4
    assert shown[0] == (
        "On sums.\nWhat is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 9\nAnswer: B\n\n"
        "What is 3 + 1?\nA. 3\nB. 4\nC. 5\nD. 9\nAnswer:"
    )
    assert shown[4].startswith("On other.\nWhat is 2 + 1?") and "What is 4 + 1?" in shown[4]


def test_few_shot_examples_of_another_split(tokenizer, tmp_path):
    splits = {"dev": Dataset.from_list(MMLU[:2]), "test": Dataset.from_list(MMLU[2:])}
    DatasetDict(splits).save_to_disk(tmp_path / "mmlu")
    task = MultipleChoiceTask(tmp_path / "mmlu", num_few_shot=2, few_shot_split="dev")
    shown = prompts(task.prepare(tokenizer), tokenizer)
    assert len(shown) == 3 * 4
    assert all(text.startswith("What is 1 + 1? 2\n\nWhat is 2 + 1? 3\n\nWhat is ") for text in shown)


def test_the_limit_takes_rows_from_everywhere(tokenizer):
    rows = [{"text": f"{number:04}"} for number in range(100)]
    task = PerplexityTask(Dataset.from_list(rows), prompt="{text}\n\n", limit=4)
    assert prompts(task.prepare(tokenizer), tokenizer) == [f"{n:04}\n\n" for n in (0, 25, 50, 75)]


def test_long_prompts_lose_their_beginning(tokenizer, monkeypatch):
    warnings_seen = []
    monkeypatch.setattr(module.logger, "warning", warnings_seen.append)
    task = MultipleChoiceTask(Dataset.from_list(MMLU[:1]))
    prepared = task.prepare(tokenizer, max_length=8)
    assert prompts(prepared, tokenizer) == ["1 + 1?"] * 4
    assert warnings_seen == ["task multiple_choice: prompts too long for the model lost their beginning (4)"]
    task.prepare(tokenizer)
    assert len(warnings_seen) == 1


def test_a_prompt_that_is_cut_keeps_the_begin_token():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = END
    choice = MultipleChoiceTask(Dataset.from_list(MMLU[:1])).prepare(tokenizer, max_length=8)
    assert prompts(choice, tokenizer) == [f"{END} + 1?"] * 4
    rows = Dataset.from_list(GSM8K[:1])
    (chunk,) = GenerationTask(rows, prompt="{question}", max_new_tokens=8).prepare(tokenizer, max_length=16).chunks
    assert tokenizer.batch_decode(chunk.batch["input_ids"]) == [f"{END} total?"]


def test_perplexity_and_kl_by_hand(model, tokenizer, write):
    path = write("texts.txt", "It was the best of times.\n\nIt was the worst.\n")
    teacher = tiny_model(seed=3)
    report = evaluate_tasks(
        model,
        [PerplexityTask(path, name="ppl", max_length=16), KLTask(path, name="kl", max_length=16)],
        tokenizer,
        teacher,
    )
    end = tokenizer.eos_token_id
    ids = [
        t for text in ("It was the best of times.", "It was the worst.") for t in [*tokenizer(text)["input_ids"], end]
    ]
    total = divergence = count = 0
    for start in range(0, len(ids), 16):
        window = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            p, q = (F.log_softmax(m(window).logits[0, :-1].double(), -1) for m in (teacher, model))
        total -= q.gather(1, window[0, 1:, None]).sum().item()
        divergence += (p.exp() * (p - q)).sum().item()
        count += window.shape[1] - 1
    assert count == 44 - 3
    assert report.results["ppl"].cost == pytest.approx(total / count, rel=1e-5)
    assert report.results["ppl"].quality == pytest.approx(math.exp(total / count), rel=1e-4)
    assert report.results["kl"].quality == pytest.approx(divergence / count, rel=1e-4)
    assert report.mean_cost == pytest.approx((total + divergence) / count / 2, rel=1e-4)
    assert report.to_dict()["results"]["kl"]["num_examples"] == 3
    with pytest.raises(LayerPruneError, match="task kl: KL needs a teacher"):
        evaluate_tasks(model, [KLTask(path, name="kl")], tokenizer)


def test_generation_is_the_models_own_greedy_text(model, tokenizer, write):
    task = GenerationTask(write("gsm.jsonl", GSM8K), prompt="Q: {question}\nA:", after="####", max_new_tokens=6)
    chunk = task.prepare(tokenizer).chunks[0]
    assert chunk.references == ("3", "18") and prepared_prompts(chunk, tokenizer) == [
        "Q: How many bolts in total?\nA:",
        "Q: How much does she make?\nA:",
    ]
    texts = chunk.texts(model, tokenizer)
    for row, text in zip(GSM8K, texts, strict=True):
        ids = tokenizer(f"Q: {row['question']}\nA:", return_tensors="pt")["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert text == tokenizer.decode(ids[0, -6:], skip_special_tokens=True)


def prepared_prompts(chunk, tokenizer):
    assert (chunk.batch["attention_mask"][:, -1] == 1).all()  # padded on the left
    return [
        tokenizer.decode(ids[mask == 1])
        for ids, mask in zip(chunk.batch["input_ids"], chunk.batch["attention_mask"], strict=True)
    ]


def test_generation_costs(tokenizer, write):
    path = write("gsm.jsonl", GSM8K)
    chunk = GenerationTask(path, prompt="{question}", after="####", stop_strings=("Q:",)).prepare(tokenizer).chunks[0]
    for texts, costs in [
        (["so #### 3 \n", "18"], [0, 0]),
        (["3Q: more", "#### 180"], [0, 1]),
        (["#### 1 #### 3", ""], [0, 1]),
    ]:
        assert chunk.costs(texts).tolist() == costs
    shot = GenerationTask(path, prompt="Q: {question}\nA:", num_few_shot=1).prepare(tokenizer)
    assert prepared_prompts(shot.chunks[0], tokenizer) == [
        f"Q: How many bolts in total?\nA: {GSM8K[0]['answer']}\n\nQ: How much does she make?\nA:"
    ]


def test_a_generation_is_scored_text_by_text(model, tokenizer):
    settings = {"metric": "chrf", "max_new_tokens": 12, "name": "g", "stop_strings": ["\x00"]}
    rows = [{"prompt": "ab", "answer": "x"}, {"prompt": "c", "answer": "z"}]
    (chunk,) = GenerationTask(Dataset.from_list(rows), **settings).prepare(tokenizer).chunks
    texts = chunk.texts(model, tokenizer)
    rows[0]["answer"], rows[1]["answer"] = texts[0][:6] + " and more", "little of " + texts[1][-3:]
    result = evaluate_tasks(model, [GenerationTask(Dataset.from_list(rows), **settings)], tokenizer).results["g"]
    scores = [
        sacrebleu.sentence_chrf(text.split("\x00")[0].strip(), [row["answer"].strip()]).score / 100
        for text, row in zip(texts, rows, strict=True)
    ]
    assert result.measure == "chrf" and 0 < result.quality < 1
    assert result.quality == pytest.approx(sum(scores) / 2) and result.cost == pytest.approx(1 - sum(scores) / 2)


def test_copying_by_likelihood_and_by_writing(model, tokenizer):
    rows, text = Dataset.from_list([{"text": "One two  three"}]), "One two  three"
    task = PerplexityTask(rows, name="copy", prompt="{text}\n\n")
    result = evaluate_tasks(model, [task], tokenizer).results["copy"]
    assert result.cost == pytest.approx(nll(model, tokenizer, f"{text}\n\n", text) / len(text), rel=1e-5)
    assert result.standard_error is None
    task = GenerationTask(rows, prompt="{text}\n\n", reference="{text}", metric="prefix", max_new_tokens=4)
    (chunk,) = task.prepare(tokenizer).chunks
    assert prepared_prompts(chunk, tokenizer) == [f"{text}\n\n"] and chunk.references == (text,)
    assert chunk.costs([f" {text} and"]).tolist() == [0.0] and chunk.costs(["One two, three"]).tolist() == [0.5]


def test_the_standard_error_is_that_of_the_mean():
    costs = torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64)
    assert standard_error(costs, torch.ones(5)) == pytest.approx(costs.std().item() / 5**0.5)
    assert standard_error(costs * 3, torch.full((5,), 3.0)) == pytest.approx(costs.std().item() / 5**0.5)


def test_templates_hold_columns_alone():
    row = {"a": "x", "n": 3, "l": ["p", "q"], "none": None, "d.b": 1, "b": "{a}"}
    assert render("{{{a}}} {n} {l} {b} {d.b}", row) == "{x} 3 p q {a} 1"
    for template, message in [
        ("{z}", "no column 'z'; the columns are a, n"),
        ("{none}", "column 'none' is empty"),
        *((f"{{{field}}}", "there is no column") for field in ("a.upper", "l[0]", "a!r", "n:>99999999")),
    ]:
        with pytest.raises(LayerPruneError, match=message):
            render(template, row)


QUESTION = {"question": "q", "choices": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    "task, row, settings, message",
    [
        (MultipleChoiceTask, {"question": "q"}, {}, "there is no column 'choices'; the columns are question"),
        (MultipleChoiceTask, QUESTION | {"question": None}, {}, "column 'question' is empty"),
        (MultipleChoiceTask, QUESTION | {"choices": ["x", None]}, {}, "'choices' holds an empty item, .'x', N"),
        (MultipleChoiceTask, QUESTION | {"l": ["A", None]}, {"labels": "l"}, "column 'l' holds an empty item"),
        (MultipleChoiceTask, QUESTION | {"answer": 2}, {}, "answer 2 is none of the 2 choices"),
        (MultipleChoiceTask, QUESTION | {"answer": -1}, {}, "answer -1 is none"),
        (MultipleChoiceTask, QUESTION | {"answer": "E"}, {}, "answer 'E' is none"),
        (MultipleChoiceTask, QUESTION | {"choices": "xy"}, {}, "must hold a list of 2 to 26 choices, not 'xy'"),
        (MultipleChoiceTask, QUESTION | {"choices": ["x"]}, {}, "must hold a list of 2 to 26 choices"),
        (MultipleChoiceTask, QUESTION | {"choices": ["x"] * 27}, {}, "must hold a list of 2 to 26 choices"),
        (MultipleChoiceTask, BLIMP[0] | {"sentence_bad": ""}, PAIR, "there are 0 tokens to score"),
        (MultipleChoiceTask, BLIMP[0], PAIR | {"max_length": 20}, "44 tokens to score; the model can score 1 to 19"),
        (GenerationTask, GSM8K[0], {"prompt": "{question}", "max_length": 64}, "max_new_tokens=64 leaves no place"),
    ],
)
def test_a_mistake_in_a_row_names_it(tokenizer, task, row, settings, message):
    settings = dict(settings)
    rows, lengths = Dataset.from_list([row]), {"max_length": settings.pop("max_length", None)}
    with pytest.raises(LayerPruneError, match=f"^task t: row 1: .*{message}"):
        task(rows, name="t", **settings).prepare(tokenizer, **lengths)


def test_too_few_rows(tokenizer, tmp_path):
    with pytest.raises(LayerPruneError, match="task t: there is nothing to score"):
        GenerationTask(Dataset.from_list(GSM8K), name="t", prompt="{question}", num_few_shot=2).prepare(tokenizer)
    rows = [GSM8K[0] | {"group": "a"}, GSM8K[1] | {"group": "b"}]
    DatasetDict({"dev": Dataset.from_list(rows[:1]), "test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "gsm")
    settings = {"few_shot_split": "dev", "few_shot_group": "group"}
    with pytest.raises(LayerPruneError, match="task gsm: row 2: num_few_shot=1 but there are 0 examples"):
        GenerationTask(tmp_path / "gsm", prompt="{question}", num_few_shot=1, **settings).prepare(tokenizer)
    with pytest.raises(LayerPruneError, match="task t: there is nothing to score"):
        PerplexityTask(Dataset.from_list([{"text": ""}]), name="t").prepare(tokenizer)


@pytest.mark.parametrize(
    "task, settings, error, message",
    [
        (PerplexityTask, {"limit": 0}, LayerPruneError, "task rows: limit=0 must be a whole number of at least 1"),
        (PerplexityTask, {"weight": 0}, LayerPruneError, "task rows: weight=0 leaves the task without effect"),
        (PerplexityTask, {"weight": math.nan}, LayerPruneError, "weight=nan must be a number of at least 0"),
        (PerplexityTask, {"weight": math.inf}, LayerPruneError, "weight=inf must be a number of at least 0"),
        (PerplexityTask, {"max_length": 1}, LayerPruneError, "max_length=1 must be a whole number of at least 2"),
        (MultipleChoiceTask, {"num_few_shot": -1}, LayerPruneError, "num_few_shot=-1 must be a whole number of at"),
        (GenerationTask, {"max_new_tokens": 0}, LayerPruneError, "max_new_tokens=0 must be a whole number of at"),
        (GenerationTask, {"stop_strings": ("Q:", "")}, LayerPruneError, "task rows: stop_strings holds an empty text"),
        (KLTask, {"num_few_shot": 2}, LayerPruneError, "task rows: num_few_shot has no effect without prompt"),
        (PerplexityTask, {"description": "A"}, LayerPruneError, "task rows: description has no effect without prompt"),
        (GenerationTask, {"config_name": "en"}, LayerPruneError, "config_name='en', but its data has no config"),
        (PerplexityTask, {"limit": "ten"}, TypeError, "'limit' with value 'ten' doesn't match any type"),
        (
            MultipleChoiceTask,
            {"normalize": "words"},
            TypeError,
            "expected one of .'none', 'tokens', 'bytes'., got words",
        ),
        (GenerationTask, {"stop_strings": "Q:"}, TypeError, "'stop_strings' expected a tuple, got str"),
        (
            GenerationTask,
            {"metric": "bertscore"},
            LayerPruneError,
            "task rows: metric 'bertscore' is none of exact_match",
        ),
        (PerplexityTask, {"text": "q"}, LayerPruneError, "task rows: text 'q' must name a column in braces"),
        (GenerationTask, {"reference": "answer"}, LayerPruneError, "reference 'answer' must name a column"),
        (MultipleChoiceTask, {"choice": "letter"}, LayerPruneError, "choice 'letter' must name a column"),
        (
            MultipleChoiceTask,
            {"prompt": "Q: {text"},
            LayerPruneError,
            "prompt 'Q: {text' has a brace",
        ),
        (PerplexityTask, {"text": "{text} {}"}, LayerPruneError, "text '{text} {}' has a brace that is not closed or"),
        (
            GenerationTask,
            {"reference": "{text} }"},
            LayerPruneError,
            "reference '{text} }' has a brace",
        ),
        (GenerationTask, {"description": "{{{text}"}, None, ""),
    ],
)
def test_a_setting_that_cannot_work(task, settings, error, message):
    with pytest.raises(error, match=message) if error else nullcontext():
        task(Dataset.from_dict({"text": ["a"]}), name="rows", **settings)


def test_the_slice_of_a_split_is_that_of_a_file_too(tokenizer, write):
    path = write("texts.jsonl", [{"text": f"text {n}"} for n in range(9)])
    task = PerplexityTask(path, prompt="Say: ", split="test[:4]")
    assert sum(len(chunk.batch["input_ids"]) for chunk in task.prepare(tokenizer).chunks) == 4
    with pytest.raises(LayerPruneError, match="task texts: config_name='en', but its data has no configurations"):
        PerplexityTask(path, config_name="en")


def test_tasks_are_given_by_name_prepared_or_not(model, tokenizer, write):
    task = MultipleChoiceTask(Path(write("pairs.jsonl", BLIMP)), **PAIR)
    named = write("tasks.yaml", yaml.safe_dump([{"kind": "multiple_choice", "dataset": "pairs.jsonl"} | PAIR_AS_YAML]))
    for given in ([task], (each for each in [task]), [task.prepare(tokenizer)], named):
        assert set(evaluate_tasks(model, given, tokenizer).results) == {"pairs"}
    with pytest.raises(LayerPruneError, match="there are no tasks"):
        evaluate_tasks(model, [], tokenizer)
    for given in (task, task.prepare(tokenizer)):
        with pytest.raises(
            LayerPruneError, match="task pairs: batch 0 holds token id 256, but the model's vocabulary"
        ):
            evaluate_tasks(tiny_model(vocab_size=100, eos_token_id=0), [given], tokenizer)
