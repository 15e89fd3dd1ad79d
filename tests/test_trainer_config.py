import dataclasses

import numpy as np
import pytest
from conftest import tiny_model
from trl import SFTConfig, TrlParser

from hf_layerprune import IterativeLayerDistillConfig, LayerPruneError
from hf_layerprune.budget import Budget
from hf_layerprune.scoring import Race
from hf_layerprune.trainer.trainable import make_trainable


def own_fields():
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    return [field for field in dataclasses.fields(IterativeLayerDistillConfig) if field.name not in inherited]


def test_every_own_field_is_documented_twice():
    assert len(own_fields()) == 30
    for field in own_fields():
        assert f"{field.name} (" in IterativeLayerDistillConfig.__doc__, field.name
        assert field.metadata["help"].replace("%%", "").count("%") == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"target_num_layers": 0},
        {"target_num_layers": 2.5},
        {"target_num_layers": 3, "target_latency": 0.5},
        {"layers_per_round": 0},
        {"layers_per_round": 2.0},
        {"num_calibration_samples": 0},
        {"kl_weight": -1.0},
        {"kl_weight": "1"},
        {"hidden_weight": float("nan")},
        {"beta": 2.0},
        {"temperature": 0.0},
        {"learning_rate": float("nan")},
        {"on_policy_learning_rate": -1e-5},
        {"max_length": 0},
        {"max_steps": 0},
        {"max_steps": -5},
        {"num_train_epochs": 0},
        {"protect_first_layers": -1},
        {"protect_last_layers": 1.5},
        {"per_device_train_batch_size": 0},
        {"per_device_eval_batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"seed": -1},
        {"dataloader_num_workers": -1},
        {"chat_template_path": "nowhere.jinja"},
        {"criterion": "cosine"},
        {"loss_preset": "balanced"},
        {"compensation": "rescale"},
        {"loss_preset": "paper", "lm_weight": 0.1},
        {"trained_layers": "some"},
        {"race_confidence": 0.9, "one_shot": True},
        {"edits": "parallelize", "criterion": "tail"},
        {"kl_weight": 0.0, "hidden_weight": 0.0},
        {"num_repair_samples": 8},
        {"compensation": "least_squares", "edits": "parallelize"},
        {"activation_offloading": True, "use_cpu": True},
        {"label_smoothing_factor": 0.1},
        {"loss_type": "dft"},
        {"neftune_noise_alpha": 5.0},
        {"one_shot": True, "criterion": "angular_distance", "target_latency": 0.8},
    ],
)
def test_values_out_of_range_are_refused(tmp_path, changes):
    with pytest.raises(LayerPruneError):
        IterativeLayerDistillConfig(output_dir=str(tmp_path), **changes)


def test_kernels_that_are_not_installed_are_missed_before_a_layer_is_scored(monkeypatch):
    monkeypatch.setattr("hf_layerprune.trainer.config.is_liger_kernel_available", lambda: False)
    with pytest.raises(LayerPruneError, match="use_liger_kernel needs the package liger-kernel"):
        IterativeLayerDistillConfig(output_dir="x", use_liger_kernel=True)


def test_checkpointing_is_never_reentrant():
    config = IterativeLayerDistillConfig(output_dir="x", gradient_checkpointing_kwargs={"use_reentrant": True})
    assert config.gradient_checkpointing_kwargs == config.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.filterwarnings("error")
def test_checkpointing_gives_no_warning_of_its_names():
    student = tiny_model().train()
    assert IterativeLayerDistillConfig(output_dir="x", gradient_checkpointing=True).gradient_checkpointing is True
    assert not IterativeLayerDistillConfig(output_dir="x").gradient_checkpointing
    getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)({"use_reentrant": True})
    make_trainable(student, [1], everything=False)


def test_settings_are_values():
    config = IterativeLayerDistillConfig(output_dir="x", trained_layers="10, 3,3", edits="remove, parallelize")
    assert config.trained_layers == (3, 10) and config.edits == config.edit_space.kinds == ("remove", "parallelize")
    assert config.budget is None and config.race is None
    assert config.given_bf16 is None
    config = IterativeLayerDistillConfig(output_dir="x", target_latency=0.5, race_confidence=0.9)
    assert config.trained_layers == "neighbours" and config.budget == Budget("latency", 0.5)
    assert config.race == Race(0.9, config.seed)


def test_numbers_may_be_numpys_and_layers_any_that_can_be_listed():
    for layers in (range(3, 5), {4, 3}, np.array([3, 4]), (np.int64(3), 4)):
        assert IterativeLayerDistillConfig(output_dir="x", trained_layers=layers).trained_layers == (3, 4)
    budget = IterativeLayerDistillConfig(output_dir="x", target_num_layers=np.int64(3)).budget
    assert budget == Budget("depth", 3) and type(budget.target) is int
    assert type(Budget("latency", np.float32(0.5)).target) is float
    for target in (0, 2.5, True, "3"):
        with pytest.raises(LayerPruneError, match="depth=.*target_num_layers.* is out of range; it must be a whole"):
            IterativeLayerDistillConfig(output_dir="x", target_num_layers=target)


@pytest.mark.filterwarnings("error")
def test_the_plain_case_gives_no_warning_and_runs_anywhere(tmp_path):
    config = IterativeLayerDistillConfig(output_dir=str(tmp_path), target_num_layers=3)
    assert config.use_cpu and config.bf16 in (True, False)
    assert config.learning_rate == 1e-4


def test_command_line_and_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text("target_num_layers: 7\nkl_weight: 0.5\n")
    parser = TrlParser(IterativeLayerDistillConfig)
    (config,) = parser.parse_args_and_config(
        ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path), "--kl_weight", "2"]
    )
    assert (config.target_num_layers, config.kl_weight) == (7, 2.0)


def test_a_recipe_may_report_to_nobody(tmp_path):
    assert IterativeLayerDistillConfig(output_dir=str(tmp_path), report_to=None).report_to == []
