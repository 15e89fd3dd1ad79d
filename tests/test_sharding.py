"""Several processes share the data of a scoring: all get the scores one process would."""

import json

import pytest
from conftest import random_batches, tiny_model
from forked import run_ranks

from hf_layerprune import score_layers
from hf_layerprune.scoring import Race

SCRIPT = """
import json, sys
import torch.distributed as dist
from conftest import random_batches, tiny_model
from hf_layerprune import score_layers
from hf_layerprune.scoring import Race
dist.init_process_group("gloo")
batches = random_batches(5, rows=4)
seen, shares = [], []
scores = score_layers(tiny_model(), batches, on_batch=lambda: seen.append(1))
race = score_layers(tiny_model(), batches, race=Race(0.6))
influence = score_layers(tiny_model(), batches, "block_influence", on_batch=lambda: shares.append(1))
with open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w") as file:
    json.dump([scores.to_dict(), race.to_dict(), len(seen), influence.to_dict(), len(shares)], file)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run_ranks(2, SCRIPT, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_scores_are_those_of_one_process(results):
    expected = score_layers(tiny_model(), random_batches(5, rows=4))
    expected = json.loads(json.dumps(expected.to_dict()))
    influence = score_layers(tiny_model(), random_batches(5, rows=4), "block_influence")
    for scores, _, _, of_angles, _ in results:
        assert scores == expected
        assert of_angles == json.loads(json.dumps(influence.to_dict()))


def test_each_measures_its_share(results):
    assert sorted(result[2] for result in results) == sorted(result[4] for result in results) == [2, 3]


def test_races_end_alike_on_all(results):
    assert results[0][1] == results[1][1]
    best = min(
        results[0][1]["values"], key=lambda layer: (layer in results[0][1]["dropped"], results[0][1]["values"][layer])
    )
    assert int(best) == score_layers(tiny_model(), random_batches(5, rows=4), race=Race(0.6)).safest
