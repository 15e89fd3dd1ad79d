"""A run that stopped, for whatever reason, goes on from where it was, or says why it does not."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load, read_report, tiny_model
from forked import run_ranks
from peft import LoraConfig
from transformers import TrainerCallback

from hf_layerprune import LayerDistillCallback, LayerPlan, LayerPruneError
from hf_layerprune.hub import load_run
from hf_layerprune.trainer import rounds
from hf_layerprune.trainer import run as run_module


class Killed(Exception):
    pass


class KillAt(LayerDistillCallback):
    """Raise at the n-th call of one event, as a power cut would."""

    def __init__(self, event, count):
        self.count = count

        def die(*_, **__):
            self.count -= 1
            if self.count == 0:
                raise Killed

        setattr(self, event, die)


@pytest.mark.parametrize(
    "event, count",
    [
        ("on_phase_begin", 2),  # before the first scoring
        ("on_phase_step", 3),
        ("on_step_end", 2),  # inside the first healing, before a checkpoint
        ("on_step_end", 4),  # behind a checkpoint
        ("on_round_end", 1),
        ("on_phase_begin", 6),  # healed, not yet evaluated
        ("on_phase_begin", 7),  # second round
        ("on_step_end", 9),
        ("on_round_end", 2),  # all is done
    ],
)
def test_resume_continues_where_it_was_and_ends_the_same(make, whole, tmp_path, event, count):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(Killed):
        make(folder="cut", callbacks=[KillAt(event, count)], **settings).train()
    started = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            started.append(state.global_step)

    resumed = make(folder="cut", callbacks=[Watch()], **settings)
    resumed.train(resume_from_checkpoint=True)
    if (event, count) == ("on_step_end", 4):
        assert started[0] == 3, "the healing did not go on from its checkpoint"
    folder = whole(**settings)
    cut = read_report(tmp_path / "cut")
    for a, b in zip(read_report(folder)["rounds"], cut["rounds"], strict=True):
        assert a["removed_layers"] == b["removed_layers"]
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-5)
        assert a["train_tokens"] == b["train_tokens"]
    models = load(folder / "model"), load(tmp_path / "cut" / "model")
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "cut" / "healing").exists()
    assert resumed.model.config.num_hidden_layers == 3
    assert resumed.evaluate()["eval_loss"] == pytest.approx(cut["rounds"][-1]["loss"], rel=1e-5)


def test_folders_of_no_run_are_not_replaced(make, tmp_path):
    theirs = tmp_path / "run" / "model" / "config.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("{}")
    with pytest.raises(LayerPruneError, match="holds model, which a run would replace"):
        make().train()
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [theirs]


def test_a_healed_student_is_loaded_not_made_again(make, tmp_path):
    settings = {"compensation": "least_squares", "target_num_layers": 4}
    with pytest.raises(Killed):
        make(callbacks=[KillAt("on_phase_begin", 7)], **settings).train()  # healed, not yet evaluated
    phases = []

    class Watch(LayerDistillCallback):
        def on_phase_begin(self, *_, phase, **__):
            phases.append(phase)

    make(callbacks=[Watch()], **settings).train(resume_from_checkpoint=True)
    assert phases == ["evaluating", "writing"]


WITH_CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "target_num_layers": 4, "measure_speed": False}


def assert_same_weights(*models):
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize("moment", ["before", "after", "recorded"])
def test_killed_while_a_healed_student_is_saved(make, whole, tmp_path, monkeypatch, moment):
    name = {"before": "replace_folder", "after": "save_student", "recorded": "rmtree"}[moment]
    module = {"replace_folder": run_module, "save_student": rounds, "rmtree": shutil}[name]
    act = getattr(module, name)

    def die(path, *args, **kwargs):
        if moment == "after":
            act(path, *args, **kwargs)
        if moment != "recorded" or (Path(path).name == "healing" and kwargs and list(Path(path).glob("*"))):
            raise Killed
        return act(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, die)
        make(**WITH_CHECKPOINTS).train()
    steps = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    make(callbacks=[Watch()], **WITH_CHECKPOINTS).train(resume_from_checkpoint=True)
    assert steps == ([] if moment == "recorded" else [2]), "more was healed again than the last steps"
    folder = whole(**WITH_CHECKPOINTS)
    assert_same_weights(load(folder / "model"), load(tmp_path / "run" / "model"))
    assert [path.name for path in (tmp_path / "run" / "rounds").iterdir()] == ["01"]
    assert not (tmp_path / "run" / "healing").exists()
    of_whole, cut = (read_report(path)["rounds"][0] for path in (folder, tmp_path / "run"))
    assert cut["train_tokens"] == of_whole["train_tokens"] and cut["seconds_healing"] > 0


def kill_at_save(monkeypatch, killed_step):
    """Raise when the run is about to name the checkpoint of a step."""
    save = run_module.RunFile.save

    def die(self, **changes):
        if getattr(changes.get("current"), "checkpoint", None) == killed_step:
            raise Killed
        save(self, **changes)

    monkeypatch.setattr(run_module.RunFile, "save", die)


def test_an_older_checkpoint_stays_until_the_run_names_the_new_one(make, tmp_path, monkeypatch):
    settings = WITH_CHECKPOINTS | {"save_total_limit": 1, "trained_layers": "neighbours"}
    make(folder="whole", **settings).train()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_save(patch, 2)
        make(**settings).train()
    folder = tmp_path / "run" / "healing"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    (folder / "checkpoint-2" / "model.safetensors").write_bytes(b"half of it")
    steps = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    teacher = tiny_model()
    make(teacher, callbacks=[Watch()], **settings).train(resume_from_checkpoint=True)
    assert steps == [1, 2]
    assert_same_weights(teacher, tiny_model())
    assert_same_weights(load(tmp_path / "whole" / "model"), load(tmp_path / "run" / "model"))


def test_a_finished_run_can_go_deeper(make, tmp_path):
    make(target_num_layers=4).train()
    make(target_num_layers=3).train(resume_from_checkpoint=True)
    assert [record["num_layers"] for record in read_report(tmp_path / "run")["rounds"]] == [4, 3]
    assert load(tmp_path / "run" / "model").config.num_hidden_layers == 3


def test_runs_are_not_mixed_up(make, tmp_path):
    make(target_num_layers=4).train()
    with pytest.raises(LayerPruneError, match="holds another run"):
        make(target_num_layers=4).train()
    with pytest.raises(LayerPruneError, match="trained_layers"):
        make(target_num_layers=3, trained_layers="neighbours").train(resume_from_checkpoint=True)
    for changes, message in (
        ({"num_eval_samples": 2}, "evaluation_text"),
        ({"num_calibration_samples": 2}, "calibration_text"),
        ({"weight_decay": 0.3}, "weight_decay"),
        ({"data_seed": 3}, "data_seed"),
        ({"teacher": tiny_model(seed=9)}, "model="),
    ):
        with pytest.raises(LayerPruneError, match=message):
            make(target_num_layers=3, **{"teacher": None, **changes}).train(resume_from_checkpoint=True)
    with pytest.raises(LayerPruneError, match="no run to resume; name the run's folder with output_dir if it was"):
        make(folder="other").train(resume_from_checkpoint=True)
    for elsewhere in (tmp_path / "elsewhere", str(tmp_path / "elsewhere")):
        with pytest.raises(LayerPruneError, match="must be the output_dir of the run"):
            make(target_num_layers=3).train(resume_from_checkpoint=elsewhere)
    (tmp_path / "run" / "run_state.json").write_text("{")
    with pytest.raises(LayerPruneError, match="damaged"):
        make(target_num_layers=3).train(resume_from_checkpoint=True)


def test_loss_that_is_no_number_stops_and_keeps_the_last_round(make, tmp_path):
    class Poison(LayerDistillCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1 and model.config.num_hidden_layers == 3:
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)

    with pytest.raises(LayerPruneError, match="nan at step 2 of 3"):
        make(callbacks=[Poison()]).train()
    assert load(tmp_path / "run" / "rounds" / "01").config.num_hidden_layers == 4
    assert len(read_report(tmp_path / "run")["rounds"]) == 1
    make(learning_rate=1e-4).train(resume_from_checkpoint=True)  # as the message says
    assert len(read_report(tmp_path / "run")["rounds"]) == 2


def test_a_ruined_healing_begins_again_with_another_learning_rate(make, tmp_path):
    class Poison(LayerDistillCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:  # it is saved then
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)

    with pytest.raises(LayerPruneError, match="nan at step 3 of 3.*resumes heals round 1 from its start"):
        make(callbacks=[Poison()], **WITH_CHECKPOINTS).train()
    assert not (tmp_path / "run" / "healing").exists()
    make(learning_rate=1e-4, **WITH_CHECKPOINTS).train(resume_from_checkpoint=True)
    assert len(read_report(tmp_path / "run")["rounds"]) == 1


def test_no_number_on_one_process_ends_all_of_them_with_one_message(tmp_path):
    script = f"""
