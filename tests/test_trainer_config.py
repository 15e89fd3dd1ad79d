import dataclasses

import pytest
from trl import SFTConfig, TrlParser

from hf_layerprune import IterativeLayerDistillConfig, LayerPruneError


def own_fields():
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    return [field for field in dataclasses.fields(IterativeLayerDistillConfig) if field.name not in inherited]


def test_every_own_field_is_documented_twice():
    assert len(own_fields()) == 28
    for field in own_fields():
        assert f"{field.name} (" in IterativeLayerDistillConfig.__doc__, field.name
        assert field.metadata["help"].replace("%%", "").count("%") == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"target_num_layers": 0},
        {"layers_per_round": 0},
        {"protect_first_layers": -1},
        {"num_calibration_samples": 0},
        {"num_eval_samples": 0},
        {"per_device_eval_batch_size": 0},
        {"kl_weight": -1.0},
        {"kl_weight": "1"},
        {"target_num_layers": float("nan")},
        {"target_num_layers": 2.5},
        {"temperature": 0.0},
        {"criterion": "cosine"},
        {"loss_preset": "balanced"},
        {"compensation": "rescale"},
        {"loss_preset": "paper", "lm_weight": 0.1},
        {"trained_layers": "some"},
        {"kl_weight": 0.0, "hidden_weight": 0.0},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
)
def test_values_out_of_range_are_refused(tmp_path, changes):
    with pytest.raises(LayerPruneError):
        IterativeLayerDistillConfig(output_dir=str(tmp_path), **changes)


def test_named_layers():
    assert IterativeLayerDistillConfig(output_dir="x", trained_layers="10, 3,3").named_trained_layers() == (3, 10)
    assert IterativeLayerDistillConfig(output_dir="x").named_trained_layers() is None


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
