import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import tiny_model
from datasets import Dataset
from transformers import AutoTokenizer

from hf_layerprune import EMBEDDED_MODEL, LayerPruneError, embedded_dataset
from hf_layerprune.tasks import (
    CopyTask,
    GenerationTask,
    KLTask,
    MinimalPairsTask,
    MultipleChoiceTask,
    PerplexityTask,
    evaluate_tasks,
    load_tasks,
)
from hf_layerprune.tasks.evaluation import generated, row_sums, standard_error
from hf_layerprune.tasks.lm_eval_task import costs_of_samples
from hf_layerprune.tasks.templates import Template

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


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write_file


def nll(model, tokenizer, prompt, text):
    """Nats of `text` behind `prompt`, without any of the library."""
    before = tokenizer(prompt)["input_ids"] if prompt else [tokenizer.eos_token_id]
    ids = torch.tensor([before + tokenizer(text)["input_ids"]])
    with torch.no_grad():
        log_probabilities = F.log_softmax(model(ids).logits.double(), -1)[0]
    return -sum(log_probabilities[t - 1, ids[0, t]].item() for t in range(len(before), ids.shape[1]))


def prompts(prepared, tokenizer):
    """What stands before the scored tokens of each row."""
    return [
        tokenizer.decode(ids[(mask == 1) & (labels == -100)])
        for chunk in prepared.chunks
        for ids, mask, labels in zip(*(chunk.batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True)
    ]


def test_minimal_pairs_by_hand(model, tokenizer, write):
    task = MinimalPairsTask(write("blimp.jsonl", BLIMP))
    result = evaluate_tasks(model, [task], tokenizer, batch_size=4).results["blimp"]
    right = [
        nll(model, tokenizer, "", r["sentence_good"]) < nll(model, tokenizer, "", r["sentence_bad"]) for r in BLIMP
    ]
    assert (result.measure, result.quality, result.num_examples) == ("accuracy", pytest.approx(sum(right) / 3), 3)


def test_chunks_hold_whole_examples_and_reduce_many_candidates(model, tokenizer, write):
    prepared = MinimalPairsTask(write("blimp.jsonl", BLIMP)).prepare(tokenizer, batch_size=5)
    assert [len(chunk.batch["input_ids"]) for chunk in prepared.chunks] == [4, 2]
    assert prepared.statistic == "nll" and prepared.num_examples == 3
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
    sums, counts = row_sums(model, chunk, "nll")
    assert sums[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert counts.tolist() == [len(text) + 1 for text in row["options"]]
    divide = {"none": lambda t: 1, "tokens": lambda t: len(t) + 1, "bytes": len}[normalize]
    scores = [value / divide(text) for value, text in zip(expected, row["options"], strict=True)]
    costs, _ = chunk.reduce(sums, counts)
    assert costs.tolist() == [[float(scores[1] != min(scores))]]


@pytest.mark.parametrize(
    "row, settings, answer",
    [
        (COMMONSENSE, {"answer": "answerKey"}, 1),
        (MMLU[0], {}, 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, {}, 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "b"}, {}, 1),
        ({"question": "q", "choices": ["1", "0"], "answer": "1"}, {"answer_form": "text"}, 0),
        ({"question": "q", "choices": ["1", "0"], "answer": "1"}, {"answer_form": "index"}, 1),
        ({"question": "q", "a": "x", "b": "y", "answer": "1"}, {"choices": ("a", "b")}, 1),
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
    second = MultipleChoiceTask(
        Dataset.from_list(MMLU[2:]), num_few_shot=2, few_shot_dataset=Dataset.from_list(MMLU[:2]), **settings
    )
    shown = prompts(second.prepare(tokenizer), tokenizer)
    assert len(shown) == 3 * 4
    assert all(text.index("What is 1") < text.index("What is 2") for text in shown)


def test_the_limit_takes_rows_from_everywhere(tokenizer):
    rows = [{"text": f"{number:04}"} for number in range(100)]
    task = CopyTask(Dataset.from_list(rows), judged_by="likelihood", limit=4)
    assert prompts(task.prepare(tokenizer), tokenizer) == [f"{n:04}\n\n" for n in (0, 25, 50, 75)]


def test_long_prompts_lose_their_beginning(tokenizer):
    task = MultipleChoiceTask(Dataset.from_list(MMLU[:1]))
    prepared = task.prepare(tokenizer, max_length=8)
    assert prompts(prepared, tokenizer) == ["1 + 1?"] * 4 and prepared.num_truncated == 4


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
    texts = generated(model, chunk, tokenizer)
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
    costs, weights = chunk.reduce([["so #### 3 \n", "18"], ["3Q: more", "#### 180"], ["#### 1 #### 3", ""]])
    assert costs.tolist() == [[0, 0], [0, 1], [0, 1]] and weights.tolist() == [1, 1]
    shot = GenerationTask(path, prompt="Q: {question}\nA:", num_few_shot=1).prepare(tokenizer)
    assert prepared_prompts(shot.chunks[0], tokenizer) == [
        f"Q: How many bolts in total?\nA: {GSM8K[0]['answer']}\n\nQ: How much does she make?\nA:"
    ]


def test_evaluated_generation_gives_the_corpus_value(model, tokenizer):
    rows = Dataset.from_list([{"prompt": "ab", "answer": "x y"}, {"prompt": "c", "answer": "z"}])
    task = GenerationTask(rows, metric="chrf", max_new_tokens=4, name="g", stop_strings=("\n",))
    result = evaluate_tasks(model, [task], tokenizer).results["g"]
    assert result.measure == "chrf" and 0 <= result.quality <= 100 and 0 <= result.cost <= 1


def test_copying(model, tokenizer):
    rows = Dataset.from_list([{"text": "One two  three four five six"}])
    settings = {"max_words": 4, "start_words": 2}
    (chunk,) = CopyTask(rows, **settings).prepare(tokenizer).chunks
    assert prepared_prompts(chunk, tokenizer) == ["One two  three four\n\nOne two"]
    assert chunk.references == ("three four",) and chunk.max_new_tokens == len("three four") + 2
    assert chunk.reduce([["  three four and"], ["three, four"]])[0].tolist() == [[0.0], [0.5]]
    task = CopyTask(rows, judged_by="likelihood", name="copy", **settings)
    result = evaluate_tasks(model, [task], tokenizer).results["copy"]
    expected = nll(model, tokenizer, "One two  three four\n\nOne two", "  three four") / 12
    assert result.cost == pytest.approx(expected, rel=1e-5) and result.standard_error is None
    asked = CopyTask(rows, prompt="Repeat: {text}\n")
    assert prepared_prompts(asked.prepare(tokenizer).chunks[0], tokenizer) == [
        "Repeat: One two  three four five six\n"
    ]


def test_the_standard_error_is_that_of_the_mean():
    costs = torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64)
    assert standard_error(costs, torch.ones(5)) == pytest.approx(costs.std().item() / 5**0.5)
    assert standard_error(costs * 3, torch.full((5,), 3.0)) == pytest.approx(costs.std().item() / 5**0.5)


@pytest.mark.parametrize("text", ["{a.b}", "{a[0]}", "{a!r}", "{a:>99999999}", "{}", "{a:{b}}", "{a", "a}"])
def test_templates_hold_columns_alone(text):
    with pytest.raises(LayerPruneError, match="task t: prompt"):
        Template(text, "task t", "prompt")


def test_templates_render_columns():
    row = {"a": "x", "n": 3, "l": ["p", "q"], "none": None, "d": {"b": 1}}
    assert Template("{{{a}}} {n} {l}", "t", "prompt").render(row, "line 1") == "{x} 3 p q"
    for field, message in [("z", "no column 'z'; the columns are a, n"), ("none", "is empty"), ("d", "holds a dict")]:
        with pytest.raises(LayerPruneError, match=f"t: file, line 4: prompt: .*{message}"):
            Template(f"{{{field}}}", "t", "prompt").render(row, "file, line 4")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": 0}\n\n{broken', "a.jsonl, line 3 is no JSON"),
        ("a.jsonl", "[1, 2]", "row 1 holds a int"),
        ("a.json", "[{]", "a.json is no JSON"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.csv", "question,answer\n", "a.csv is empty"),
        ("a.csv", "question,answer\nq\n", "a.csv, line 2 has 1 cells, but the first line names 2"),
        (
            "a.jsonl",
            [{"question": "q", "answer": 0}],
            "line 1: there is no column 'choices'; the columns are question",
        ),
        ("a.jsonl", [{"choices": ["x", "y"], "answer": 0}], "line 1.*prompt: there is no column 'question'"),
        ("a.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": 2}], "answer 2 is none of the 2 choices"),
        ("a.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": -1}], "answer -1 is none.*index 0..1"),
        ("a.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": "E"}], "answer 'E' is none.*letter A..B"),
        ("a.jsonl", [{"question": "q", "choices": ["1", "0"], "answer": "1"}], "index or text; set answer_form"),
        ("a.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": None}], "line 1: column 'answer' is empty"),
        ("a.jsonl", [{"question": "q", "choices": "xy", "answer": 0}], "must hold a list of two or more choices"),
        ("a.jsonl", [{"question": 3, "choices": ["x"], "answer": 0}], "must hold a list of two or more choices"),
        ("a.parquet", "no parquet", "a.parquet cannot be loaded"),
        ("a.pdf", "x", "file type '.pdf'"),
    ],
)
def test_a_mistake_in_the_data_is_one_clear_line(tokenizer, write, name, content, message):
    with pytest.raises(LayerPruneError, match=message) as error:
        MultipleChoiceTask(write(name, content)).prepare(tokenizer)
    assert str(error.value).startswith("task a: ") and name in str(error.value) and "\n" not in str(error.value)


