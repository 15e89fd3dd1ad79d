"""`Edit` and `EditSpace`, against lists of all edits and of all plans they lead to."""

from functools import cache
from itertools import combinations, product

import pytest

from hf_layerprune import LayerPlan, LayerPruneError
from hf_layerprune.budget import EditSpace
from hf_layerprune.plan import DEFAULT_KINDS, Edit

BOTH = DEFAULT_KINDS
KINDS = (("remove",), ("parallelize",), BOTH)
PROTECTED = ((0, 0), (1, 0), (0, 2), (1, 1))


def every_plan(depth):
    """All plans a teacher of `depth` layers has: every choice of layers, cut into blocks in every way."""
    for count in range(1, depth + 1):
        for layers in combinations(range(depth), count):
            for cuts in product([False, True], repeat=count - 1):
                blocks = [[layers[0]]]
                for layer, cut in zip(layers[1:], cuts, strict=True):
                    if cut:
                        blocks.append([])
                    blocks[-1].append(layer)
                yield LayerPlan(blocks, depth)


def labels(edits):
    return [edit.label for edit in edits]


def test_removing_leaves_out_one_layer():
    plan = LayerPlan(((0,), (2,), (3, 4)), 6)
    assert Edit.remove(2).apply(plan).blocks == ((0,), (3, 4))
    assert Edit.remove(3).apply(plan).blocks == ((0,), (2,), (4,))
    assert Edit.remove(2).apply(plan).num_teacher_layers == 6
    assert plan == LayerPlan(((0,), (2,), (3, 4)), 6)


def test_parallelizing_merges_the_blocks_of_the_named_layers():
    plan = LayerPlan(((0,), (2,), (3, 4), (5,)), 6)
    assert Edit.parallelize(0, 2).apply(plan).blocks == ((0, 2), (3, 4), (5,))
    assert Edit.parallelize(2, 3, 4).apply(plan).blocks == ((0,), (2, 3, 4), (5,))
    assert Edit.parallelize(2, 3, 4, 5).apply(plan).blocks == ((0,), (2, 3, 4, 5))


@pytest.mark.parametrize(
    "edit, message",
    [
        (Edit.remove(1), "not in the plan"),
        (Edit.remove(7), "not in the plan"),
        (Edit.parallelize(0, 1), "not in the plan"),
        (Edit.parallelize(0, 3), "name all layers of neighbouring blocks"),
        (Edit.parallelize(2, 0), "in ascending order"),
        (Edit.parallelize(2), "cannot run in parallel"),
    ],
)
def test_edits_that_do_not_fit_the_plan_are_refused(edit, message):
    with pytest.raises(LayerPruneError, match=message):
        edit.apply(LayerPlan(((0,), (2,), (3,)), 4))


def test_the_last_layer_stays():
    with pytest.raises(LayerPruneError, match="last one left"):
        Edit.remove(2).apply(LayerPlan(((2,),), 4))


@pytest.mark.parametrize(
    "edit, label, words",
    [
        (Edit.remove(7), "7", "remove 7"),
        (Edit.remove(12), "12", "remove 12"),
        (Edit.parallelize(4, 5), "4|5", "parallelize 4|5"),
        (Edit.parallelize(4, 5, 11), "4|5|11", "parallelize 4|5|11"),
    ],
)
def test_labels_are_short_and_can_be_read_back(edit, label, words):
    assert (edit.label, str(edit)) == (label, words)
    assert Edit.from_label(label) == edit
    assert len({edit, Edit.from_label(label)}) == 1


def test_every_edit_of_a_plan_has_a_label_of_its_own():
    edits = EditSpace(max_group_size=4).edits(LayerPlan(((0,), (1, 2), (3,), (5, 6)), 8))
    assert len(set(labels(edits))) == len(edits) == 6 + 3


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("remove", ["0", "1", "2", "3"]),
        (["parallelize"], ["0|1", "1|2", "2|3"]),
        (BOTH, ["0", "1", "2", "3", "0|1", "1|2", "2|3"]),
        ("remove, parallelize", ["0", "1", "2", "3", "0|1", "1|2", "2|3"]),
        (("parallelize", "remove"), ["0", "1", "2", "3", "0|1", "1|2", "2|3"]),
    ],
)
def test_only_the_wanted_kinds_of_edits_are_made(kinds, expected):
    assert labels(EditSpace(kinds).edits(LayerPlan.identity(4))) == expected


def test_a_layer_inside_a_parallel_block_may_go():
    edits = EditSpace("remove").edits(LayerPlan(((0,), (1, 2), (4, 5, 6)), 7))
    assert labels(edits) == ["0", "1", "2", "4", "5", "6"]


def test_a_single_layer_has_no_edit():
    assert EditSpace().edits(LayerPlan(((3,),), 5)) == []
    assert labels(EditSpace().edits(LayerPlan(((2, 3),), 5))) == ["2", "3"]


@pytest.mark.parametrize(
    "size, expected",
    [(2, ["4|5"]), (3, ["0|1|2", "1|2|4", "4|5"]), (4, ["0|1|2", "1|2|4", "4|5", "5|6|7|8"])],
)
def test_groups_grow_by_whole_neighbouring_blocks_up_to_the_largest_size(size, expected):
    plan = LayerPlan(((0,), (1, 2), (4,), (5,), (6, 7, 8)), 9)
    assert labels(EditSpace("parallelize", size).edits(plan)) == expected
    for edit in EditSpace("parallelize", size).edits(plan):
        assert edit.layers in edit.apply(plan).blocks


