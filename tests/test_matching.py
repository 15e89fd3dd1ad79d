"""Students made elsewhere: their plan is found by their weights, and they are healed without another removal."""

import json

import pytest
import torch
from conftest import read_report, tiny_config, tiny_model

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError, prune
from hf_layerprune.loading import find_plan
from hf_layerprune.surgery import plan_of


def made_elsewhere(teacher, layers, noise=0.0):
    """A student without a plan in its config, some noise (a share of each tensor's size) in its weights."""
    student = prune(teacher, layers)
    del student.config.layer_plan
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.model.layers.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.norm() / drawn.norm() * drawn)
    return student


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("layers", [[0, 1], [2, 6], [5, 7], [1, 2, 3, 4, 5, 6]])
def test_the_plan_is_found_also_of_a_healed_student(layers, noise):
    teacher = tiny_model(8)
    assert find_plan(made_elsewhere(teacher, layers, noise), teacher) == plan_of(prune(teacher, layers))


def test_what_is_ambiguous_is_refused_in_one_line():
    teacher = tiny_model(6)
    with pytest.raises(LayerPruneError, match="layer 0 of the student is not clearly one of the teacher's"):
        find_plan(made_elsewhere(tiny_model(6, seed=7), [1]), teacher)
    teacher.model.layers[3].load_state_dict(teacher.model.layers[2].state_dict())  # two layers alike
    with pytest.raises(LayerPruneError, match=r"layer 2 of the student .* with --plan plan\.json"):
        find_plan(made_elsewhere(teacher, [3]), teacher)
    with pytest.raises(LayerPruneError, match="not clearly one"):
        find_plan(made_elsewhere(tiny_model(6, hidden_size=64), [3]), teacher)


@pytest.mark.parametrize("named", [False, True])
def test_a_student_is_healed_at_its_own_depth(tmp_path, tokenizer, texts, named):
    teacher = tiny_model(6)
    student = made_elsewhere(teacher, [2, 4])
    (tmp_path / "plan.json").write_text(plan_of(prune(teacher, [2, 4])).to_json())
    settings = {"plan": str(tmp_path / "plan.json")} if named else {}
    settings |= {"target_num_layers": 4, "trained_layers": "neighbours", "learning_rate": 1e-3, "max_steps": 6}
    trainer = IterativeLayerDistillTrainer(
        model=student, args=tiny_config(tmp_path / "run", **settings), train_dataset=texts, eval_dataset=texts,
        processing_class=tokenizer, teacher=teacher,
    )  # fmt: skip
    trainer.train()
    (record,) = read_report(tmp_path / "run")["rounds"]
    assert record["edits"] == record["removed_layers"] == [] and record["num_layers"] == 4
    assert record["plan"] == {"num_teacher_layers": 6, "blocks": [[0], [1], [3], [5]]}
    assert record["kl"] < record["kl_before_healing"] == pytest.approx(record["kl_unhealed"])
    healed = trainer.model.state_dict()
    moved = {int(name.split(".")[2]) for name, old in student.state_dict().items()
             if ".layers." in name and not torch.equal(old, healed[name])}  # fmt: skip
    assert moved == {1, 2, 3}  # the neighbours of both gaps
    assert getattr(student.config, "layer_plan", None) is None  # the user's model is as it was
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == record["plan"]


def test_a_plan_that_does_not_fit_and_a_model_without_gaps_are_refused(tmp_path, tokenizer, texts):
    teacher = tiny_model(6)
    (tmp_path / "plan.json").write_text(plan_of(prune(teacher, [2])).to_json())
    for model, message, changes in (
        (made_elsewhere(teacher, [2, 4]), "plan has 5 blocks, 5 layers; the student has 4", {}),
        (prune(teacher, [3]), "is not that of the student's", {}),
        (tiny_model(6), "has 6 layers; choose 1..5", {"plan": None, "target_num_layers": 6}),
    ):
        with pytest.raises(LayerPruneError, match=message):
            args = tiny_config(tmp_path / "run", **{"plan": str(tmp_path / "plan.json")} | changes)
            IterativeLayerDistillTrainer(
                model=model, args=args, train_dataset=texts, processing_class=tokenizer, teacher=teacher
            )


def test_a_plan_without_a_teacher_is_refused(tmp_path, tokenizer, texts):
    args = tiny_config(tmp_path / "run", plan=str(tmp_path / "plan.json"))
    with pytest.raises(LayerPruneError, match=r"plan=.*plan\.json' says .* give the teacher"):
        IterativeLayerDistillTrainer(
            model=made_elsewhere(tiny_model(6), [2]), args=args, train_dataset=texts, processing_class=tokenizer
        )


def test_matrices_of_zeros_hide_no_plan():
    teacher = tiny_model(6)
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    assert find_plan(made_elsewhere(teacher, [1, 4]), teacher) == plan_of(prune(teacher, [1, 4]))
