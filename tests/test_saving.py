"""A student that cannot be saved is known before it is made; what only transformers minds is put right."""

import errno
import json
import os

import pytest
import torch
from conftest import load, tiny_model
from transformers import GenerationConfig

from hf_layerprune import LayerPruneError, load_model, prune
from hf_layerprune.files import write_atomically
from hf_layerprune.trainer.run import check_saving, save_student, student_to_begin_with


@pytest.mark.parametrize(
    "ignored",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 20},  # as many older chat models have it
        {"temperature": 0.9, "pad_token_id": -1},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
        {"output_scores": True, "use_cache": False, "cache_implementation": "static"},
    ],
)
def test_generation_settings_that_are_ignored_anyway_keep_no_student_from_being_saved(tmp_path, ignored, tokenizer):
    teacher = tiny_model()
    teacher.generation_config.update(**ignored, max_new_tokens=7, eos_token_id=[5, 6])
    with pytest.raises(LayerPruneError, match="cannot be saved.*generation_config"):
        check_saving(teacher, tokenizer)
    student = prune(student_to_begin_with(teacher), [1])
    check_saving(student, tokenizer)
    save_student(student, tokenizer, torch.bfloat16, tmp_path / "student")
    saved = GenerationConfig.from_pretrained(tmp_path / "student")
    saved.validate(strict=True)
    assert (saved.max_new_tokens, saved.eos_token_id) == (7, [5, 6]) and not saved.do_sample
    assert all(getattr(teacher.generation_config, name) == value for name, value in ignored.items())


def test_settings_of_a_model_that_samples_are_saved(tmp_path, tokenizer):
    teacher = tiny_model()
    teacher.generation_config.update(do_sample=True, temperature=0.6, top_k=20)
    save_student(prune(student_to_begin_with(teacher), [1]), tokenizer, torch.float32, tmp_path / "student")
    saved = GenerationConfig.from_pretrained(tmp_path / "student")
    assert (saved.do_sample, saved.temperature, saved.top_k) == (True, 0.6, 20)


def test_a_run_of_a_model_with_such_settings_saves_its_student(make, model_folder, tmp_path):
    (model_folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    teacher = load_model(str(model_folder))
    make(teacher, target_num_layers=4, save_strategy="steps", save_steps=2).train()
    assert load(tmp_path / "run" / "model").generation_config.temperature is None
    assert teacher.generation_config.temperature == 0.6


def test_what_cannot_be_saved_is_known_before_anything_is_written(make, tmp_path):
    teacher = tiny_model()
    teacher.config.custom = object()
    trainer = make(teacher)
    with pytest.raises(LayerPruneError, match="cannot be saved.* not JSON serializable"):
        trainer.train()
    assert not list(tmp_path.glob("run/*"))


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomically(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"] and path.read_text() == "old"


def test_what_cannot_be_written_is_named_as_the_user_named_it(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "report.json"):
        with pytest.raises(OSError) as error:
            write_atomically(path, "new")
        assert error.value.filename == str(path)