import math, os
import conftest
from pathlib import Path
from hf_layerprune import IterativeLayerDistillTrainer
from hf_layerprune.trainer.healing import HealingTrainer
args = conftest.tiny_config(Path({str(tmp_path / "run")!r}), save_strategy="steps", save_steps=1, target_num_layers=4)
texts = conftest.short_texts()
trainer = IterativeLayerDistillTrainer(model=conftest.tiny_model(), args=args, train_dataset=texts,
                                       processing_class=conftest.byte_tokenizer())
whole = HealingTrainer.compute_loss
def poisoned(self, *args, **kwargs):
    return whole(self, *args, **kwargs) * (math.nan if self.state.global_step == 1 else 1)
if os.environ["RANK"] == "1":
    HealingTrainer.compute_loss = poisoned
try:
    trainer.train()
except ValueError as error:
    Path({str(tmp_path)!r}, "rank" + os.environ["RANK"]).write_text(str(error))
"""
    run_ranks(2, script)
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second and "nan at step 2 of 3" in first
    assert not (tmp_path / "run" / "healing").exists()


def test_other_errors_leave_all_checkpoints(make, tmp_path):
    class Refuse(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise LayerPruneError("something else")

    with pytest.raises(LayerPruneError, match="something else$"):
        make(callbacks=[Refuse()], **WITH_CHECKPOINTS).train()
    assert [path.name for path in (tmp_path / "run" / "healing").iterdir()] == ["checkpoint-1"]


def test_what_is_on_disk_is_read_behind_the_lock(make, tmp_path, monkeypatch):
    folder, read_state, locked = tmp_path / "run", run_module.read_state, []

    def load(folder):
        with pytest.raises(LayerPruneError, match="in use by another run"):
            run_module.lock_run(folder)
        locked.append(folder)
        return read_state(folder)

    monkeypatch.setattr(run_module, "read_state", load)
    with pytest.raises(LayerPruneError, match="holds no run"):
        make().open_run(resume_from_checkpoint=True)
    assert not list(folder.iterdir())
    make(target_num_layers=4, max_steps=1, measure_speed=False).train()
    before = (folder / "run_state.json").read_text()
    for resume, words in ((None, "holds another run"), (True, "trained_layers")):
        with pytest.raises(LayerPruneError, match=words):
            make(trained_layers="neighbours", max_steps=1).open_run(resume)
        run_module.lock_run(folder).release()  # a run that was refused keeps nobody out
    assert len(locked) == 4 and (folder / "run_state.json").read_text() == before


def test_another_target_within_a_round(make, tmp_path):
    settings = {"layers_per_round": 2, "max_steps": 2}
    with pytest.raises(Killed):
        make(callbacks=[KillAt("on_step_end", 1)], target_num_layers=3, **settings).train()
    make(target_num_layers=2, **settings).train(resume_from_checkpoint=True)
    rounds = read_report(tmp_path / "run")["rounds"]
    assert [len(record["removed_layers"]) for record in rounds] == [2, 1]
    for record in rounds:
        plan = LayerPlan.from_dict(record["plan"])
        assert plan.depth == record["num_layers"] and set(record["removed_layers"]) <= set(plan.removed_layers)


def test_a_finished_run_that_is_continued_is_not_finished_until_it_ends(make, tmp_path):
    settings = {"max_steps": 1, "heal": False}
    make(target_num_layers=4, **settings).train()
    assert load_run(tmp_path / "run").is_finished
    make(target_num_layers=4, **settings).train(resume_from_checkpoint=True)
    assert load_run(tmp_path / "run").is_finished
    with pytest.raises(Killed):
        make(callbacks=[KillAt("on_round_begin", 1)], target_num_layers=3, **settings).train(
            resume_from_checkpoint=True
        )
    assert not load_run(tmp_path / "run").is_finished
    make(target_num_layers=3, **settings).train(resume_from_checkpoint=True)
    assert load_run(tmp_path / "run").is_finished


def test_weights_ruined_by_the_very_last_step_are_noticed(make, tmp_path):
    with pytest.raises(LayerPruneError, match="no numbers|became|loss is"):
        make(target_num_layers=4, max_steps=1, learning_rate=1e38, max_grad_norm=1e38, optim="sgd").train()
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "rounds" / "01" / "config.json").exists()


def test_a_target_above_what_is_reached_is_refused_and_changes_nothing(make, tmp_path):
    make(target_num_layers=3).train()
    before = (tmp_path / "run" / "report.json").read_text()
    with pytest.raises(LayerPruneError, match="a run that is at 3 layers, beyond target_num_layers=4; lower"):
        make(target_num_layers=4).train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "report.json").read_text() == before


def test_other_layers_are_named_once_all_that_were_trained_are_gone(make, tmp_path):
    gone = make(target_num_layers=4, heal=False, folder="asked")
    gone.train()
    (edit,) = gone.run.edits
    (layer,) = edit.layers
    with pytest.raises(LayerPruneError, match="all of them have been removed; name others"):
        make(target_num_layers=4, trained_layers=[layer]).train()
    other = 0 if layer else 4
    make(target_num_layers=4, trained_layers=[other]).train(resume_from_checkpoint=True)
    assert read_report(tmp_path / "run")["settings"]["trained_layers"] == [other]


@pytest.mark.parametrize("unit", ["target_num_layers", "target_num_parameters"])
def test_a_target_that_a_round_went_beyond_is_refused(make, unit):
    def target(depth):
        return depth if unit == "target_num_layers" else tiny_model(depth).num_parameters()

    settings = {"target_num_layers": None, "layers_per_round": 2}
    make(**settings | {unit: target(3)}).train()
    with pytest.raises(LayerPruneError, match=f"a run that is at 3 layers, beyond {unit}="):
        make(**settings | {unit: target(4)}).train(resume_from_checkpoint=True)


def test_a_target_that_a_round_in_progress_went_beyond_is_refused(make):
    with pytest.raises(Killed):
        make(callbacks=[KillAt("on_step_end", 4)], target_num_layers=3).train()  # in the second round
    with pytest.raises(LayerPruneError, match="a run that is at 3 layers, beyond target_num_layers=4"):
        make(target_num_layers=4).train(resume_from_checkpoint=True)


def test_a_finished_run_keeps_the_settings_it_was_made_with(make, tmp_path):
    make().train()
    before = read_report(tmp_path / "run")["settings"]
    make(learning_rate=0.5).train(resume_from_checkpoint=True)
    assert read_report(tmp_path / "run")["settings"] == before


@pytest.mark.parametrize("count", [4, 6])  # behind a checkpoint; at the start of round 2
def test_lora_resumes_inside_its_healing(make, whole, tmp_path, count):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "peft_config": config,
    }
    folder = whole(**settings)
    with pytest.raises(Killed):
        make(callbacks=[KillAt("on_step_end", count)], **settings).train()
    make(**settings).train(resume_from_checkpoint=True)
    expected, cut = load(folder / "model"), load(tmp_path / "run" / "model")
    for a, b in zip(expected.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
