"""The test matrix: everything that works for Qwen2 works for every family; others are refused by name."""

import json

import pytest
import torch
from conftest import byte_tokenizer, errors_of, random_batches, read_report, tiny_config
from families import BLOCKS, FAMILIES, family_model
from forked import run_without_package
from parallel_reference import literal
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

from hf_layerprune import (
    IterativeLayerDistillTrainer,
    LayerPlan,
    LayerPruneError,
    PrunedQwen2ForCausalLM,
    PrunedQwen2Model,
    benchmark_model,
    cli,
    compensate,
    evaluate_model,
    parallelize,
    prune,
    score,
    score_layers,
    unparallelize,
)
from hf_layerprune.architectures import ARCHITECTURES, Architecture, check_supported
from hf_layerprune.benchmark import random_models
from hf_layerprune.plan import Edit
from hf_layerprune.search import find_parallel_range, search_plan
from hf_layerprune.surgery import apply_plan, plan_of
from hf_layerprune.trainer.healing import shared_depth

every_family = pytest.mark.parametrize("family", FAMILIES)
PLAN = LayerPlan(BLOCKS, 7)


def naive_without(model, layer):
    """The model with one layer skipped in place: the slow, literal reference."""
    skipped = family_model(model.config.model_type)
    skipped.load_state_dict(model.state_dict())
    skipped.model.layers[layer].forward = lambda hidden_states, *_, **__: hidden_states
    return skipped


def valid_logits(model, batch, **options):
    return model(**batch, **options).logits[batch["attention_mask"].bool()]


@every_family
def test_a_student_is_the_model_with_layers_skipped_and_stays_plain(family, batches, tmp_path):
    model = family_model(family)
    student = prune(model, [2])
    assert type(student) is type(model)
    assert torch.equal(student(**batches[0]).logits, naive_without(model, 2)(**batches[0], use_cache=False).logits)
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_plan"]["blocks"] == [[0], [1], [3], [4]]
    assert plan_of(prune(AutoModelForCausalLM.from_pretrained(tmp_path), [3])).layers == (0, 1, 4)


def test_students_load_where_only_transformers_is(tmp_path):
    """Plain ones by themselves, those with parallel layers by the code beside their weights."""
    ids = random_batches(1, padded=False)[0]["input_ids"]
    for family in FAMILIES:
        model = family_model(family, num_layers=7)
        for kind, student in (("plain", prune(model, [2])), ("paired", apply_plan(model, PLAN))):
            folder = tmp_path / f"{kind}-{family}"
            student.save_pretrained(folder)
            generated = student.generate(ids, max_new_tokens=8, do_sample=False)
            name = type(student).__name__
            torch.save((name, ids, student(ids).logits.detach(), generated), folder / "expected.pt")
    script = f"""
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
for folder in Path({str(tmp_path)!r}).glob("*-*"):
    name, ids, logits, generated = torch.load(folder / "expected.pt")
    options = {{"trust_remote_code": True}} if folder.name.startswith("paired") else {{}}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert type(model).__name__ == name and not any(info.values()), (folder, info)
    assert torch.equal(model(ids).logits, logits), folder
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated), folder
"""
    run_without_package(script, tmp_path / "home")


@every_family
@pytest.mark.parametrize("criterion", ["kl", "loss"])
def test_scores_are_those_of_the_naive_loop(family, criterion, batches):
    model = family_model(family)
    scores = score_layers(model, batches, criterion)
    for layer in range(5):
        report = evaluate_model(naive_without(model, layer), batches, model)
        expected = report.kl if criterion == "kl" else report.loss
        assert scores.values[layer] == pytest.approx(expected, abs=1e-5)


@every_family
def test_guessed_scores_repairs_and_speed(family, batches):
    model = family_model(family)
    for criterion in ("block_influence", "taylor"):
        assert len(score_layers(model, batches, criterion).values) == 5
    student = prune(model, [2])
    repaired = compensate(student, batches, "least_squares", model)
    assert type(repaired) is type(model)
    assert not torch.equal(repaired(**batches[0]).logits, student(**batches[0]).logits)
    assert score_layers(model, batches, "kl", compensation="least_squares").safest in range(5)
    report = benchmark_model(student, prompt_tokens=4, new_tokens=3, repeats=1)
    heads = model.config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    assert report.kv_bytes_per_token == 4 * 2 * heads * 4


@every_family
def test_parallel_layers_are_the_equations(family):
    model = family_model(family, num_layers=7)
    student = apply_plan(model, PLAN)
    assert type(student) is PrunedQwen2ForCausalLM
    for batch in random_batches():
        expected = valid_logits(literal(model, BLOCKS), batch, use_cache=False)
        assert ((valid_logits(student, batch) - expected).norm() / expected.norm()).item() < 2e-6
    back = unparallelize(student)
    same_family = "llama" if family == "mistral" else family  # without windows one is the other
    assert back.config.model_type == same_family
    torch.testing.assert_close(valid_logits(back, batch), valid_logits(model, batch), atol=1e-5, rtol=1e-5)


