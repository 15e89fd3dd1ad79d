"""What a plan says of a run is what the run then takes."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from peft import LoraConfig
from transformers import TrainerCallback

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError
from hf_layerprune.memory import LiveBytes
from hf_layerprune.planning import (
    RunShape,
    disk_bytes,
    healing_settings,
    parse_size,
    scoring_flops,
    tokens_per_step,
)

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


def setting_of(settings, trained, lora_r, checkpointing, rows):
    wanted = (trained, lora_r, "float32", checkpointing, rows)
    return next(
        s for s in settings if (s.trained, s.lora_r, s.dtype, s.gradient_checkpointing, s.rows) == wanted
    )  # fmt: skip


@pytest.mark.parametrize(
    "trained, lora_r, rows",
    [("neighbours", None, 4), ("all", None, 4), ("all", None, 2), ("neighbours", 4, 4), ("2,5", None, 4)],
)
def test_the_planned_peak_is_that_of_a_run(tmp_path, tokenizer, texts, trained, lora_r, rows):
    changes = {"trained_layers": trained, "max_length": 128, "max_steps": 2, "target_num_layers": 8, "edits": "remove"}
    args = tiny_config(
        tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=4 // rows, measure_speed=False, **changes
    )
    with LiveBytes() as live:
        model = tiny_model(10, **SIZES)
        peft = None if lora_r is None else LoraConfig(r=lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        watch = PeakOfHealing(live)
        trainer = IterativeLayerDistillTrainer(
            model, args, texts, processing_class=tokenizer, peft_config=peft, callbacks=[watch]
        )
        trainer.train()
    shape = RunShape(model.config, args, on_gpu=False)
    setting = setting_of(healing_settings(shape, "float32", lora_r), trained, lora_r, False, rows)
    print(max(watch.peaks), watch.peaks, setting)
    assert len(watch.peaks) == shape.rounds == 2 and setting.accumulation == 4 // rows
    assert setting.peak == pytest.approx(max(watch.peaks), rel=0.15)
    assert setting.peak == setting.weights + setting.optimizer + setting.activations