def test_other_mistakes_in_the_data(tokenizer, write):
    with pytest.raises(LayerPruneError, match="line 1: there is nothing to score"):
        MinimalPairsTask(write("a.jsonl", [{"sentence_good": "", "sentence_bad": "x"}])).prepare(tokenizer)
    with pytest.raises(LayerPruneError, match="44 tokens to score do not fit into 20"):
        MinimalPairsTask(write("a.jsonl", BLIMP)).prepare(tokenizer, max_length=20)
    with pytest.raises(LayerPruneError, match="all 2 rows are few-shot examples"):
        GenerationTask(write("a.jsonl", GSM8K), prompt="{question}", num_few_shot=2).prepare(tokenizer)
    few = {"num_few_shot": 3, "few_shot_dataset": write("b.jsonl", GSM8K)}
    with pytest.raises(LayerPruneError, match="line 1: 2 few-shot examples for it, but num_few_shot=3"):
        GenerationTask(write("a.jsonl", GSM8K), prompt="{question}", **few).prepare(tokenizer)
    with pytest.raises(LayerPruneError, match="more than start_words=2 words"):
        CopyTask(write("a.jsonl", [{"text": "one two"}]), start_words=2).prepare(tokenizer)
    with pytest.raises(LayerPruneError, match="prompt or the reference is empty"):
        GenerationTask(write("a.jsonl", [{"prompt": "x", "answer": ""}])).prepare(tokenizer)
    with pytest.raises(LayerPruneError, match="64 new tokens leave no place"):
        GenerationTask(write("a.jsonl", GSM8K), prompt="{question}").prepare(tokenizer, max_length=64)
    with pytest.raises(LayerPruneError, match="the text has 1 tokens"):
        PerplexityTask(write("a.jsonl", [{"text": ""}])).prepare(tokenizer)


