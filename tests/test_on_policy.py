import copy

import pytest
import torch
from conftest import load, tiny_config, tiny_model
from datasets import Dataset
from trl import DistillationTrainer

from hf_layerprune import LayerDistillCallback, LayerPruneError
from hf_layerprune.progress import StopOnSignal
from hf_layerprune.record import read_run
from hf_layerprune.trainer import on_policy


@pytest.fixture
def prompts():
    return Dataset.from_dict({"prompt": ["the sea was", "a ship of", "he said that", "there is no"]})


def on_policy_settings(**changes):
    return {
        "on_policy_steps": 2,
        "on_policy_tokens": 8,
        "on_policy_learning_rate": 1e-2,
        "target_num_layers": 4,
    } | changes


def test_the_last_round_heals_the_student_on_its_own_answers(make, prompts, tmp_path):
    teacher = tiny_model()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(teacher, prompt_dataset=prompts, **on_policy_settings())
    trainer.train()

    first, last = read_run(tmp_path / "run" / "report.json").rounds
    assert not first.is_on_policy and last.is_on_policy and last.edits == () and last.plan == first.plan
    assert last.before_healing == first.quality and last.unhealed == first.unhealed
    assert last.healing.num_tokens > 0 and last.quality.kl != first.quality.kl
    assert "| on policy |" in (tmp_path / "run" / "report.md").read_text()

    healed, final = (load(tmp_path / "run" / name) for name in ("rounds/01", "model"))
    for name, value in healed.named_parameters():
        assert not torch.equal(final.get_parameter(name), value), name
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert final.config.to_json_string() == healed.config.to_json_string()
    assert final.generation_config.to_dict() == healed.generation_config.to_dict()


def test_only_the_neighbours_of_all_gaps_change(make, prompts, tmp_path):
    trainer = make(prompt_dataset=prompts, **on_policy_settings(trained_layers="neighbours", target_num_layers=3))
    trainer.train()
    *_, before, after = (load(tmp_path / "run" / f"rounds/0{number}") for number in (1, 2, 3))
    blocks = on_policy_blocks(trainer)
    assert 0 < len(blocks) < 3 or blocks == [0, 1, 2]
    for name, value in before.named_parameters():
        trained = any(f".layers.{block}." in name for block in blocks)
        assert torch.equal(after.get_parameter(name), value) != trained, name


def on_policy_blocks(trainer):
    """Positions next to a gap between the layers that are left."""
    layers, last = trainer.run.rounds[-1].plan.layers, trainer.teacher.config.num_hidden_layers
    ends = [-1, *layers, last]
    gaps = [n for n in range(len(ends) - 1) if ends[n + 1] - ends[n] > 1]  # between blocks n - 1 and n
    return sorted({n for gap in gaps for n in (gap - 1, gap) if 0 <= n < len(layers)})


def test_answers_grow_and_the_loss_is_the_reverse_kl_on_them(make, prompts, monkeypatch):
    """The plain formula, on the answers that the trainer drew."""
    lengths, generate = [], DistillationTrainer._generate_single_turn
    seen, compute = [], DistillationTrainer._compute_loss

    def remember_length(self, *args, **kwargs):
        lengths.append(self.generation_config.max_new_tokens)
        return generate(self, *args, **kwargs)

    def remember_loss(self, model, inputs, num_items_in_batch):
        loss = compute(self, model, inputs, num_items_in_batch)
        seen.append((loss[0].item(), expected_loss(self, inputs)))
        return loss

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", remember_length)
    monkeypatch.setattr(DistillationTrainer, "_compute_loss", remember_loss)
    make(prompt_dataset=prompts, **on_policy_settings(on_policy_steps=4, on_policy_tokens=16)).train()
    assert lengths == [2, 7, 11, 16] and len(seen) == 4
    for loss, expected in seen:
        assert loss == pytest.approx(expected, rel=1e-4) and loss > 0


