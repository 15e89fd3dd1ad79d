"""What is estimated of a run is what the run then takes."""

import pytest
from conftest import tiny_config, tiny_model
from peft import LoraConfig
from transformers import TrainerCallback

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError
from hf_layerprune.budget import ModelSizes
from hf_layerprune.estimate import RunShape, disk_bytes, healing_setting, healing_settings, parse_size
from hf_layerprune.memory import LiveBytes, StepMeter
from hf_layerprune.surgery import to_pruned_qwen2

SIZES = {"hidden_size": 64, "intermediate_size": 160}


@pytest.mark.parametrize(
    "text, size",
    [("24GiB", 24 * 2**30), ("24G", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5gib", 3 * 2**29), ("512", 512)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24 bananas", "", "GiB", "-1GiB", "0GiB", "1e3GiB", "24GiBs"])
def test_what_is_no_size(text):
    with pytest.raises(LayerPruneError, match="24GiB"):
        parse_size(text)


class PeakOfHealing(TrainerCallback):
    def __init__(self, live):
        self.live, self.peaks = live, []

    def on_train_begin(self, *_, **__):
        self.live.take_peak()

    def on_train_end(self, *_, **__):
        self.peaks.append(self.live.take_peak())


LOWEST_GAPS = {"criterion": "tail", "protect_last_layers": 6}
LOWEST_PAIRS = {"edits": "parallelize", "protect_last_layers": 4}


@pytest.mark.parametrize(
    "trained, lora_r, rows, edits",
    [
        ("neighbours", None, 4, LOWEST_GAPS),
        ("all", None, 4, LOWEST_GAPS),
        ("all", None, 2, LOWEST_GAPS),
        ("neighbours", 4, 4, LOWEST_GAPS),
        ("2,5", None, 4, LOWEST_GAPS),
        ("neighbours", None, 4, LOWEST_PAIRS),
        ("all", None, 4, LOWEST_PAIRS),
        ("neighbours", 4, 4, LOWEST_PAIRS),
    ],
)
def test_the_estimated_peak_is_that_of_a_run(tmp_path, tokenizer, texts, trained, lora_r, rows, edits):
    args = tiny_config(
        tmp_path, trained_layers=trained, max_length=128, max_steps=2, target_num_layers=6, measure_speed=False,
        per_device_train_batch_size=rows, gradient_accumulation_steps=4 // rows, num_eval_samples=1,
        num_calibration_samples=1, **edits,
    )  # fmt: skip
    with LiveBytes() as live:
        model = tiny_model(8, **SIZES)
        peft = None if lora_r is None else LoraConfig(r=lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        watch = PeakOfHealing(live)
        IterativeLayerDistillTrainer(
            model, args, texts, processing_class=tokenizer, peft_config=peft, callbacks=[watch]
        ).train()
    shape = RunShape(model.config, args, on_gpu=False)
    setting = healing_setting(shape, args, lora_r, "float32", StepMeter(model.config, args))
    assert len(watch.peaks) == shape.rounds == 2 and setting.accumulation == 4 // rows
    assert setting.peak == pytest.approx(max(watch.peaks), rel=0.15), (trained, watch.peaks, setting)
    assert setting.peak == setting.weights + setting.optimizer + setting.activations


def test_a_pruned_qwen2_without_pairs_needs_what_the_plain_model_does(tmp_path):
    args, model = tiny_config(tmp_path, trained_layers="neighbours", target_num_layers=6), tiny_model(8, **SIZES)
    plain, paired = (
        healing_setting(RunShape(config, args, on_gpu=False), args, None, "float32", StepMeter(config, args))
        for config in (model.config, to_pruned_qwen2(model).config)
    )
    assert paired.weights == plain.weights and paired.peak == pytest.approx(plain.peak, rel=0.05)


def test_models_are_made_once_to_count_their_parameters(tmp_path, monkeypatch):
    made, count = [], ModelSizes.of
    monkeypatch.setattr(ModelSizes, "of", lambda model: made.append(model) or count(model))
    args = tiny_config(tmp_path, target_num_layers=6, trained_layers="neighbours")
    shape = RunShape(tiny_model(8).config, args, tiny_model(9).config, on_gpu=False)
    settings = healing_settings(shape, "float32", None)
    assert len(settings) > 8 and disk_bytes(shape, settings[0])["rounds"] > 0
    assert len(made) == 2, "the model the run starts from, and the teacher"
