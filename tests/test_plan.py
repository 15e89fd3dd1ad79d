import json

import pytest

from hf_layerprune import LayerPlan, LayerPruneError


def test_everything_follows_from_the_blocks():
    plan = LayerPlan(((0,), (1,), (2,), (4, 5), (6, 7), (9,)), 11)
    assert plan.depth == 6
    assert plan.layers == (0, 1, 2, 4, 5, 6, 7, 9)
    assert plan.removed_layers == (3, 8, 10)
    assert plan.parallel_pairs == ((4, 5), (6, 7))
    assert [plan.position_of(layer) for layer in plan.layers] == [0, 1, 2, 3, 3, 4, 4, 5]


def test_json_round_trip():
    plan = LayerPlan(((0,), (2, 3), (5,)), 7)
    assert LayerPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json()) == {"num_teacher_layers": 7, "blocks": [[0], [2, 3], [5]]}


def test_lists_become_tuples_and_depth_defaults_to_the_last_layer():
    plan = LayerPlan([[0], [2]])
    assert plan.blocks == ((0,), (2,))
    assert plan.num_teacher_layers == 3
    assert hash(plan) == hash(LayerPlan(((0,), (2,)), 3))


def test_edits_make_new_plans():
    plan = LayerPlan.identity(5)
    edited = plan.remove(1).parallelize(2, 3)
    assert edited.blocks == ((0,), (2, 3), (4,))
    assert plan == LayerPlan.identity(5)
    assert edited.remove(2).blocks == ((0,), (3,), (4,))
    assert edited.parallelize(2, 3, 4).blocks == ((0,), (2, 3, 4))


def test_merged_blocks_are_one_layer_wide():
    plan = LayerPlan.identity(8).remove(3).merge(4, 5).parallelize(6, 7)
    assert plan == LayerPlan(((0,), (1,), (2,), (4, 5), (6, 7)), 8, ((4, 5),))
    assert plan.merged == ((4, 5),) and plan.parallel_pairs == ((6, 7),) and plan.removed_layers == (3,)
    assert [plan.width(block) for block in plan.blocks] == [1, 1, 1, 1, 2]
    assert plan.before_merges(LayerPlan.identity(8)).blocks == ((0,), (1,), (2,), (4,), (5,), (6, 7))
    own = LayerPlan.identity(8).merge(4, 5)
    assert plan.before_merges(own) == plan
    further = plan.merge(2, 4, 5).before_merges(own)
    assert (further.blocks, further.merged) == (((0,), (1,), (2,), (4, 5), (6, 7)), ((4, 5),))
    assert plan.unmerged_layers == (0, 1, 2, 6, 7)
    assert plan.shape == LayerPlan(((0,), (1,), (2,), (4,), (6, 7)), 8)
    assert json.loads(plan.to_json())["merged"] == [[4, 5]]
    assert LayerPlan.from_json(plan.to_json()) == plan
    assert LayerPlan.from_json('{"num_teacher_layers": 3, "blocks": [[0], [1, 2]], "merged": []}').merged == ()
    further = plan.merge(2, 4, 5)
    assert further.blocks == ((0,), (1,), (2, 4, 5), (6, 7)) and further.merged == ((2, 4, 5),)
    for call in (
        lambda: plan.remove(4), lambda: plan.parallelize(4, 5, 6, 7), lambda: plan.merge(4, 5, 6, 7),
        lambda: plan.merge(5, 6), lambda: plan.merge(0, 2), lambda: LayerPlan(((0,), (1, 2)), 3, ((0,),)),
        lambda: LayerPlan(((0,), (1, 2)), 3, ((0, 1),)), lambda: LayerPlan(((0,), (1, 2)), 3, 7),
        lambda: plan.merge(), lambda: plan.parallelize(),
    ):  # fmt: skip
        with pytest.raises(LayerPruneError):
            call()


def test_bad_blocks_are_refused():
    for blocks, depth in [
        ((), 3), (((),), 3), (((0,), (0,)), 3), (((1,), (0,)), 3), (((0,), (3,)), 3), (((-1,),), 3), (((True,),), 3),
        ((("0",),), 3), (((0.0,),), 3), ((0, 1), 3), (((0,),), "3"), (((0,),), True),
    ]:  # fmt: skip
        with pytest.raises(LayerPruneError):
            LayerPlan(blocks, depth)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"blocks": [[0]]}',
        '{"blocks": "01", "num_teacher_layers": 2}',
        '{"blocks": [[0]], "num_teacher_layers": 1, "path": "/etc/passwd"}',
        '{"blocks": [[0]], "num_teacher_layers": 1.5}',
        '{"blocks": [["a"]], "num_teacher_layers": 1}',
        '{"blocks": [[0]], "num_teacher_layers": 1000000000000}',
        '{"blocks": [[0]], "num_teacher_layers": %s}' % ("9" * 5000),
        '{"blocks": [[NaN]], "num_teacher_layers": 1}',
        '{"blocks": [[false]], "num_teacher_layers": 1}',
        '{"blocks": [[[0]]], "num_teacher_layers": 1}',
        '{"blocks": {"0": 1}, "num_teacher_layers": 1}',
        "[" * 100_000,
        " " * 1_000_001,
        json.dumps({"blocks": [[n] for n in range(20_000)], "num_teacher_layers": 20_000}),
    ],
    ids=lambda text: text[:50],
)
def test_bad_json_is_refused(text):
    with pytest.raises(LayerPruneError) as error:
        LayerPlan.from_json(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_bad_edits_are_refused():
    plan = LayerPlan.identity(3)
    for edit in (
        lambda: plan.remove(3),
        lambda: plan.remove(1).remove(1),
        lambda: plan.parallelize(0, 2),
        lambda: plan.parallelize(1, 0),
        lambda: LayerPlan.identity(1).remove(0),
    ):
        with pytest.raises(LayerPruneError):
            edit()
