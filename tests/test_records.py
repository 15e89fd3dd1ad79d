"""Speed and memory in a report are those of the student as it is saved."""

import torch
from conftest import byte_tokenizer, read_report, tiny_config, tiny_model
from quick import SPEED_OF_USERS

from hf_layerprune import IterativeLayerDistillTrainer
from hf_layerprune.benchmark import kv_bytes_per_token
from hf_layerprune.loading import load_model


def test_a_checkpoint_that_is_healed_in_float32_is_timed_as_it_is_saved(cpu_with_bfloat16, tmp_path, texts):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    args = tiny_config(tmp_path / "run", target_num_layers=4, heal=False, measure_speed=True)
    trainer = IterativeLayerDistillTrainer(model=str(tmp_path / "teacher"), args=args, train_dataset=texts)
    assert trainer.teacher.dtype == torch.float32
    trainer.train()
    report = read_report(tmp_path / "run")
    for record, folder in ((report["teacher"], "teacher"), (report["rounds"][-1], "run/model")):
        saved = load_model(str(tmp_path / folder))
        assert record["kv_bytes_per_token"] == kv_bytes_per_token(saved)
        assert record["dtype"] == "bfloat16" == str(saved.dtype).removeprefix("torch.")
        assert (record["prompt_tokens"], record["new_tokens"], record["batch_size"]) == (8, 4, 1)
    assert SPEED_OF_USERS == (128, 64)  # which the tests make shorter
    assert trainer.teacher.dtype == torch.float32  # what was timed was a copy
