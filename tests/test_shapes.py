import json

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen2ForCausalLM

from hf_layerprune import LayerPruneError, prune
from hf_layerprune.benchmark import SHAPES, load_shape, random_models, shape_plan
from hf_layerprune.models import PrunedQwen2ForCausalLM


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("Qwen2.5")])
def test_shipped_shapes_are_qwen2(name):
    config = load_shape(f"Qwen/{name}")
    assert type(config) is Qwen2Config and config.dtype == torch.bfloat16 and not config.use_sliding_window
    assert config.rope_parameters["rope_theta"] == 1e6 and config.max_position_embeddings == 32768
    assert config.rms_norm_eps == 1e-6 and config.hidden_size % config.num_attention_heads == 0


PUBLISHED = {  # numbers of parameters, with a tied head counted once
    "Qwen/Qwen2.5-0.5B": 494_032_768, "Qwen/Qwen2.5-3B": 3_085_938_688, "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.2-1B": 1_235_814_400, "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248, "meta-llama/Llama-2-7B": 6_738_415_616,
    "mistralai/Mistral-7B": 7_248_023_552, "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}  # fmt: skip


@pytest.mark.parametrize("name, count", PUBLISHED.items())
def test_shipped_shapes_have_the_size_of_the_model(name, count):
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(load_shape(name)).num_parameters() == count


def test_instruct_and_coder_models_have_the_shape_of_their_base():
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-0.5B"):
        assert load_shape(name).to_dict() == load_shape("Qwen/Qwen2.5-0.5B").to_dict()


def test_a_shape_can_be_a_file(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    assert load_shape(str(tmp_path / "config.json")).num_hidden_layers == 5


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "qwen2", "hidden_size": "wide"}', "hidden_size"),
        (json.dumps(GPT2Config().to_dict()), "gpt2"),
    ],
)
def test_a_file_that_is_no_shape_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(LayerPruneError, match=message) as error:
        load_shape(str(path))
    assert str(path) in str(error.value)


def test_an_unknown_shape_is_told_which_there_are():
    with pytest.raises(
        LayerPruneError, match="'Qwen/Qwen9'.*Llama-3.2-3B.*Qwen2.5-72B.*SmolLM2-135M, or a path to a config.json"
    ):
        load_shape("Qwen/Qwen9")


def of_depth(num_layers):
    return Qwen2Config(num_hidden_layers=num_layers)


@pytest.mark.parametrize("layers, blocks", [(36, 29), (36, 36), (36, 18), (28, 22), (7, 4), (3, 2), (2, 1), (1, 1)])
def test_pairs_lie_in_the_later_middle(layers, blocks):
    plan = shape_plan(of_depth(36), layers, blocks)
    assert plan.layers == tuple(range(layers)) and plan.depth == blocks
    widths = [len(block) for block in plan.blocks]
    pairs, single = layers - blocks, 2 * blocks - layers
    assert widths.count(2) == pairs and set(widths) <= {1, 2}
    if pairs:
        first = widths.index(2)
        behind = len(widths) - first - pairs
        assert widths[first : first + pairs] == [2] * pairs and first + behind == single
        assert first >= behind and (single < 2 or behind >= 1)


def test_a_few_pairs_leave_an_eighth_behind_them():
    assert shape_plan(of_depth(36), 36, 29).parallel_pairs[0] == (18, 19)
    assert shape_plan(of_depth(36), 36, 29).parallel_pairs[-1] == (30, 31)


@pytest.mark.parametrize(
    "layers, blocks, message",
    [
        (37, None, "num_layers=37.*has 36 layers"),
        (0, None, "num_layers=0"),
        (36, 17, "num_blocks=17"),
        (8, 9, "num_blocks=9"),
    ],
)
def test_depths_that_cannot_be_are_refused(layers, blocks, message):
    with pytest.raises(LayerPruneError, match=message):
        shape_plan(of_depth(36), layers, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks, cls", [(None, Qwen2ForCausalLM), (3, PrunedQwen2ForCausalLM)])
def test_random_models_compute_finite_logits(blocks, cls, dtype):
    model = random_models(tiny_model().config, [(4, blocks)], dtype)[0]
    assert type(model) is cls and model.config.num_hidden_layers == len(model.model.layers) == (blocks or 4)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.config.dtype}
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
    logits = model(torch.arange(40)[None]).logits
    assert logits.isfinite().all() and logits.float().std() > 1e-4


def test_untied_heads_stay_untied():
    (model,) = random_models(tiny_model(tie_word_embeddings=False).config)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model(torch.arange(40)[None]).logits.isfinite().all()


def test_rotary_buffers_are_those_of_a_model_made_in_the_usual_way():
    usual = tiny_model()
    (model,) = random_models(usual.config, dtype=torch.bfloat16)
    for name, buffer in usual.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer) and model.get_buffer(name).dtype == torch.float32
    assert all(not tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_the_shape_of_a_pruned_model_is_its_own():
    paired = random_models(tiny_model().config, [(4, 3)])[0].config
    assert paired.layer_plan == {"num_teacher_layers": 4, "blocks": [[0], [1, 2], [3]]}
    assert random_models(paired)[0].config.layer_plan == paired.layer_plan
    assert type(random_models(paired, [(4, None)])[0]) is Qwen2ForCausalLM
    assert random_models(prune(tiny_model(), [1, 2]).config)[0].config.num_hidden_layers == 3