@every_family
def test_another_plan_can_come_with_the_config(family, tmp_path):
    model = family_model(family)
    prune(model, [1]).save_pretrained(tmp_path)
    plan, config = LayerPlan(((0,), (2, 3), (4,)), 5), AutoConfig.from_pretrained(tmp_path)
    config.layer_plan = plan.to_dict()
    student = PrunedQwen2ForCausalLM.from_pretrained(tmp_path, config=config)
    assert plan_of(student) == plan
    batch = random_batches(1)[0]
    assert torch.equal(student(**batch).logits, apply_plan(model, plan)(**batch).logits)


@every_family
def test_parallel_layers_generate_train_and_reload(family, tmp_path):
    model = family_model(family, num_layers=7)
    student = apply_plan(model, PLAN)
    batch = random_batches(1, padded=False)[0]
    generated = student.generate(**batch, max_new_tokens=8, do_sample=False)
    for options in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(student.generate(**batch, max_new_tokens=8, do_sample=False, **options), generated)
    student(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad.any() for parameter in student.parameters())
    student.save_pretrained(tmp_path / "paired")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "paired")
    assert torch.equal(again(**batch).logits, student(**batch).logits)
    model.save_pretrained(tmp_path / "plain")
    direct = PrunedQwen2ForCausalLM.from_pretrained(tmp_path / "plain", layer_plan=PLAN)
    assert torch.equal(direct(**batch).logits, student(**batch).logits)
    bare = PrunedQwen2Model.from_pretrained(tmp_path / "plain", layer_plan=PLAN)
    assert torch.equal(bare(**batch).last_hidden_state, student.model(**batch).last_hidden_state)
    whole = PrunedQwen2ForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(whole(**batch).logits, model(**batch).logits)


@every_family
def test_attentions_of_a_pair_are_those_of_both_layers(family):
    model = family_model(family, num_layers=7)
    student = apply_plan(model, PLAN)
    student.set_attn_implementation("eager")
    output = student(**random_batches(1)[0], output_attentions=True, output_hidden_states=True)
    assert [attention.shape[1] for attention in output.attentions] == [4, 12, 4, 8]
    assert len(output.hidden_states) == 5


@every_family
def test_edits_are_scored_as_the_models_they_make(family, batches):
    model = family_model(family)
    edits = [Edit.remove(2), Edit.parallelize(2, 3)]
    scores = score(model, batches, edits, "kl")
    for edit, expected in zip(edits, (prune(model, [2]), parallelize(model, [(2, 3)])), strict=True):
        assert scores.values[edit] == pytest.approx(evaluate_model(expected, batches, model).kl, abs=1e-5)


