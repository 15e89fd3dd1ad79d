import pytest

from hf_layerprune import LayerPlan, LayerPruneError
from hf_layerprune.trainer.targets import HiddenStateMap, neighbour_blocks, removable_layers, trained_blocks

TEACHER = LayerPlan.identity(8)


def test_neighbours_are_the_blocks_beside_the_gap():
    plan = TEACHER.remove(3)
    assert neighbour_blocks(plan, [3]) == [2, 3]
    plan = plan.remove(4)
    assert neighbour_blocks(plan, [4]) == [2, 3]  # layers 2 and 5: the nearest that are left
    assert neighbour_blocks(TEACHER.remove(0), [0]) == [0]
    assert neighbour_blocks(TEACHER.remove(7), [7]) == [6]
    assert neighbour_blocks(TEACHER.remove(1).remove(5), [1, 5]) == [0, 1, 3, 4]


def test_trained_blocks():
    plan = TEACHER.remove(3)
    assert trained_blocks(plan, [3], "neighbours") == [2, 3]
    assert trained_blocks(plan, [3], "all") == list(range(7))
    assert trained_blocks(plan, [3], (2, 3, 6)) == [2, 5]
    with pytest.raises(LayerPruneError, match="have been removed"):
        trained_blocks(plan, [3], (3,))


def test_hidden_states_are_compared_where_the_next_layer_reads_them():
    plan = TEACHER.remove(3).remove(4)
    states = HiddenStateMap.of(plan, TEACHER, list(range(plan.depth)))
    # student block 2 (layer 2) feeds layer 5, which in the teacher reads the output of layer 4
    assert dict(zip(states.student, states.teacher, strict=True)) == {0: 0, 1: 1, 2: 4, 3: 5, 4: 6}


def test_hidden_states_map_onto_a_teacher_that_is_pruned_itself():
    teacher = TEACHER.remove(1)
    plan = teacher.remove(4)
    states = HiddenStateMap.of(plan, teacher, neighbour_blocks(plan, [4]))
    assert dict(zip(states.student, states.teacher, strict=True)) == {2: 3, 3: 4}


def test_removable_layers():
    plan = LayerPlan(((0,), (2,), (3, 4), (5,), (6,)), 8)
    assert removable_layers(plan, 0, 0) == [0, 2, 5, 6]
    assert removable_layers(plan, 1, 2) == [2, 5]
