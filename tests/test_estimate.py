"""What is estimated of a run is what the run then takes."""

import pytest
from conftest import tiny_config, tiny_model
from families import pruned_qwen2
from peft import LoraConfig
from transformers import TrainerCallback

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError
from hf_layerprune.estimate import RunSizes, parse_size
from hf_layerprune.memory import LiveBytes, StepMeter, StepShape, Way

SIZES = {"hidden_size": 64, "intermediate_size": 640}


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GiB", 24 * 2**30),
        ("80 gb", 80 * 10**9),
        ("1.5gib", 3 * 2**29),
        ("64KiB", 2**16),
        ("24", 24 * 2**30),
        ("80G", 80 * 10**9),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24 bananas", "", "GiB", "-1GiB", "0GiB"])
def test_what_is_not_a_size(text):
    with pytest.raises(LayerPruneError, match="24GiB"):
        parse_size(text)


class PeakOfHealing(TrainerCallback):
    def __init__(self, live):
        self.live, self.peaks = live, []

    def on_train_begin(self, *_, **__):
        self.live.peak = self.live.now

    def on_train_end(self, *_, **__):
        self.peaks.append(self.live.peak)


LOWEST_GAPS = {"criterion": "tail", "protect_last_layers": 6}
LOWEST_PAIRS = {"edits": "parallelize", "protect_last_layers": 4}
CASTS = {"bf16": True, "gradient_checkpointing": True}  # of float32 weights; nothing else keeps them


@pytest.mark.parametrize(
    "trained, lora_r, rows, edits",
    [
        ("neighbours", None, 4, LOWEST_GAPS),
        ("all", None, 2, LOWEST_GAPS),
        ("all", None, 4, LOWEST_PAIRS),
        ("neighbours", 4, 4, LOWEST_PAIRS),
        ("2,5", None, 1, LOWEST_GAPS | CASTS),
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
    run = RunSizes(model.config, args)
    way = Way(args.trained_layers, lora_r, "float32", bool(args.gradient_checkpointing))
    setting = run.setting(way, rows, StepMeter(model.config, args))
    assert len(watch.peaks) == run.rounds == 2 and setting.accumulation == 4 // rows
    assert setting.peak == pytest.approx(max(watch.peaks), rel=0.05), (trained, watch.peaks, setting)
    assert setting.peak == setting.weights + setting.optimizer + setting.activations


def test_a_pruned_qwen2_without_pairs_needs_what_the_plain_model_does(tmp_path):
    args, model = tiny_config(tmp_path, trained_layers="neighbours", target_num_layers=6), tiny_model(8, **SIZES)
    way = Way("neighbours", None, "float32", False)
    plain, paired = (
        RunSizes(config, args).setting(way, 2, StepMeter(config, args))
        for config in (model.config, pruned_qwen2(model).config)
    )
    assert paired.weights == plain.weights and paired.peak == pytest.approx(plain.peak, rel=0.05)


@pytest.mark.parametrize(
    "settings, trained, expected",
    [
        ({"target_num_layers": 6}, "neighbours", [StepShape(2, 5, 1), StepShape(2, 4, 1 + 1 + 2)]),
        ({"target_num_layers": 6}, "all", [StepShape(7, 0, 1)]),
        ({"target_num_layers": 6, "trained_layers": "4,6"}, (4, 6), [StepShape(2, 2, 4)]),
        (
            {"target_num_layers": 6, "edits": "parallelize"},
            "neighbours",
            [StepShape(1, 6, 0, 2), StepShape(1, 6, 2, 2)],
        ),
        ({"target_num_layers": 4, "layers_per_round": 4}, "neighbours", [StepShape(4, 0, 4)]),
        ({"target_num_layers": 8}, "neighbours", [StepShape(4, 4)]),  # heals next to two gaps of before
    ],
)
def test_the_steps_that_need_most(tmp_path, settings, trained, expected):
    run = RunSizes(tiny_model(8).config, tiny_config(tmp_path, **settings), tiny_model(10).config)
    assert run.steps(Way(trained, None, "float32", False)) == expected
