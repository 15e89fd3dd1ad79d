"""The teacher's final states on disk: the same numbers, written once, never trusted when damaged."""

import json

import pytest
import torch
from conftest import random_batches, tiny_config, tiny_model
from datasets import Dataset
from safetensors.torch import load_file

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError, prune
from hf_layerprune.data import valid_next_tokens
from hf_layerprune.surgery import plan_of
from hf_layerprune.trainer import teacher_cache
from hf_layerprune.trainer.targets import HiddenStateMap
from hf_layerprune.trainer.teacher_cache import TeacherCache, row_keys, teacher_key
from hf_layerprune.trainer.towers import run_towers, shared_depth
from hf_layerprune.trainer.trainable import make_trainable

PLENTY = 2**30


def states_of(batch, width=4, seed=0):
    return torch.randn(*batch["input_ids"].shape, width, generator=torch.Generator().manual_seed(seed))


def test_what_was_added_comes_back_in_any_order_and_padding(tmp_path):
    cache = TeacherCache(tmp_path, "key", PLENTY)
    (batch,) = random_batches(1, rows=3)
    batch["attention_mask"][1, :3] = 1  # padded on the right only, as healing does
    states = states_of(batch)
    assert cache.get(batch) is None
    cache.add(batch, states)
    for _ in range(2):  # from memory, then from disk
        wider = {key: torch.nn.functional.pad(value, (0, 5)).flip(0) for key, value in batch.items()}
        found, missing = cache.get(wider)
        assert missing is None
        mask = batch["attention_mask"].bool()
        assert torch.equal(found.flip(0)[:, :12][mask], states[mask]) and not found[:, 12:].any()
        cache.flush()
        assert not cache.pending
        cache = TeacherCache(tmp_path, "key", PLENTY)
    assert cache.get(random_batches(1, seed=7)[0]) is None


def test_rows_are_written_once_and_within_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1)
    batches = random_batches(4, padded=False)
    cache = TeacherCache(tmp_path, "key", 5 * 12 * 4 * 4)  # five rows of 12 tokens x 4 x 4 bytes
    for batch in batches * 2:
        cache.add(batch, states_of(batch))
    shards = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert sum(len(shard) for shard in shards) == 5
    assert cache.get(batches[0])[1] is None and cache.get(batches[2]) is None
    known, (missing,) = cache.get(batches[1])  # two of its three rows are kept
    assert missing.tolist() == [2] and known[:2].any(-1).all() and not known[2].any()
    again = TeacherCache(tmp_path, "key", 6 * 12 * 4 * 4)
    again.add(batches[2], states_of(batches[2]))
    again.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == len(shards) + 1


def test_positions_are_part_of_a_row():
    (batch,) = random_batches(1, padded=False)
    packed = batch | {"position_ids": torch.arange(12).expand(3, 12) % 6}
    assert set(row_keys(batch)).isdisjoint(row_keys(packed))


def test_processes_read_each_others_shards_and_write_their_own(tmp_path):
    caches = [TeacherCache(tmp_path, "key", PLENTY, rank, 2) for rank in range(2)]
    batches = random_batches(2, padded=False)
    for cache, batch in zip(caches, batches, strict=True):
        cache.add(batch, states_of(batch))
        cache.flush()
    assert caches[0].get(batches[1]) is None
    caches[0].read()
    assert torch.equal(caches[0].get(batches[1])[0], states_of(batches[1]))
    assert sorted(path.name for path in tmp_path.glob("index-*")) == ["index-00000.json", "index-00001.json"]


def test_what_is_damaged_or_of_another_teacher_is_refused(tmp_path):
    cache = TeacherCache(tmp_path, "key", PLENTY)
    (batch,) = random_batches(1)
    cache.add(batch, states_of(batch))
    cache.flush()
    with pytest.raises(LayerPruneError, match="of another teacher or precision; delete it"):
        TeacherCache(tmp_path, "other", PLENTY)
    (shard,) = tmp_path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(LayerPruneError, match="is damaged: its checksum"):
        TeacherCache(tmp_path, "key", PLENTY)
    shard.unlink()
    with pytest.raises(LayerPruneError, match="cannot be read"):
        TeacherCache(tmp_path, "key", PLENTY)
    (tmp_path / "index-00000.json").write_text("{")
    with pytest.raises(LayerPruneError, match="is damaged"):
        TeacherCache(tmp_path, "key", PLENTY)


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("removed, blocks", [((3,), (2, 3)), ((1, 4), (2, 3)), ((5,), (4,)), ((0,), (0,))])
def test_a_cached_teacher_runs_only_as_far_as_it_must(tmp_path, removed, blocks, updates):
    teacher = tiny_model(6)
    student = make_trainable(prune(teacher, removed, share_weights=True), list(blocks), everything=False)
    states = HiddenStateMap.of(plan_of(student), plan_of(teacher), list(blocks))
    (batch,) = random_batches(1)
    cache, ran, results = TeacherCache(tmp_path, "key", PLENTY), [], []
    for position, layer in enumerate(teacher.model.layers):
        layer.register_forward_hook(lambda *_, p=position: ran.append(p))
    for shared in (shared_depth(student, teacher), None):
        for _ in range(2):
            ran.clear()
            student.zero_grad()
            valid = valid_next_tokens(batch)[0]
            towers = run_towers(student, teacher, batch, valid, states, shared, updates, cache)
            loss = sum((a - b).pow(2).sum() for a, b in zip(towers.student, towers.teacher, strict=True))
            loss = loss + (towers.student_final - towers.teacher_final).pow(2).sum()
            loss.backward()
            gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
            results.append((loss.detach(), towers.teacher_final, gradients))
        deepest = max([-1 if shared is None else shared - 1, *states.teacher], default=-1)
        assert ran == list(range(deepest + 1))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("removed, blocks", [((3,), (2, 3)), ((0,), (0,))])
