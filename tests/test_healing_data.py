"""A teacher's own answers as data to heal on."""

import copy
import json
import signal
from pathlib import Path

import forked
import pytest
import torch
import trained_tokenizers
from conftest import END, VOCAB_SIZE, byte_tokenizer, errors_of, rounds_of, tiny_config, tiny_model
from datasets import Dataset, IterableDataset, load_dataset
from filelock import FileLock
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Tokenizer

from hf_layerprune import (
    HealingDataConfig,
    IterativeLayerDistillTrainer,
    LayerPruneError,
    cli,
    generate_healing_data,
    prune,
)
from hf_layerprune.data import load_text_dataset, tokenized_batches
from hf_layerprune.trainer.healing import HealingTrainer

TURN = "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '" + TURN + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXTS = [f"Prompt number {n} speaks of {'many ' * (n % 4)}things, and then it goes on for a while." for n in range(10)]
CHATS = [[{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "No."}] for n in range(6)]


def text_rows():
    return Dataset.from_dict({"text": TEXTS})


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config(**changes):
    settings = {"prompt_tokens": 16, "max_new_tokens": 12, "batch_size": 3, "temperature": 1.0}
    return HealingDataConfig(**settings | changes)


def rows_of(path):
    """The rows, without what they are continued by."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{key: row[key] for key in ("prompt", "completion", "truncated")} for row in rows]


def saying(model, *answers):
    """The model with a `generate` that writes the given tokens, whatever it is asked."""

    def generate(input_ids, **_):
        longest = max(map(len, answers))
        ids = torch.tensor([list(answer) + [VOCAB_SIZE - 1] * (longest - len(answer)) for answer in answers])
        return torch.cat([input_ids, ids[: len(input_ids)]], dim=1)

    model.generate = generate
    return model


def test_greedy_answers_are_what_the_model_writes_alone(tmp_path, tokenizer):
    model, path = tiny_model(), tmp_path / "folder" / "answers.jsonl"
    report = generate_healing_data(model, text_rows(), path, config(temperature=0), tokenizer)
    expected = []
    for text in TEXTS:
        prompt = text[:16].rsplit(" ", 1)[0]
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        truncated, answer = VOCAB_SIZE - 1 not in written, tokenizer.decode(written, skip_special_tokens=True)
        answer = answer.rstrip("\ufffd") if truncated else answer
        expected.append({"prompt": prompt, "completion": answer, "truncated": truncated})
    told = [row for row in expected if row["completion"].strip()]
    assert rows_of(path) == told
    assert (report.num_rows, report.num_empty) == (len(told), len(TEXTS) - len(told))
    read = load_dataset("json", data_files=str(path), split="train")
    assert read.select_columns(["prompt", "completion", "truncated"]).to_list() == told


@pytest.mark.parametrize("legacy", (True, False))
def test_a_sentencepiece_tokenizer_continues_a_text_with_the_space_that_was_written(tmp_path, legacy):
    tokenizer = copy.deepcopy(trained_tokenizers.sentencepiece(legacy))
    after = [("<s>", 1), ("</s>", 2)]  # it ends each text, but not one that is to go on
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=after)
    model, asked = tiny_model(vocab_size=trained_tokenizers.SIZE), []
    written, prompt = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the", TEXTS[0][:15]))
    assert len(written) == 1
    model.generation_config.suppress_tokens = [n for n in range(trained_tokenizers.SIZE) if n != written[0]]
    model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    generate_healing_data(model, text_rows().take(1), tmp_path / "a.jsonl", config(max_new_tokens=2), tokenizer)
    assert rows_of(tmp_path / "a.jsonl") == [{"prompt": TEXTS[0][:15], "completion": " the the", "truncated": True}]
    assert asked[0] == [[1, *prompt]]


def test_the_seed_decides_and_the_state_of_random_numbers_stays(tmp_path, tokenizer):
    model, state = tiny_model(), torch.random.get_rng_state()
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 7}, "d": {"temperature": 0.5}}.items():
        generate_healing_data(model, text_rows(), tmp_path / f"{name}.jsonl", config(**changes), tokenizer)
        torch.rand(3)
    a, b, c, d = (rows_of(tmp_path / f"{name}.jsonl") for name in "abcd")
    assert a == b and a != c and a != d
    torch.random.set_rng_state(state)
    generate_healing_data(model, text_rows(), tmp_path / "e.jsonl", config(), tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_checkpoints_own_sampling_is_the_default(tmp_path, tokenizer):
    model = tiny_model()
    generate_healing_data(model, text_rows(), tmp_path / "greedy.jsonl", config(temperature=0), tokenizer)
    model.generation_config.do_sample, model.generation_config.top_k = True, 1
    generate_healing_data(model, text_rows(), tmp_path / "own.jsonl", config(temperature=None), tokenizer)
    assert rows_of(tmp_path / "own.jsonl") == rows_of(tmp_path / "greedy.jsonl")
    generate_healing_data(model, text_rows(), tmp_path / "all.jsonl", config(temperature=None, top_k=0), tokenizer)
    model.generation_config.do_sample = False  # such a checkpoint is sampled as it is, whatever else it says
    generate_healing_data(model, text_rows(), tmp_path / "plain.jsonl", config(temperature=None), tokenizer)
    assert rows_of(tmp_path / "plain.jsonl") == rows_of(tmp_path / "all.jsonl")
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.0
    generate_healing_data(model, text_rows(), tmp_path / "cold.jsonl", config(temperature=None), tokenizer)
    assert rows_of(tmp_path / "cold.jsonl") == rows_of(tmp_path / "greedy.jsonl")


KILLED = """
import os, signal, sys
from conftest import byte_tokenizer, tiny_model
from test_healing_data import config, text_rows
from hf_layerprune import generate_healing_data