@torch.no_grad()
def expected_loss(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = [m(ids, attention_mask=mask).logits for m in (trainer.model, trainer.teacher_model)]
    start = inputs["prompt_ids"].shape[1] - 1
    student, teacher = (part[:, start:-1].log_softmax(-1) for part in logits)
    kl = (student.exp() * (student - teacher)).sum(-1)
    counted = inputs["completion_mask"].bool()
    return (kl[counted].sum() / counted.sum()).item()


def test_a_finished_run_can_be_finished_on_policy(make, prompts, tmp_path):
    make(target_num_layers=4).train()
    trainer = make(prompt_dataset=prompts, **on_policy_settings())
    trainer.train(resume_from_checkpoint=True)
    assert [record.is_on_policy for record in trainer.run.rounds] == [False, True]
    again = make(prompt_dataset=prompts, **on_policy_settings())
    again.train(resume_from_checkpoint=True)
    assert again.run.rounds == trainer.run.rounds
    more = on_policy_settings()
    more["on_policy_steps"] += 1
    with pytest.raises(LayerPruneError, match="holds a run with on_policy_steps="):
        make(prompt_dataset=prompts, **more).train(resume_from_checkpoint=True)


def test_a_chat_template_makes_texts_messages(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    rows = Dataset.from_dict({"prompt": ["why?", ""]})
    args = tiny_config(tmp_path, on_policy_steps=1)
    plain = on_policy.prompts_to_answer(rows, tokenizer, tiny_model(), args)
    assert tokenizer.batch_decode([*plain["prompt"]]) == ["why?"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    chats = on_policy.prompts_to_answer(rows, tokenizer, tiny_model(), args)
    assert tokenizer.batch_decode([*chats["prompt"]]) == ["user: why?"]


def test_the_student_reads_what_the_template_is_given_for_each_row(make, tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ tools[0].name if tools }}{{ style }}{{ m.keys() | list }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    read, generate = [], DistillationTrainer._generate_single_turn

    def remember(self, prompt_ids, *args):
        read.extend(tokenizer.batch_decode(prompt_ids))
        return generate(self, prompt_ids, *args)

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", remember)
    turn = {"role": "user", "content": "why?"}
    rows = [
        {"prompt": [turn], "tools": None, "chat_template_kwargs": None},
        {"prompt": [turn | {"name": "Ann"}], "tools": [{"name": "look_up"}], "chat_template_kwargs": {"style": " S"}},
    ]
    make(prompt_dataset=Dataset.from_list(rows), **on_policy_settings()).train()
    assert {*read} == {"['role', 'content']", "look_up S['role', 'content', 'name']"}


@pytest.mark.parametrize("steps, given", [(2, False), (0, True)])
def test_steps_and_prompts_belong_together(make, prompts, steps, given):
    with pytest.raises(LayerPruneError, match="on_policy_steps and prompt_dataset"):
        make(prompt_dataset=prompts if given else None, on_policy_steps=steps)


def test_a_diverging_student_names_the_setting(make, prompts, tmp_path):
    trainer = make(prompt_dataset=prompts, **on_policy_settings(on_policy_learning_rate=1e30))
    with pytest.raises(LayerPruneError, match="on_policy_learning_rate"):
        trainer.train()
    assert len(read_run(tmp_path / "run" / "run_state.json").rounds) == 1
    trainer = make(prompt_dataset=prompts, **on_policy_settings())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.run.rounds[-1].is_on_policy


def test_an_interrupt_leaves_no_checkpoint_that_nothing_reads(make, prompts, tmp_path):
    stop = StopOnSignal()

    class Ask(LayerDistillCallback):
        def on_phase_begin(self, *_, phase, **__):
            stop.requested = phase == "healing on policy"

    with pytest.raises(KeyboardInterrupt):
        make(prompt_dataset=prompts, callbacks=[Ask(), stop], **on_policy_settings()).train()
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    again = make(prompt_dataset=prompts, **on_policy_settings(target_num_layers=3))  # and is not done before an edit
    again.train(resume_from_checkpoint=True)
    assert [len(record.edits) for record in again.run.rounds] == [1, 1, 0] and again.run.rounds[-1].is_on_policy


@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_is_left_as_it_was(make, prompts, bf16):
    teacher = tiny_model()
    ids = torch.arange(12)[None]
    before = teacher(ids).logits
    make(teacher, prompt_dataset=prompts, **on_policy_settings(bf16=bf16, on_policy_learning_rate=1e-4)).train()
    assert torch.equal(teacher(ids).logits, before) and "forward" not in vars(teacher)