def test_a_block_that_is_larger_already_is_left_alone():
    plan = LayerPlan(((0,), (1, 2, 3), (4,), (5,)), 6)
    assert labels(EditSpace("parallelize", 2).edits(plan)) == ["4|5"]


def test_protection_counts_teacher_layers_from_both_ends():
    space = EditSpace(protect_first=2, protect_last=1)
    assert labels(space.edits(LayerPlan.identity(6))) == ["2", "3", "4", "2|3", "3|4"]
    pruned = LayerPlan(((0,), (2,), (3,), (4,)), 6)  # 1 and 5 are gone: no other layer takes their protection over
    assert labels(space.edits(pruned)) == ["2", "3", "4", "2|3", "3|4"]
    assert labels(EditSpace(protect_first=1, protect_last=2).edits(LayerPlan(((1,), (2,), (3,)), 6))) == [
        *("1", "2", "3"),
        *("1|2", "2|3"),
    ]


def test_a_block_with_a_protected_layer_grows_no_further_but_may_lose_its_others():
    plan = LayerPlan(((0, 1), (2,), (3,), (4, 5)), 6)
    space = EditSpace(max_group_size=4, protect_first=1, protect_last=1)
    assert labels(space.edits(plan)) == ["1", "2", "3", "4", "2|3"]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_the_edits_of_any_plan_are_all_that_the_rules_allow(kinds):
    for (first, last), size in product(PROTECTED, (2, 3, 4)):
        space = EditSpace(kinds, size, first, last)
        for plan in every_plan(5):
            free = set(range(first, 5 - last))
            removable = [(n,) for n in plan.layers if n in free and len(plan.layers) > 1]
            merged = [a + b for a, b in zip(plan.blocks, plan.blocks[1:], strict=False)]
            mergeable = [layers for layers in merged if set(layers) <= free and len(layers) <= size]
            expected = {Edit("remove", layers) for layers in removable if "remove" in kinds}
            expected |= {Edit("parallelize", layers) for layers in mergeable if "parallelize" in kinds}
            edits = space.edits(plan)
            assert len(edits) == len(expected) and set(edits) == expected, (plan, space)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_no_sequence_of_edits_gets_shallower_than_the_smallest_plan(kinds, size):
    for first, last in PROTECTED:
        space = EditSpace(kinds, size, first, last)

        @cache
        def reachable(plan, space=space):
            return frozenset({plan}).union(*(reachable(edit.apply(plan)) for edit in space.edits(plan)))

        for plan in every_plan(5):
            smallest = space.smallest(plan)
            assert smallest in reachable(plan), (plan, space)
            assert smallest.depth == min(other.depth for other in reachable(plan)), (plan, space)


@pytest.mark.parametrize(
    "space, blocks",
    [
        (EditSpace("remove"), ((7,),)),
        (EditSpace("remove", protect_first=1, protect_last=2), ((0,), (6,), (7,))),
        (EditSpace("parallelize"), ((0, 1), (2, 3), (4, 5), (6, 7))),
        (EditSpace("parallelize", 3, 1, 1), ((0,), (1, 2, 3), (4, 5, 6), (7,))),
        (EditSpace("parallelize", 2, 2, 0), ((0,), (1,), (2, 3), (4, 5), (6, 7))),
        (EditSpace(BOTH, 3, 1, 1), ((0,), (7,))),
    ],
)
def test_the_smallest_plan_of_eight_layers(space, blocks):
    assert space.smallest(LayerPlan.identity(8)) == LayerPlan(blocks, 8)


@pytest.mark.parametrize("widths", [{1: 1, 2: 1.5, 3: 4}, {1: 1, 2: 2, 3: 2}, {1: 1, 2: 0.5, 3: 1.2}], ids=str)
def test_no_sequence_of_merges_gets_cheaper_than_the_smallest_plan_by_any_cost_of_blocks(widths):
    for first, last in PROTECTED:
        space = EditSpace("parallelize", 3, first, last)

        def cost(plan):
            return sum(widths[len(block)] for block in plan.blocks)

        @cache
        def least(plan, space=space):
            return min([cost(plan), *(least(edit.apply(plan)) for edit in space.edits(plan))])

        for plan in every_plan(5):
            if max(map(len, plan.blocks)) <= 3:
                assert cost(space.smallest(plan, widths.get)) == pytest.approx(least(plan)), (plan, space)


@pytest.mark.parametrize("kinds", [(), "", "prune", ("remove", "widen"), "remove,", (None,)])
def test_unknown_kinds_are_refused(kinds):
    with pytest.raises(LayerPruneError, match="choose one or more of remove, parallelize, merge"):
        EditSpace(kinds)


@pytest.mark.parametrize("size", [1, 0, -1, 2.5, "3"])
def test_groups_that_are_none_are_refused(size):
    with pytest.raises(LayerPruneError, match="max_group_size="):
        EditSpace("parallelize", size)


def test_the_size_of_groups_does_not_matter_where_none_are_made():
    assert labels(EditSpace("remove", 1).edits(LayerPlan.identity(2))) == ["0", "1"]


@pytest.mark.parametrize("kind, layers", [("drop", (1,)), ("remove", (1, 2)), ("remove", ())])
def test_what_is_not_an_edit_is_refused(kind, layers):
    with pytest.raises(
        LayerPruneError, match="is not an edit; remove takes one layer, parallelize and merge take two"
    ):
        Edit(kind, layers)
