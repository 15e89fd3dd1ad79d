import pytest

from hf_layerprune import LayerPlan, LayerPruneError
from hf_layerprune.plan import Edit
from hf_layerprune.trainer.healing import compared_states
from hf_layerprune.trainer.trainable import touched_blocks, trained_blocks

TEACHER = LayerPlan.identity(8)


def removals(*layers):
    return [Edit.remove(layer) for layer in layers]


def test_a_removal_touches_the_blocks_beside_the_gap():
    plan = TEACHER.remove(3)
    assert touched_blocks(plan, removals(3)) == [2, 3]
    plan = plan.remove(4)
    assert touched_blocks(plan, removals(4)) == [2, 3]  # layers 2 and 5: the nearest that are left
    assert touched_blocks(TEACHER.remove(0), removals(0)) == [0]
    assert touched_blocks(TEACHER.remove(7), removals(7)) == [6]
    assert touched_blocks(TEACHER.remove(1).remove(5), removals(1, 5)) == [0, 1, 3, 4]


def test_a_pair_touches_itself():
    plan = TEACHER.parallelize(3, 4)
    assert touched_blocks(plan, [Edit.parallelize(3, 4)]) == [3]
    edits = [Edit.parallelize(3, 4), Edit.remove(4)]
    assert touched_blocks(plan.remove(4), edits) == [3, 4]  # layer 3, alone again, and the layer behind the gap
    assert touched_blocks(TEACHER.remove(3).parallelize(2, 4), [Edit.parallelize(2, 4), Edit.remove(3)]) == [2]


def test_trained_blocks():
    plan = TEACHER.remove(3)
    assert trained_blocks(plan, removals(3), "neighbours") == [2, 3]
    assert trained_blocks(plan, removals(3), "all") == list(range(7))
    assert trained_blocks(plan, removals(3), (2, 3, 6)) == [2, 5]
    with pytest.raises(LayerPruneError, match="have been removed"):
        trained_blocks(plan, removals(3), (3,))


def test_the_output_of_a_pair_is_compared_with_that_of_its_second_layer():
    plan = TEACHER.parallelize(3, 4).remove(6)
    states = compared_states(plan, TEACHER, list(range(plan.depth)))
    assert dict(states) == {0: 0, 1: 1, 2: 2, 3: 4, 4: 6}


def test_a_teacher_that_runs_layers_in_parallel_has_no_state_between_them():
    teacher = TEACHER.parallelize(0, 1).parallelize(4, 5)
    states = compared_states(TEACHER, teacher, list(range(8)))
    assert dict(states) == {1: 0, 2: 1, 3: 2, 5: 3, 6: 4}


def test_hidden_states_are_compared_where_the_next_layer_reads_them():
    plan = TEACHER.remove(3).remove(4)
    states = compared_states(plan, TEACHER, list(range(plan.depth)))
    # student block 2 (layer 2) feeds layer 5, which in the teacher reads the output of layer 4
    assert dict(states) == {0: 0, 1: 1, 2: 4, 3: 5, 4: 6}


def test_hidden_states_map_onto_a_teacher_that_is_pruned_itself():
    teacher = TEACHER.remove(1)
    plan = teacher.remove(4)
    states = compared_states(plan, teacher, touched_blocks(plan, removals(4)))
    assert dict(states) == {2: 3, 3: 4}