def kill(done, total):
    if done >= 6:
        os.kill(os.getpid(), signal.SIGKILL)

generate_healing_data(tiny_model(), text_rows(), sys.argv[1], config(), byte_tokenizer(), on_rows=kill)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path, tokenizer):
    path, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    killed = forked.run(KILLED, path)
    assert killed.wait() == -signal.SIGKILL, killed.stderr
    expected = generate_healing_data(tiny_model(), text_rows(), whole, config(), tokenizer)
    assert whole.read_bytes().startswith(path.read_bytes()) and 0 < len(rows_of(path)) <= 6
    with path.open("a") as file:  # a second kill, in the middle of writing
        file.write('{"prompt": "ha')
    seen, model, calls = [], tiny_model(), []
    generate = model.generate
    model.generate = lambda **inputs: calls.append(len(inputs["input_ids"])) or generate(**inputs)
    resumed = generate_healing_data(model, text_rows(), path, config(), tokenizer, lambda *done: seen.append(done))
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10)] and calls == [3, 3, 1]
    assert resumed == expected and path.read_bytes() == whole.read_bytes()
    seen.clear()
    again = generate_healing_data(model, text_rows(), path, config(), tokenizer, lambda *done: seen.append(done))
    assert again == expected and len(seen) == 2 and path.read_bytes() == whole.read_bytes()  # of the last batch only
    seen.clear()
    generate_healing_data(model, text_rows(), path, config(batch_size=4), tokenizer, lambda *done: seen.append(done))
    assert path.read_bytes().startswith(whole.read_bytes()[:1000]) and seen == [(9, 10), (10, 10)]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"temperature": 0.5},
        {"max_new_tokens": 13},
        {"model": 1},
        {"prompts": Dataset.from_dict({"text": [*TEXTS[:-1], "another text"]})},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_answers_of_two_runs_are_not_mixed(tmp_path, tokenizer, changes):
    path = tmp_path / "answers.jsonl"
    generate_healing_data(tiny_model(), text_rows(), path, config(), tokenizer)
    changes = dict(changes)
    model, prompts = tiny_model(seed=changes.pop("model", 0)), changes.pop("prompts", text_rows())
    before = path.read_bytes()
    with pytest.raises(LayerPruneError, match=r"answers\.jsonl holds rows of another run"):
        generate_healing_data(model, prompts, path, config(**changes), tokenizer)
    assert path.read_bytes() == before