@pytest.mark.parametrize(
    "family, edits", [("qwen3", "remove"), ("mistral", "remove"), ("qwen3", "parallelize"), ("llama", "parallelize")]
)
def test_a_round_of_training(family, edits, tmp_path, texts):
    teacher = family_model(family)
    trainer = IterativeLayerDistillTrainer(
        model=teacher,
        args=tiny_config(tmp_path, target_num_layers=4, max_steps=2, edits=edits),
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(student) is (PrunedQwen2ForCausalLM if edits == "parallelize" else type(teacher))
    record = read_report(tmp_path)["rounds"][0]
    assert record["num_layers"] == 4 == len(student.model.layers)
    unhealed = apply_plan(teacher, plan_of(student))
    for (name, healed), original in zip(student.named_parameters(), unhealed.parameters(), strict=True):
        assert not torch.equal(healed, original), f"{name} was not trained"
    measured = evaluate_model(student, trainer.eval_batches, teacher)
    assert measured.kl == pytest.approx(record["kl"], abs=1e-5)
    name, card = ARCHITECTURES[family].name, (tmp_path / "README.md").read_text()
    assert f"A {name} language model" in card
    assert ("A `PrunedQwen2ForCausalLM`" if edits == "parallelize" else f"A plain `{name}ForCausalLM`") in card


@every_family
def test_what_lies_below_an_edit_is_shared_with_the_teacher(family):
    teacher = family_model(family, num_layers=7).requires_grad_(False)
    assert shared_depth(prune(teacher, [3], share_weights=True), teacher) == 3
    assert shared_depth(parallelize(teacher, [(3, 4)], share_weights=True), teacher) == 3


@every_family
def test_random_weights_of_its_shape(family):
    config = family_model(family).config
    plain, paired = random_models(config, [(4, None), (4, 3)], torch.float32)
    assert type(plain) is ARCHITECTURES[family].model_class and type(paired) is PrunedQwen2ForCausalLM
    assert len(plain.model.layers) == 4 and len(paired.model.layers) == 3
    assert all(torch.isfinite(model(**random_batches(1)[0]).logits).all() for model in (plain, paired))


def test_gains_of_heads_stay_with_their_layer():
    """A head keeps the gain of its layer in every order of edits, and its own after healing."""
    model = family_model("qwen3", num_layers=7)
    student = apply_plan(model, LayerPlan(((0,), (1, 2), (3,), (4, 5), (6,)), 7))
    norm = student.model.layers[1].self_attn.k_norm
    assert norm.weight.shape == (2, 16) and student.model.layers[0].self_attn.k_norm.weight.shape == (16,)
    wider = parallelize(student, [(1, 2, 3)])
    expected = torch.stack([model.model.layers[i].self_attn.k_norm.weight for i in (1, 2, 3)])
    assert torch.equal(wider.model.layers[1].self_attn.k_norm.weight, expected)
    with torch.no_grad():
        norm.weight.mul_(torch.tensor([[2.0], [3.0]]))
    back = unparallelize(student)
    assert torch.equal(back.model.layers[2].self_attn.k_norm.weight, 3 * model.model.layers[2].self_attn.k_norm.weight)
    rest = prune(student, [1])
    assert torch.equal(rest.model.layers[1].self_attn.k_norm.weight, back.model.layers[2].self_attn.k_norm.weight)


def test_biases_beyond_the_usual_can_be_pruned_but_not_paired(batches):
    for family, field in (("llama", "attention_bias"), ("llama", "mlp_bias"), ("qwen3", "attention_bias")):
        model = family_model(family, **{field: True})
        student = prune(model, [2])
        assert torch.equal(student(**batches[0]).logits, naive_without_biases(model, field)(**batches[0]).logits)
        with pytest.raises(LayerPruneError, match=f"{field}=True"):
            parallelize(model, [(1, 2)])
        for search in (lambda m: search_plan(m, batches, {"depth": 3}), lambda m: find_parallel_range(m, batches)):
            with pytest.raises(LayerPruneError, match=f"cannot run in parallel or be merged: {field}=True"):
                search(model)


def naive_without_biases(model, field):
    skipped = family_model(model.config.model_type, **{field: True})
    skipped.model.layers[2].forward = lambda hidden_states, *_, **__: hidden_states
    return lambda **batch: skipped(**batch, use_cache=False)


def test_one_row_is_all_that_a_new_family_needs(batches, monkeypatch):
    """Starcoder2 has other norms, and an MLP with other names: it can be pruned, scored and healed, but not paired."""
    row = Architecture("Starcoder2", "starcoder2", mlp_output="mlp.c_proj")
    monkeypatch.setitem(ARCHITECTURES, "starcoder2", row)
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, use_bias=False, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    model = Starcoder2ForCausalLM(config).eval()
    scores = score_layers(model, batches, "kl")
    student = prune(model, [scores.safest])
    assert type(student) is Starcoder2ForCausalLM
    assert evaluate_model(student, batches, model).kl == pytest.approx(scores.values[scores.safest], abs=1e-5)
    score_layers(model, batches, "kl", compensation="least_squares")
    assert type(compensate(student, batches, "least_squares", model)) is Starcoder2ForCausalLM
    with pytest.raises(LayerPruneError, match="starcoder2"):
        parallelize(model, [(1, 2)])


@pytest.mark.parametrize("kind", ["mixtral", "t5", "mamba", "gemma3"])
def test_other_kinds_are_refused_by_name(kind):
    with pytest.raises(LayerPruneError, match=f"'{kind}' is not supported; use a dense decoder: Qwen2, Qwen3, Llama"):
        check_supported(CONFIG_MAPPING[kind]())


@pytest.mark.parametrize(
    "family, changes",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("mistral", {"sliding_window": 4096}),
    ],
)
def test_sliding_windows_are_refused(family, changes):
    name = ARCHITECTURES[family].name
    with pytest.raises(LayerPruneError, match=f"this {name} model uses sliding-window attention"):
        prune(family_model(family, **changes), [0])
    check_supported(family_model(family, **changes | {"sliding_window": None}).config)


@pytest.mark.parametrize("verb, kind", [("score", "mixtral"), ("parallelize", "t5"), ("benchmark", "t5")])
def test_the_command_line_refuses_in_one_line(verb, kind, tmp_path, capsys):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    argv = [verb, "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    if verb == "benchmark":
        argv = [verb, str(tmp_path / "model")]
    assert cli.main(argv) == 2
    error = errors_of(capsys)
    assert f"model_type='{kind}'" in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