def test_only_what_is_not_known_runs_to_the_end(tmp_path, removed, blocks, packed):
    teacher = tiny_model(6)
    student = make_trainable(prune(teacher, removed, share_weights=True), list(blocks), everything=False)
    states = HiddenStateMap.of(plan_of(student), plan_of(teacher), list(blocks))
    (batch,) = random_batches(1)
    known, rest = {key: value[1:2] for key, value in batch.items()}, 2
    if packed:  # documents of 3, 5 and 4 tokens; the second is known
        positions = torch.cat([torch.arange(length) for length in (3, 5, 4)])[None]
        batch = {"input_ids": batch["input_ids"][:1], "position_ids": positions}
        known, rest = {key: value[:, 3:8] for key, value in batch.items()}, 7
    cache, ran = TeacherCache(tmp_path, "key", PLENTY), []
    with torch.no_grad():
        cache.add(known, teacher.model(**known).last_hidden_state)
    for position, layer in enumerate(teacher.model.layers):
        layer.register_forward_hook(lambda _, __, out, p=position: ran.append((p, out.shape[packed])))
    how = (batch, valid_next_tokens(batch)[0], states, shared_depth(student, teacher), False)
    expected = run_towers(student, teacher, *how)
    ran.clear()
    found = run_towers(student, teacher, *how, cache)
    deepest = max([shared_depth(student, teacher) - 1, *states.teacher])
    whole = batch["input_ids"].shape[packed]
    assert ran == [(position, whole if position <= deepest else rest) for position in range(6)]
    torch.testing.assert_close(found.teacher_final, expected.teacher_final, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.student_final, expected.student_final, rtol=1e-5, atol=1e-5)
    assert cache.get(batch)[1] is None


def test_the_key_tells_teachers_and_their_arithmetic_apart():
    one, key = tiny_model(), teacher_key(tiny_model(), "no")
    one.config._name_or_path = "elsewhere"
    assert teacher_key(one, "no") == key != teacher_key(one, "bf16")
    others = [tiny_model(seed=1), tiny_model(rms_norm_eps=1e-3), tiny_model().bfloat16(), tiny_model()]
    others[-1].set_attn_implementation("eager")
    with torch.no_grad():
        others.append(tiny_model())
        others[-1].model.layers[2].mlp.up_proj.weight[24:] += 0.1  # the first weights are the same
    keys = [teacher_key(other, "no") for other in others]
    assert len({key, *keys}) == 6


def test_a_run_with_a_cache_ends_as_one_without(tmp_path, tokenizer):
    rows = [{"text": f"{n} It was the best of times, it was the worst of times. " * 2} for n in range(4)]

    def build(folder, **changes):
        settings = {"target_num_layers": 3, "trained_layers": "neighbours", "measure_speed": False, "max_steps": 4}
        trainer = IterativeLayerDistillTrainer(
            model=tiny_model(5), args=tiny_config(tmp_path / folder, **settings | changes),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        return trainer

    plain, cached = build("plain"), build("cached", teacher_cache_size=0.1)
    for a, b in zip(plain.model.parameters(), cached.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    index = json.loads((tmp_path / "cached" / "teacher_cache" / "index-00000.json").read_text())
    stored = [row for shard in index["shards"].values() for row in shard["rows"]]
    assert 8 < len(stored) == len(set(stored)) < 16  # of 16 rows that two rounds read, some twice


def test_documents_come_back_in_another_packing(tmp_path):
    cache = TeacherCache(tmp_path, "key", PLENTY)
    ids = torch.arange(12)
    states = states_of({"input_ids": ids[None]})
    lengths = torch.tensor([5, 3, 4])
    positions = torch.cat([torch.arange(n) for n in lengths])
    cache.add({"input_ids": ids[None], "position_ids": positions[None]}, states)
    order = torch.cat([ids.split(lengths.tolist())[n] for n in (2, 0, 1)])
    again = {"input_ids": order[None], "position_ids": positions[order][None]}
    known, missing = cache.get(again)
    assert torch.equal(known, states[:, order]) and missing is None
    assert cache.get({"input_ids": ids[None]}) is None  # the same tokens as one document