def test_two_runs_do_not_write_at_once_and_what_two_wrote_is_refused(tmp_path, tokenizer):
    path = tmp_path / "out" / "answers.jsonl"

    def call():
        return generate_healing_data(tiny_model(), text_rows(), path, config(), tokenizer)

    path.parent.mkdir()
    with FileLock(f"{path}.lock"), pytest.raises(LayerPruneError, match="answers.jsonl is in use: another run is wr"):
        call()
    report, lines = call(), path.read_text().splitlines(keepends=True)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for mixed in (lines + lines, [line for line in lines for _ in range(2)], lines[3:6] + lines[:3] + lines[6:]):
        path.write_text("".join(mixed))
        with pytest.raises(LayerPruneError, match="or of two that ran at once; delete it, or set another"):
            call()
    path.write_text("".join(lines))
    assert call() == report and path.read_text() == "".join(lines)


def test_what_is_not_ours_stays(tmp_path, tokenizer):
    mine = tmp_path / "mine.jsonl"
    for content in ("{}\n", "text\n", "[1]\n", "text without an end"):
        mine.write_text(content)
        with pytest.raises(LayerPruneError, match="holds rows of another run"):
            generate_healing_data(tiny_model(), text_rows(), mine, config(), tokenizer)
        assert mine.read_text() == content
    with pytest.raises(LayerPruneError, match=r"must end in \.jsonl"):
        generate_healing_data(tiny_model(), text_rows(), tmp_path / "mine.txt", config(), tokenizer)


def test_chats_go_through_the_template_and_come_back_as_messages(tmp_path):
    tokenizer, model, asked = chat_tokenizer(), tiny_model(vocab_size=VOCAB_SIZE + 1), []
    whole = model.generate
    model.generate = lambda **inputs: asked.extend(inputs["input_ids"].tolist()) or whole(**inputs)
    path = tmp_path / "chats.jsonl"
    rows = Dataset.from_dict({"messages": CHATS, "text": ["not this"] * len(CHATS)})
    report = generate_healing_data(model, rows, path, config(temperature=4.0, max_new_tokens=100), tokenizer)
    assert tokenizer.decode(asked[0]) == f"user: Question 0?{TURN}assistant: "
    assert report.num_rows + report.num_empty == len(CHATS)
    for row in rows_of(path):
        assert [*row["prompt"], CHATS[0][1]] in CHATS
        (answer,) = row["completion"]
        assert answer["role"] == "assistant" and TURN not in answer["content"] and END not in answer["content"]
    assert 0 < report.num_truncated < len(CHATS), "some end by themselves, some are cut"


def test_what_a_template_is_given_next_to_chats_comes_along(tmp_path):
    tokenizer, model, asked = chat_tokenizer(), tiny_model(vocab_size=VOCAB_SIZE + 1), []
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }}: {% endif %}{{ style or 'long' }}! " + TEMPLATE
    whole = model.generate
    model.generate = lambda **inputs: asked.extend(inputs["input_ids"].tolist()) or whole(**inputs)
    tools = [{"type": "function", "name": "look_up"}]
    rows = [{"messages": chat, "tools": None, "chat_template_kwargs": None} for chat in CHATS[:3]]
    rows[1] |= {"tools": json.dumps(tools), "chat_template_kwargs": {"style": "short"}}
    path = tmp_path / "chats.jsonl"
    generate_healing_data(model, Dataset.from_list(rows), path, config(), tokenizer)
    prompts = [tokenizer.decode(ids).replace(END, "") for ids in asked]
    assert prompts[0].startswith("long! user: Question 0?") and prompts[1].startswith("look_up: short! user: Q")
    assert [json.loads(line)["tools"] for line in path.read_text().splitlines()] == [None, json.dumps(tools), None]
    (batch,) = tokenized_batches(load_text_dataset(path), tokenizer)  # as `compress` reads it
    read = [tokenizer.decode(ids).replace(END, "") for ids in batch["input_ids"]]
    assert all(text.startswith(prompt) for text, prompt in zip(read, prompts, strict=True))
    other = Dataset.from_list([row | {"tools": None} for row in rows])
    with pytest.raises(LayerPruneError, match="holds rows of another run"):
        generate_healing_data(model, other, path, config(), tokenizer)


