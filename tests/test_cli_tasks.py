"""`--tasks` on the command line."""

import json
import shutil

import pytest
from conftest import VOCAB_SIZE, errors_in, tiny_model

from hf_layerprune import cli
from hf_layerprune.cli import score as module

PAIRS = [("the cat sits", "cat the sits"), ("dogs bark", "bark dogs"), ("we are here", "we is here")] * 2


@pytest.fixture
def tasks_file(tmp_path):
    rows = [{"good": good, "bad": bad, "q": f"say {good}: " * 40} for good, bad in PAIRS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(*kinds):
        entries = {
            "pairs": "{kind: multiple_choice, name: pairs, dataset: rows.jsonl, prompt: '', choices: [good, bad], "
            "answer: good}",
            "kl": "{kind: kl, name: close, dataset: rows.jsonl, text: '{good}', max_length: 16}",
            "long": "{kind: multiple_choice, name: long, dataset: rows.jsonl, prompt: '{q}', choices: [good, bad], "
            "answer: good}",
        }
        path = tmp_path / "tasks.yaml"
        path.write_text("".join(f"- {entries[kind]}\n" for kind in kinds))
        return path

    return write


@pytest.fixture
def run(tmp_path, model_folder, capsys):
    def call(verb, *arguments):
        arguments = ["--model", model_folder, "--output_dir", tmp_path / "out", *arguments]
        status = cli.main([verb, *map(str, arguments)])
        output = capsys.readouterr()
        return status, output.out, errors_in(output.err)

    return call


def test_score_takes_rows_by_the_batch_size_and_tells_cut_prompts(run, tasks_file, tmp_path, monkeypatch, caplog):
    score_layers, seen = module.score_layers, []

    def spy(*arguments, tasks, **options):
        seen.extend(len(chunk.batch["input_ids"]) for task in tasks for chunk in task.chunks)
        return score_layers(*arguments, tasks=tasks, **options)

    monkeypatch.setattr(module, "score_layers", spy)
    status, _, _ = run("score", "--tasks", tasks_file("pairs", "long"), "--batch_size", "4")
    assert status == 0 and seen == [4] * 6
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["criterion"], scores["num_tokens"]) == ("tasks", 12)
    assert "task long: prompts too long for the model lost their beginning (12)" in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["score", "--criterion", "loss"], "tasks are for criterion='tasks', not 'loss'; leave out one"),
        (["score", "--criterion", "kl"], "tasks are for criterion='tasks', not 'kl'; leave out one"),
        (["compress", "--criterion", "kl"], "tasks are for criterion='tasks', not 'kl'; leave out one"),
        (["score", "--dataset", "mine.txt"], "tasks bring their own text; leave out dataset"),
        (["score", "--criterion", "tasks", "--num_samples", "8"], "tasks bring their own text; leave out num_"),
        (
            ["evaluate", "--num_samples", "8", "--max_length", "9"],
            "leave out max_length, num_samples",
        ),
    ],
    ids=lambda words: " ".join(words[:3]) if isinstance(words, list) else "",
)
def test_what_tasks_have_no_use_for_is_refused(run, tasks_file, tmp_path, arguments, message):
    status, _, error = run(*arguments, "--tasks", tasks_file("pairs"))
    assert status == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_evaluate_says_what_it_leaves_out(run, tasks_file, tmp_path):
    text = ["--dataset", "embedded:held_out", "--max_length", "32", "--num_samples", "2"]
    status, _, error = run("evaluate", "--tasks", tasks_file("kl", "pairs"), *text)
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]
    assert status == 0 and set(results) == {"pairs"}
    assert "left out: close; KL needs a teacher to compare with (--teacher)" in error
    assert run("evaluate", "--tasks", tasks_file("kl"), "--teacher", "embedded", *text)[0] == 2  # another vocabulary
    status, _, error = run(
        "evaluate", "--tasks", tasks_file("kl", "pairs"), "--teacher", tmp_path / "tiny-model", *text
    )
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]
    assert status == 0 and set(results) == {"close", "pairs"} and "left out" not in error


def test_evaluate_of_kl_alone_needs_a_teacher(run, tasks_file, tmp_path):
    status, _, error = run("evaluate", "--tasks", tasks_file("kl"))
    assert status == 2 and error == (
        "hf-layerprune: task close: KL needs a teacher to compare with; name it with --teacher\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["score", "evaluate"])
def test_another_tokenizer_is_one_line(run, tasks_file, tmp_path, model_folder, verb):
    tiny_model(vocab_size=100, eos_token_id=0).save_pretrained(tmp_path / "small")
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "small")
    status, _, error = run(verb, "--tasks", tasks_file("pairs"), "--model", tmp_path / "small")
    assert status == 2 and error.count("\n") == 1
    assert f"task pairs: batch 0 holds token id {VOCAB_SIZE - 1}, but the model's vocabulary has 100 entries" in error


def test_a_criterion_nobody_knows_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["score", "--criterion", "nope"]) == 2
    assert "criterion='nope' is unknown; choose one of kl" in capsys.readouterr().err and not list(tmp_path.iterdir())
