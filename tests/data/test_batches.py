"""Batches: nothing lost, nothing doubled, and a function of rows, seed and index alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from data_fixtures import make_tokenizer, random_rows, write_json

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.data.batches import Batches, collate
from droplora_jax.data.config import DataConfig
from droplora_jax.data.device_feed import place
from droplora_jax.data.load import load
from droplora_jax.data.rows import Row, Rows

T = 16
FITS = ("first_fit", "best_fit")
BOTH = pytest.mark.parametrize("packing", [None, *FITS])


def make(rows, *, batch_size=4, seed=0, shuffle=True, max_length=T, packing=None, **rest):
    return Batches(
        rows,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        max_length=max_length,
        packing=packing,
        **rest,
    )


def labels(rows):
    """The targets of all rows, by a loop."""
    return sorted(int(row.ids[i]) for row in rows for i in range(1, len(row)) if row.trained[i])


def lines(batches, epoch):
    """The token lines of one epoch, across its batches."""
    count, size = batches.sequences_per_epoch, batches[0]["tokens"].shape[0]
    start, stop = epoch * count, (epoch + 1) * count
    found = [
        (n * size + g, {name: array[g] for name, array in batches[n].items()})
        for n in range(start // size, math.ceil(stop / size))
        for g in range(size)
    ]
    return [line for at, line in found if start <= at < stop]


def equal(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


@BOTH
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 13, 40])
def test_an_epoch_holds_every_label_once(count, shuffle, packing):
    rows = Rows.of(random_rows(count, T, seed=count))
    batches = make(rows, shuffle=shuffle, packing=packing)
    for epoch in (0, 1, 7):
        targets = np.concatenate([line["targets"] for line in lines(batches, epoch)])
        assert sorted(targets[targets >= 0].tolist()) == labels(rows)


@BOTH
def test_once_holds_every_label_once_in_order(packing):
    rows = random_rows(13, T, seed=1)
    batches = make(rows, shuffle=False, packing=packing)
    found = [batches.take(indices) for indices in batches.all_indices()]
    assert {array.shape for batch in found for array in batch.values()} == {(4, T)}
    assert len(found) == math.ceil(batches.sequences_per_epoch / 4)
    targets = np.concatenate([batch["targets"] for batch in found])
    assert sorted(targets[targets >= 0].tolist()) == labels(rows)
    filled = [bool(line.any()) for batch in found for line in batch["segment_ids"]]
    empty = -batches.sequences_per_epoch % 4
    assert filled == [True] * batches.sequences_per_epoch + [False] * empty
    if not packing:
        firsts = [line[0] for batch in found for line in batch["tokens"] if line[0]]
        assert firsts == [row.ids[0] for row in rows]
        assert empty


@BOTH
def test_labels_are_the_next_token_of_the_same_document(packing):
    rows = {int(row.ids[0]): row for row in random_rows(40, T, seed=2)}
    for line in lines(make(list(rows.values()), packing=packing), 0):
        tokens, targets, segments = (line[k].tolist() for k in ("tokens", "targets", "segment_ids"))
        for number, group in itertools.groupby(range(T), key=lambda t: segments[t]):
            at = list(group)
            if number == 0:
                assert [tokens[t] for t in at] == [0] * len(at)
                assert [targets[t] for t in at] == [-1] * len(at)
                assert at[-1] == T - 1  # padding stands at the end alone
                continue
            row = rows[tokens[at[0]]]
            assert [tokens[t] for t in at] == row.ids.tolist()
            for i, t in enumerate(at):
                learnt = i + 1 < len(row) and row.trained[i + 1]
                assert targets[t] == (row.ids[i + 1] if learnt else -1)
        used = [n for n in dict.fromkeys(segments) if n]
        assert used == list(range(1, len(used) + 1))
        assert packing or used == [1]


@BOTH
def test_a_batch_is_a_function_of_rows_seed_and_index(packing):
    rows = random_rows(23, T, seed=3)
    batches = make(rows, packing=packing)
    indices = [5, 0, 10**7, 3, 5, 0, 10**12]
    jumped = {n: batches[n] for n in indices}
    fresh = make(Rows.of(rows), packing=packing)
    for n, batch in jumped.items():
        assert equal(batch, fresh[n])
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
        assert {array.shape for array in batch.values()} == {(4, T)}
    for n in range(6):
        assert n not in jumped or equal(fresh[np.int64(n)], jumped[n])
    assert not equal(batches[0], make(rows, seed=1, packing=packing)[0])


def test_every_epoch_has_an_order_of_its_own_and_of_its_seed():
    rows = random_rows(50, T, seed=4)
    orders = {
        (seed, epoch): tuple(int(line["tokens"][0]) for line in lines(make(rows, seed=seed), epoch))
        for seed in (0, 1, 2**40)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == len(orders)
    assert {frozenset(order) for order in orders.values()} == {
        frozenset(int(row.ids[0]) for row in rows)
    }


def test_without_shuffling_the_order_is_that_of_the_rows():
    rows = random_rows(5, T, seed=5)
    firsts = [int(row.ids[0]) for row in rows]
    batches = make(rows, shuffle=False)
    seen = [int(line[0]) for n in range(5) for line in batches[n]["tokens"]]
    assert seen == firsts * 4


def test_batches_go_on_over_the_end_of_an_epoch_and_before_the_first_there_is_none():
    batches = make(random_rows(3, T, seed=6), batch_size=8)
    assert (batches[0]["segment_ids"][:, 0] == 1).all()
    with pytest.raises(IndexError, match="counted from 0"):
        batches[-1]


@BOTH
@pytest.mark.parametrize("count", [1, 23])
def test_batches_of_one_line_are_the_lines_of_larger_ones_in_order(packing, count):
    rows = random_rows(count, T, seed=3)
    single, eight = (make(rows, batch_size=g, packing=packing) for g in (1, 8))
    for n in (0, 1, 5, 10**12):
        expected = eight[n]
        parts = [single[8 * n + g] for g in range(8)]
        assert {part["tokens"].shape for part in parts} == {(1, T)}
        for name in expected:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), expected[name])
    assert single.steps(0.01) == 1
    assert single.steps(1.0) == single.sequences_per_epoch == len(single.all_indices())
    assert len(single.indices[: single.steps(3.0)]) == 3 * single.sequences_per_epoch


def test_steps():
    batches = make(random_rows(10, T, seed=7), batch_size=4)
    assert batches.sequences_per_epoch == 10
    assert [batches.steps(e) for e in (1.0, 2.0, 3.0, 0.4, 0.41, 1e-3)] == [3, 5, 8, 1, 2, 1]
    assert make(random_rows(10, T, seed=7), batch_size=11).steps(1.1) == 1
    packed_lines = make(random_rows(10, T, seed=7), packing="first_fit").sequences_per_epoch
    assert packed_lines < 10


def test_packing_follows_the_seed_only_when_shuffled():
    rows = random_rows(60, T, seed=8)

    def first_line(seed, shuffle):
        batches = make(rows, seed=seed, shuffle=shuffle, packing="first_fit")
        return batches.take(batches.all_indices()[0])["tokens"][0]

    assert not np.array_equal(first_line(0, True), first_line(1, True))
    assert np.array_equal(first_line(0, False), first_line(1, False))


@BOTH
def test_eos_is_learnt_and_padding_never_is_where_both_are_one_token(tmp_path, packing):
    tokenizer = make_tokenizer(pad="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = [{"prompt": "0", "completion": "true" * i} for i in range(1, 8)]
    path = write_json(tmp_path / "a.json", data)
    rows, _ = load(path, tokenizer, DataConfig(train=path, max_length=64))
    batches = make(rows, max_length=64, packing=packing)
    batch = collate([[row] for row in rows], 64)
    assert (batch["targets"] == tokenizer.eos_token_id).sum(axis=1).tolist() == [1] * 7
    seen = [line for n in range(4) for line in zip(*batches[n].values(), strict=True)]
    for tokens, targets, segments in seen:
        assert (targets[segments == 0] == -1).all()
        documents = segments.max()
        assert (targets == tokenizer.eos_token_id).sum() == documents
        assert (targets[(segments != 0) & (tokens == tokenizer.eos_token_id)] == -1).all()


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([], {}, "there is no row"),
        (random_rows(3, T, seed=9), {"max_length": 2}, r"row \d has \d+ tokens: must be from 1 to"),
        ([Row(np.zeros(0, np.int32), np.zeros(0, bool))], {}, "row 0 has 0 tokens"),
        (random_rows(3, T, seed=9), {"batch_size": 0}, "batch_size=0: must be at least 1"),
        (random_rows(3, T, seed=9), {"seed": -1}, "seed=-1: must be at least 0"),
    ],
)
def test_batches_that_can_not_be(rows, values, message):
    with pytest.raises(InputError, match=message):
        make(rows, **values)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_mesh_gets_the_lines_of_the_batch_each_made_once(monkeypatch, microbatches):
    batches = make(Rows.of(random_rows(40, T, seed=1)), packing="first_fit")
    made = []
    take = batches.take

    def counted(indices):
        made.extend(indices)
        return take(indices)

    monkeypatch.setattr(batches, "take", counted)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, context=2))
    indices = np.asarray(batches.indices[3]).reshape(microbatches, -1)
    found = place(batches, indices, mesh)
    assert sorted(made) == sorted(indices.ravel())
    for name, expected in take(batches.indices[3]).items():
        assert found[name].shape == (*indices.shape, batches.max_length)
        np.testing.assert_array_equal(found[name].reshape(expected.shape), expected)
    shard = found["tokens"].addressable_shards[0].data
    assert shard.shape == (microbatches, indices.shape[1] // 2, batches.max_length // 2)