def test_sharegpt_rows_are_answered_as_compress_reads_them(tmp_path):
    turns = [[{"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": "No."}] for n in range(3)]
    model, path = tiny_model(vocab_size=VOCAB_SIZE + 1), tmp_path / "chats.jsonl"
    generate_healing_data(model, Dataset.from_dict({"conversations": turns}), path, config(), chat_tokenizer())
    assert rows_of(path)[0]["prompt"] == [{"role": "user", "content": "Question 0?"}]


def test_texts_can_be_a_users_messages_or_stay_whole(tmp_path, tokenizer):
    chats, whole, named = (tmp_path / f"{name}.jsonl" for name in ("chats", "whole", "named"))
    model = saying(tiny_model(vocab_size=VOCAB_SIZE + 1), *[tokenizer(" yes")["input_ids"]] * 10)
    generate_healing_data(model, text_rows(), chats, config(as_chat=True), chat_tokenizer())
    assert [row["prompt"] for row in rows_of(chats)] == [[{"role": "user", "content": text}] for text in TEXTS]
    generate_healing_data(model, Dataset.from_dict({"prompt": TEXTS}), whole, config(), tokenizer)
    assert [row["prompt"] for row in rows_of(whole)] == TEXTS
    asked = config(prompt_column="mine", num_prompts=4)
    rows = Dataset.from_dict({"mine": ["", *TEXTS], "text": [""] * 11})
    generate_healing_data(model, rows, named, asked, tokenizer)
    openings = [text[:16].rsplit(" ", 1)[0] for text in TEXTS[:3]]  # a blank text is no prompt
    assert [row["prompt"] for row in rows_of(named)] == openings