@pytest.mark.parametrize(
    "task, settings, message",
    [
        (PerplexityTask, {"limit": 0}, "limit=0"),
        (PerplexityTask, {"limit": "ten"}, "limit='ten' must be int | nothing"),
        (PerplexityTask, {"weight": 0}, "weight=0 must be positive"),
        (PerplexityTask, {"weight": True}, "weight=True must be float"),
        (PerplexityTask, {"text": "{a.b}"}, "field {a.b} is not allowed"),
        (MultipleChoiceTask, {"normalize": "words"}, "normalize='words' must be"),
        (GenerationTask, {"metric": "bertscore"}, "metric 'bertscore' is unknown"),
        (GenerationTask, {"stop_strings": [""]}, "a stop string is empty"),
        (GenerationTask, {"stop_strings": "Q:"}, "stop_strings='Q:' must be tuple"),
        (GenerationTask, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (GenerationTask, {"num_few_shot": -1}, "num_few_shot=-1"),
        (CopyTask, {"max_words": 3, "start_words": 3}, "leave nothing to copy"),
    ],
)
def test_a_setting_that_cannot_work(task, settings, message):
    with pytest.raises(LayerPruneError) as error:
        task("rows.jsonl", **settings)
    assert message in str(error.value) and str(error.value).startswith("task rows: ")


def test_tasks_of_a_yaml_file(write, tokenizer):
    write("pairs.jsonl", BLIMP)
    items = [
        {"kind": "minimal_pairs", "dataset": "pairs.jsonl", "weight": 2},
        {"kind": "perplexity", "dataset": "x/y"},
    ]
    pairs, text = load_tasks(write("mine.yaml", yaml.safe_dump(items)))
    assert isinstance(pairs, MinimalPairsTask) and (pairs.name, pairs.weight) == ("pairs", 2)
    assert pairs.prepare(tokenizer).num_examples == 3  # found beside the YAML file
    assert isinstance(text, PerplexityTask) and text.name == "y"


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [", "is no YAML"),
        ("kind: kl", "must be a list of tasks"),
        ("- kind: quiz", "task 1: kind 'quiz' is unknown"),
        ("- just text", "task 1: kind 'just text' is unknown"),
        ("- {kind: kl, dataset: a, limt: 3}", "task 1: limt unknown for kl; choose of dataset, name"),
        ("- {kind: kl}", "task 1: dataset=None"),
        ("- {kind: kl, dataset: a, limit: 0}", "task 1: task a: limit=0"),
        ("- {kind: kl, dataset: a}\n- {kind: kl, dataset: a}", "two tasks are named 'a'"),
    ],
)
def test_a_mistake_in_a_yaml_file(write, content, message):
    with pytest.raises(LayerPruneError, match=message):
        load_tasks(write("mine.yaml", content))


