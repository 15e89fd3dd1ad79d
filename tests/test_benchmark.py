import pytest
import torch
from conftest import tiny_model

from hf_layerprune import LayerPruneError, benchmark_model, prune
from hf_layerprune.benchmark import benchmark_models, kv_bytes_per_token


def test_measures_speed_and_memory(model):
    report = benchmark_model(model, prompt_tokens=8, new_tokens=4, repeats=1)
    assert report.prefill_tokens_per_second > 0 and report.decode_tokens_per_second > 0
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert report.peak_memory_bytes > weights + 12 * report.kv_bytes_per_token
    assert model.generation_config.max_new_tokens is None


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_kv_cache_is_two_vectors_per_head_and_layer(dtype, size):
    model = tiny_model().to(dtype)
    assert kv_bytes_per_token(model) == 5 * 2 * 2 * 8 * size  # layers, keys and values, KV heads, head size
    assert kv_bytes_per_token(prune(model, [0])) == 4 * 2 * 2 * 8 * size


def test_models_are_timed_interleaved(monkeypatch, model):
    import hf_layerprune.benchmark as module

    order = []
    monkeypatch.setattr(module, "_time_generate", lambda m, *_: order.append(id(m)) or (1.0, 2.0))
    other = tiny_model(seed=1)
    first, second = benchmark_models([model, other], prompt_tokens=10, new_tokens=5, batch_size=2, repeats=2)
    assert order == [id(model), id(other)] * 3
    assert first.prefill_tokens_per_second == 20 and second.decode_tokens_per_second == 4


def test_bad_numbers_are_refused(model):
    with pytest.raises(LayerPruneError, match="new_tokens=1"):
        benchmark_model(model, new_tokens=1)
