"""The teacher and the text that come with the package."""

import json
import math
from pathlib import Path

import pytest
import torch

from hf_layerprune import embedded_dataset, evaluate_model, score_layers
from hf_layerprune.data import ASSETS, tokenized_batches
from hf_layerprune.loading import load_model, load_tokenizer

LOG = ASSETS / "teacher" / "training_log.jsonl"


@pytest.fixture(scope="module")
def teacher():
    return load_model("embedded", dtype=torch.float32)


@pytest.fixture(scope="module")
def embedded_tokenizer():
    return load_tokenizer("embedded")


def test_shape_and_size(teacher):
    assert teacher.config.model_type == "qwen2" and teacher.config.num_hidden_layers >= 16
    assert load_model("embedded").dtype == torch.bfloat16
    assert sum(path.stat().st_size for path in (ASSETS / "teacher").iterdir()) < 16e6
    assert sum(path.stat().st_size for path in (ASSETS / "text").iterdir()) < 4e6


def test_it_is_as_good_as_its_training_log_says(teacher, embedded_tokenizer):
    final = [json.loads(line) for line in LOG.read_text().splitlines() if "held_out_loss" in line][-1]
    held_out = tokenized_batches(embedded_dataset("held_out"), embedded_tokenizer, max_length=256, num_rows=24)
    report = evaluate_model(teacher, held_out)
    assert report.loss == pytest.approx(final["held_out_loss"], abs=0.15)
    assert report.loss < 0.5 * math.log(teacher.config.vocab_size)


def test_depth_matters(teacher, embedded_tokenizer):
    calibration = tokenized_batches(embedded_dataset("calibration"), embedded_tokenizer, max_length=128, num_rows=4)
    scores = score_layers(teacher, calibration)
    costs = sorted(scores.values.values())
    assert costs[0] > 0.005 and costs[-1] > 20 * costs[0] and costs[-3] > 1.5 * costs[0]


def test_generation_with_the_cache_equals_generation_without(teacher, embedded_tokenizer):
    prompt = embedded_tokenizer("The old man looked at the sea and", return_tensors="pt")
    a, b = (teacher.generate(**prompt, max_new_tokens=24, do_sample=False, use_cache=flag) for flag in (True, False))
    assert torch.equal(a, b)
    words = embedded_tokenizer.decode(a[0]).split()
    assert len(words) > 15


def test_tokenizer_is_exact(embedded_tokenizer):
    for text in ("“Quite so,” said the Cat — café, 1,234!\n\tEnd.", "\u4f60\u597d \U0001f600"):
        assert embedded_tokenizer.decode(embedded_tokenizer(text)["input_ids"]) == text
    assert embedded_tokenizer.eos_token == "<|endoftext|>"


def test_licence_of_the_text_is_named():
    assert "public domain" in (Path(ASSETS) / "README.md").read_text()