def test_unknown_tasks():
    with pytest.raises(LayerPruneError, match="'nothing': no preset"):
        load_tasks("default,nothing")
    with pytest.raises(LayerPruneError, match="there are no tasks"):
        load_tasks(" , ")
    with pytest.raises(LayerPruneError, match="'paper:nowhere': there is no folder nowhere"):
        load_tasks("paper:nowhere")


def test_the_paper_tasks_from_a_folder(write, tmp_path, tokenizer):
    tasks = load_tasks("paper")
    assert [task.name for task in tasks] == [
        "enMMLU", "ruMMLU", "treeway_abstractive", "cp_doc_ru", "cp_para_ru", "flores_en_ru", "flores_ru_en",
    ]  # fmt: skip
    assert all(task.num_few_shot == 5 for task in tasks)
    with pytest.raises(LayerPruneError, match=r"enMMLU.jsonl is missing; put the rows of RefalMachine/darumeru there"):
        load_tasks(f"paper:{tmp_path}")
    columns = {"question_en": "q", "choices_en": list("wxyz"), "question_ru": "в", "choices_ru": list("wxyz")}
    mmlu = [{"subject": "anatomy", "answer": number % 4} | columns for number in range(7)]
    rows = {
        "enMMLU": mmlu,
        "ruMMLU": mmlu,
        "treeway_abstractive": [{"src_sents": ["a b", "c"], "summary_sents": ["a"]}] * 7,
        "cp_doc_ru": [{"inputs": {"text": "Слово за слово"}}] * 7,
        "cp_para_ru": [{"inputs": {"text": "Слово"}}] * 7,
        "flores_en_ru": [{"inputs": {"en": "Good day", "ru": "Добрый день"}}] * 7,
        "flores_ru_en": [{"inputs": {"en": "Good day", "ru": "Добрый день"}}] * 7,
    }
    for name, content in rows.items():
        write(f"{name}.jsonl", content)
    write("flores_en_ru.few_shot.jsonl", rows["flores_en_ru"][:5])
    for task in load_tasks(f"paper:{tmp_path}"):
        assert task.prepare(tokenizer).num_examples == (7 if task.name == "flores_en_ru" else 2)


def test_the_default_tasks_prepare_with_the_embedded_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    prepared = {task.name: task.prepare(tokenizer) for task in load_tasks("default")}
    assert {name: task.statistic for name, task in prepared.items()} == {
        "perplexity": "nll", "kl": "kl", "minimal_pairs": "nll", "copy": "nll",
    }  # fmt: skip
    pairs = embedded_dataset("minimal_pairs")
    assert len(pairs) == 612 and len(set(pairs["UID"])) == 34


def test_lm_eval_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(LayerPruneError, match=r"pip install 'hf-layerprune\[lm-eval\]'"):
        load_tasks("lm_eval:arc_easy")


def test_costs_of_what_lm_eval_logged():
    rows = [{"metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0}, {"metrics": ["acc"], "acc": 0.0}]
    costs, weights = costs_of_samples({"a": rows, "b": rows[:1]}, "t")
    assert costs.tolist() == [0, 1, 0] and weights.tolist() == [1, 1, 1]
    with pytest.raises(LayerPruneError, match=r"task t: its first metric, ppl, is no number in \[0, 1\]"):
        costs_of_samples({"a": [{"metrics": ["ppl"], "ppl": 31.0}]}, "t")


def test_lm_eval_runs_a_task_of_its_own_format(model, tokenizer, write, tmp_path):
    pytest.importorskip("lm_eval")
    data = write("rows.jsonl", AGIEVAL)
    settings = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{options}}",
        "doc_to_target": "{{['A', 'B', 'C'].index(label)}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    tasks = load_tasks(write("theirs.yaml", yaml.safe_dump(settings)))
    own = MultipleChoiceTask(data, name="own", choices="options", answer="label")
    report = evaluate_tasks(model, [*tasks, own], tokenizer)
    assert report.results["theirs"].quality == report.results["own"].quality
