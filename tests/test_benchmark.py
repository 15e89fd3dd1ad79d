import copy
import statistics

import pytest
import torch
from conftest import tiny_model
from transformers import CompileConfig

import hf_layerprune.benchmark as module
from hf_layerprune import LayerPruneError, benchmark_model, prune
from hf_layerprune.benchmark import benchmark_models, kv_bytes_per_token, random_models

QUICK = {"prompt_tokens": 8, "new_tokens": 4, "repeats": 1}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs dynamo hands over to be compiled, in place of compiling them."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        module, "CompileConfig", lambda **options: CompileConfig(backend=backend, mode=None, **options)
    )
    return graphs


def set_times(monkeypatch, times):
    """Let runs take what `times` says of each model: a list of seconds for prompt and rest, the warm-up first."""
    left = {id(model): list(runs) for model, runs in times}
    monkeypatch.setattr(module, "_time_generate", lambda model, *_: left[id(model)].pop(0))


def record_generate(monkeypatch, model, seen):
    generate = model.generate

    def recording(ids, **options):
        output = generate(ids, **options)
        seen.append((ids, output, model.generation_config))
        return output

    monkeypatch.setattr(model, "generate", recording)


def test_measures_speed_and_memory(model):
    report = benchmark_model(model, **QUICK)
    assert report.prefill_tokens_per_second > 0 and report.decode_tokens_per_second > 0
    assert report.time_to_first_token > 0 and report.batch_size == 1
    assert report.prefill_ratio == report.decode_ratio == 1
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert report.peak_memory_bytes > weights + 12 * report.kv_bytes_per_token
    assert model.generation_config.max_new_tokens is None


def test_frozen_parameters_are_timed_as_loaded_and_stay_frozen(model):
    frozen = prune(model, [1]).requires_grad_(False)
    seen = []
    frozen.register_forward_pre_hook(lambda *_: seen.append(all(p.requires_grad for p in frozen.parameters())))
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    benchmark_models([model, frozen], **QUICK)
    assert seen and all(seen)
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_kv_cache_is_two_vectors_per_head_and_layer(dtype, size):
    model = tiny_model().to(dtype)
    assert kv_bytes_per_token(model) == 5 * 2 * 2 * 8 * size  # layers, keys and values, KV heads, head size
    assert kv_bytes_per_token(prune(model, [0])) == 4 * 2 * 2 * 8 * size


def test_models_are_timed_interleaved(monkeypatch, model):
    order = []
    monkeypatch.setattr(module, "_time_generate", lambda m, *_: order.append(id(m)) or (1.0, 2.0))
    other = tiny_model(seed=1)
    first, second = benchmark_models([model, other], prompt_tokens=10, new_tokens=5, batch_size=2, repeats=2)
    assert order == [id(model), id(other)] * 3
    assert first.prefill_tokens_per_second == 20 and second.decode_tokens_per_second == 4


def test_ratios_are_medians_over_pairs_of_runs(monkeypatch, model):
    other = tiny_model(seed=1)
    warm_up = (100.0, 100.0)
    base = [(1.0, 8.0), (4.0, 2.0), (2.0, 4.0)]
    runs = [(1.0, 2.0), (1.0, 2.0), (4.0, 8.0)]
    set_times(monkeypatch, [(model, [warm_up, *base]), (other, [warm_up, *runs])])
    first, second = benchmark_models([model, other], prompt_tokens=6, new_tokens=5, batch_size=2)
    assert (first.prefill_ratio, first.decode_ratio) == (1, 1)
    assert second.prefill_ratio == statistics.median([1 / 1, 4 / 1, 2 / 4])
    assert second.decode_ratio == statistics.median([8 / 2, 2 / 2, 4 / 8])
    assert second.prefill_ratio != second.prefill_tokens_per_second / first.prefill_tokens_per_second
    assert (first.time_to_first_token, second.time_to_first_token) == (2, 1)
    assert first.prefill_tokens_per_second == 6 and first.decode_tokens_per_second == 2
    assert first.batch_size == second.batch_size == 2


def test_the_static_cache_is_used_again_and_changes_no_token(monkeypatch):
    models = [tiny_model(), *random_models(tiny_model().config, [(4, 3)], torch.float32)]
    for model in models:
        seen = []
        reference = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            record_generate(patch, model, seen)
            benchmark_model(model, 8, 6, batch_size=2, repeats=3, cache_implementation="static")
        assert len(seen) == 4
        for prompt, output, config in seen:
            assert config.disable_compile
            expected = reference.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert torch.equal(output, expected)


def test_every_model_and_batch_size_is_compiled_once_and_for_its_own_sizes(monkeypatch, graphs):
    models = [tiny_model(2), tiny_model(2, intermediate_size=40), tiny_model(1)]
    models += random_models(tiny_model().config, [(3, 2)], torch.float32)
    before = [set(model.__dict__) for model in models]
    seen = []
    record_generate(monkeypatch, models[-1], seen)
    with torch._dynamo.config.patch(recompile_limit=2):  # beyond it dynamo would go on uncompiled
        benchmark_models(models, 8, 5, repeats=2, cache_implementation="static", compile=True)
    assert len(graphs) == len(models)
    benchmark_models(models[:1], 8, 5, 2, repeats=1, cache_implementation="static", compile=True)
    assert len(graphs) == len(models) + 1
    values = [node.meta.get("example_value") for graph in graphs for node in graph.graph.nodes]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    assert shapes and all(type(size) is int for shape in shapes for size in shape)  # no size is left open
    monkeypatch.undo()
    assert [set(model.__dict__) for model in models] == before
    for prompt, output, _ in seen:
        expected = models[-1].generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(output, expected)


def test_nothing_is_compiled_unasked(graphs, model):
    benchmark_model(model, **QUICK, cache_implementation="static")
    benchmark_model(model, **QUICK, cache_implementation="dynamic")
    assert not graphs


@pytest.mark.slow
def test_compiling_for_this_machine():
    report = benchmark_model(tiny_model(1), **QUICK, cache_implementation="static", compile=True)
    assert report.decode_tokens_per_second > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"new_tokens": 1}, "new_tokens=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"repeats": 1.5}, "repeats=1.5"),
        ({"cache_implementation": "paged"}, '\'paged\' is unknown; choose "dynamic" or "static"'),
        ({"compile": True}, 'cache_implementation="static"'),
        ({"compile": True, "cache_implementation": "dynamic"}, 'cache_implementation="static"'),
    ],
)
def test_bad_settings_are_refused(model, settings, message):
    with pytest.raises(LayerPruneError, match=message):
        benchmark_model(model, **settings)