def test_ends_and_empty_answers(tmp_path, tokenizer):
    end, text = VOCAB_SIZE - 1, lambda words: tokenizer(words)["input_ids"]
    answers = [text("good") + [end] + text("more"), [end], text(" \n") + [end], text("x" * 12)]
    rows = Dataset.from_dict({"prompt": [f"prompt {n}" for n in range(4)]})

    def call(name, **changes):
        model = saying(tiny_model(), *answers)
        report = generate_healing_data(model, rows, tmp_path / name, config(batch_size=5, **changes), tokenizer)
        return report, rows_of(tmp_path / name)

    report, written = call("all.jsonl", max_new_tokens=12)
    assert [row["completion"] for row in written] == ["good", "x" * 12]
    assert [row["prompt"] for row in written] == ["prompt 0", "prompt 3"]
    assert [row["truncated"] for row in written] == [False, True]
    assert (report.num_rows, report.num_empty, report.num_truncated, report.num_tokens) == (2, 2, 1, 4 + 12)
    with pytest.raises(LayerPruneError, match="all answers are blank"):
        generate_healing_data(
            saying(tiny_model(), [end]), rows.select([0]), tmp_path / "none.jsonl", config(), tokenizer
        )
    assert not (tmp_path / "none.jsonl").read_text()


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer):
    texts = Dataset.from_dict({"prompt": ["short", "a long prompt, too long", ""]})
    path, model = tmp_path / "a.jsonl", saying(tiny_model(), tokenizer(" yes")["input_ids"])
    report = generate_healing_data(model, texts, path, config(max_prompt_tokens=10), tokenizer)
    assert [row["prompt"] for row in rows_of(path)] == ["short"]
    assert (report.num_rows, report.num_empty, report.num_too_long) == (1, 0, 1)
    with pytest.raises(LayerPruneError, match="every prompt in column 'prompt' is longer than 4 tokens"):
        generate_healing_data(model, texts, tmp_path / "b.jsonl", config(max_prompt_tokens=4), tokenizer)


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ({"title": ["a"]}, {}, r"columns \['title'\] but no 'messages' or 'prompt' or 'text' or 'conversations'"),
        ({"text": ["a"]}, {"prompt_column": "body"}, "no 'body'"),
        ({"text": ["", " ", None]}, {}, "hold no text"),
        ({"messages": CHATS}, {}, "row 0 does not fit the chat template: .*chat_template is not set"),
        ({"messages": [CHATS[0][1:]]}, {}, "row 0 has no message to answer"),
        ({"messages": [[{"role": "user", "content": None}]]}, {}, "row 0 is .*; it must be a text or"),
        ({"text": ["a"]}, {"max_new_tokens": 256}, "an answer of up to 256 tokens leaves 0 of the"),
        ({"text": ["a"]}, {"max_prompt_tokens": 250}, "leaves 244 .* for a prompt of up to 250;"),
        ({"text": ["a"]}, {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"text": ["a"]}, {"temperature": -1}, "temperature=-1"),
        ({"text": ["a"]}, {"top_p": 2}, "top_p=2"),
        ({"text": ["a"]}, {"top_k": -1}, "top_k=-1"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_written(tmp_path, tokenizer, prompts, changes, message):
    with pytest.raises(LayerPruneError, match=message):
        prompts = Dataset.from_dict(prompts)
        generate_healing_data(tiny_model(), prompts, tmp_path / "a.jsonl", config(**changes), tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tokenizer):
    model = tiny_model(vocab_size=200, eos_token_id=0)
    with pytest.raises(LayerPruneError, match="257 tokens but .* only 200"):
        generate_healing_data(model, "embedded:calibration", tmp_path / "out.jsonl", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_stream_is_refused(tmp_path, tokenizer):
    rows = IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    with pytest.raises(LayerPruneError, match="IterableDataset, which cannot be resumed"):
        generate_healing_data(tiny_model(), rows, tmp_path / "a.jsonl", config(), tokenizer)


TOGETHER = """
import sys
from conftest import byte_tokenizer, tiny_model
from test_healing_data import config, text_rows
import torch.distributed as dist
from hf_layerprune import generate_healing_data
calls, model = [], tiny_model()
whole = model.generate
model.generate = lambda **inputs: calls.append(len(inputs["input_ids"])) or whole(**inputs)
report = generate_healing_data(model, text_rows(), sys.argv[1], config(), byte_tokenizer())
assert sum(calls) == (6, 4)[dist.get_rank()], calls
assert report.num_rows + report.num_empty == 10
dist.destroy_process_group()
"""


def test_two_processes_write_what_one_does(tmp_path, tokenizer):
    path, alone = tmp_path / "together.jsonl", tmp_path / "alone.jsonl"
    forked.run_ranks(2, TOGETHER, path)
    generate_healing_data(tiny_model(), text_rows(), alone, config(), tokenizer)
    assert path.read_bytes() == alone.read_bytes()


def test_a_trainer_heals_on_the_file_with_completion_only_loss(tmp_path, tokenizer):
    path, teacher = tmp_path / "answers.jsonl", tiny_model()
    generate_healing_data(teacher, text_rows(), path, config(), tokenizer)
    rows = load_dataset("json", data_files=str(path), split="train")
    trainer = IterativeLayerDistillTrainer(
        model=teacher,
        args=tiny_config(tmp_path / "run", packing=False, max_length=64, target_num_layers=4),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    healing = HealingTrainer(trainer, prune(teacher, [1]), [0], trainer.train_dataset, tmp_path / "run")
    tokenized = trainer.all_train_rows
    scored = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in tokenized]
    assert sorted(scored) == sorted(row["completion"] + END for row in rows)
    batch = next(iter(healing.get_train_dataloader()))
    parts = healing.loss_parts(healing.model, batch)
    assert parts["num_tokens"] == (batch["labels"] != -100).sum()
    trainer.train()
    assert rounds_of(trainer)[0]["kl"] > 0 and trainer.model.config.num_hidden_layers == 4


QUICK = ["--num_prompts", "4", "--max_new_tokens", "8", "--batch_size", "2"]


def run(*arguments):
    return cli.main(["generate", *map(str, arguments)])


def test_the_command_writes_goes_on_and_reads_its_settings_from_yaml(tmp_path, model_folder, write, capsys):
    out, text = tmp_path / "out.jsonl", write("texts.txt", "\n".join(TEXTS))
    arguments = ["--model", model_folder, "--dataset", text, "--output_file", out]
    assert run(*arguments, *QUICK) == 0
    printed = capsys.readouterr().out
    assert "4 rows, " in printed and "cut at 8 tokens" in printed
    assert run(*arguments, *QUICK) == 0 and "4 rows, " in capsys.readouterr().out
    recipe = write("recipe.yaml", f"model: {model_folder}\ndataset: {text}\nnum_prompts: 4\nmax_new_tokens: 8\n"
                   "batch_size: 2\n")  # fmt: skip
    assert run("--config", recipe, "--output_file", tmp_path / "again.jsonl") == 0
    assert out.read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert len(rows_of(out)) == 4


def test_the_command_says_when_a_chat_model_is_not_asked_as_one(tmp_path, write, capsys):
    for part in (chat_tokenizer(), tiny_model(vocab_size=VOCAB_SIZE + 1)):
        part.save_pretrained(tmp_path / "chat")
    text = write("texts.txt", "\n".join(TEXTS))
    arguments = ["--model", tmp_path / "chat", "--dataset", text, *QUICK, "--output_file"]
    assert run(*arguments, tmp_path / "plain.jsonl") == 0 and "--as_chat true" in capsys.readouterr().err
    assert run(*arguments, tmp_path / "chats.jsonl", "--as_chat", "true") == 0
    assert "--as_chat" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--model", "{folder}/nowhere"], "cannot be loaded as a model"),
        (["--dataset", "{folder}/nowhere.jsonl"], "Unable to find"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--output_file", "{folder}/out.txt"], "must end in .jsonl"),
        (["--output_file", "{folder}/texts.txt/out.jsonl"], "texts.txt"),
        (["--sampling", "1"], "--sampling"),
        (["--prompt_tokens", "9", "--as_chat", "true"], "prompt_tokens=9 has no effect: column 'text' is asked whole"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path, model_folder, write, capsys, extra, message):
    arguments = ["--model", model_folder, "--dataset", write("texts.txt", "\n".join(TEXTS)),
                 "--output_file", tmp_path / "out.jsonl", *QUICK]  # fmt: skip
    assert run(*arguments, *(part.format(folder=tmp_path) for part in extra)) == 2
    error = errors_of(capsys)
    assert error.startswith("hf-layerprune: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("name, message", [("out.txt", "must end in .jsonl"), ("folder.jsonl", "is a folder; name a")])
def test_a_file_that_cannot_be_written_is_refused_before_text_is_read(name, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.setattr("hf_layerprune.cli.generate.read_dataset", pytest.fail)
    assert run("--output_file", tmp_path / name) == 2 and message in errors_of(capsys)


def test_a_file_in_use_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr("hf_layerprune.cli.generate.read_dataset", pytest.fail)
    monkeypatch.setattr("hf_layerprune.healing_data.load_model", pytest.fail)
    with FileLock(f"{path}.lock"):
        assert run("--output_file", path) == 2 and "out.jsonl is in use: another run is wr" in errors_of(capsys)
        with pytest.raises(LayerPruneError, match="is in use"):
            generate_healing_data("embedded", "embedded:healing", path)


def test_ctrl_c_keeps_what_is_done(tmp_path, model_folder, write, capsys, monkeypatch):
    def interrupted(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Qwen2ForCausalLM.generate", interrupted)
    text = write("texts.txt", "\n".join(TEXTS))
    assert run("--model", model_folder, "--dataset", text, "--output_file", tmp_path / "out.jsonl", *QUICK) == 130
    assert "run the same command to continue" in errors_of(capsys)
