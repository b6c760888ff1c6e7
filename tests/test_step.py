"""One step: what is differentiated, and that the split, the mesh and the past do not matter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import RANDOM, Folder, primitives, random_tokens, randomized, raw, relative

import droplora_jax as dl
from droplora_jax.sharding import MeshConfig, make_mesh, put
from droplora_jax.step import (
    compile_train_step,
    eval_step,
    init_state,
    loss_and_gradients,
    loss_sum,
    train_step,
)

ROOT = dl.root_key(11)
G, T = 8, 24
ONE = MeshConfig(fsdp=1)
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
EIGHT = MeshConfig(data=8, fsdp=1)


def mesh_of(config: MeshConfig):
    count = int(np.prod(config.sizes))
    return make_mesh(config, jax.devices()[:count])


def parts(folder: Folder, mesh=ONE, *, dtype=jnp.float32, remat="nothing", **options):
    """A model with adapters that do something, split."""
    mesh = mesh_of(mesh)
    model = dl.load(folder.path, mesh=mesh, dtype=dtype, remat=remat)
    config = dl.DropLoRA(**{"rank": 6, "alpha": 6.0, **options})
    model = dl.inject(model, config, key=dl.root_key(3))
    return mesh, dl.split(randomized(model, size=0.2))


def ragged(seed: int = 0, documents: int = 1) -> dict[str, np.ndarray]:
    """Rows of G documents of various lengths, with responses of various lengths, then padding."""
    random = np.random.default_rng(seed)
    tokens = random_tokens(G, T, seed=seed)
    targets = np.full((G, T), -1, np.int32)
    segments = np.zeros((G, T), np.int32)
    for g in range(G):
        ends = np.sort(random.choice(np.arange(4, T + 1), documents, replace=False))
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            segments[g, start:end] = number
            response = int(random.integers(start, end - 1)) if end - start > 1 else start
            targets[g, response : end - 1] = tokens[g, response + 1 : end]
    return {
        "tokens": np.where(segments > 0, tokens, 0).astype(np.int32),
        "targets": targets,
        "segment_ids": segments,
    }


def micro(batch, k: int, mesh=None):
    """The batch as k microbatches."""
    split = {name: x.reshape(k, -1, x.shape[-1]) for name, x in batch.items()}
    return split if mesh is None else put(split, (None, "batch"), mesh)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def gradients_of(split, batch, step: int = 0):
    """Loss and gradients of a microbatched batch, compiled."""
    graphdef, adapters, mask_keys, frozen = split
    compute = jax.jit(partial(loss_and_gradients, graphdef))
    return compute(adapters, mask_keys, frozen, batch, key_of(step))


def key_of(step: int):
    return jax.random.fold_in(ROOT, step)


# --- accumulation --------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "sequence", "step"])
def test_microbatches_make_one_batch(untied, granularity):
    _, split = parts(untied, granularity=granularity)
    graphdef, adapters, mask_keys, frozen = split
    tx = optax.sgd(0.5)
    step = jax.jit(partial(train_step, graphdef, tx))
    compute = jax.jit(partial(loss_and_gradients, graphdef))
    batch = ragged()
    counts = (batch["targets"] >= 0).sum(axis=1)
    assert len(set(counts.tolist())) > 3  # so that a mean of means would be another number

    def run(k):
        loss, gradients = compute(adapters, mask_keys, frozen, micro(batch, k), key_of(0))
        state, metrics = step(init_state(adapters, tx), mask_keys, frozen, micro(batch, k), ROOT)
        moved = flat(state.adapters) - flat(adapters)
        return float(loss), flat(gradients), moved, float(metrics["loss"])

    loss, gradients, moved, logged = run(1)
    assert np.linalg.norm(moved) > 0.01
    for k in (2, 4, 8):
        again = run(k)
        np.testing.assert_allclose(again[0], loss, rtol=1e-6)
        np.testing.assert_allclose(again[3], logged, rtol=1e-6)
        assert relative(again[1], gradients) < 5e-6
        # The parameters themselves are stored in float32; the update is what is compared.
        assert relative(again[2], moved) < 5e-6


def test_the_loss_is_the_mean_over_all_targets_of_the_batch(untied):
    """Row by row with the masks off, each by itself, padding cut off."""
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied, drop_rate=0.0)
    batch = ragged()
    loss, _ = loss_and_gradients(graphdef, adapters, mask_keys, frozen, micro(batch, 4), key_of(0))
    model = nnx.merge(graphdef, adapters, mask_keys, frozen)
    total, count = 0.0, 0
    for g in range(G):
        length = int((batch["segment_ids"][g] > 0).sum())
        logits = np.asarray(model(batch["tokens"][g : g + 1, :length]))[0].astype(np.float64)
        for t in range(length):
            if (target := batch["targets"][g, t]) >= 0:
                total += np.log(np.exp(logits[t] - logits[t].max()).sum()) + logits[t].max()
                total -= logits[t, target]
                count += 1
    np.testing.assert_allclose(float(loss), total / count, rtol=1e-5)


def test_a_microbatch_without_a_target_changes_nothing(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    compute = jax.jit(partial(loss_and_gradients, graphdef))
    half = {name: x[: G // 2] for name, x in ragged().items()}
    ignored = {
        "tokens": np.zeros((G // 2, T), np.int32),
        "targets": np.full((G // 2, T), -1, np.int32),
        "segment_ids": np.zeros((G // 2, T), np.int32),
    }
    filled = {name: np.concatenate([x, ignored[name]]) for name, x in half.items()}
    one = compute(adapters, mask_keys, frozen, micro(half, 1), key_of(0))
    two = compute(adapters, mask_keys, frozen, micro(filled, 2), key_of(0))
    np.testing.assert_allclose(float(two[0]), float(one[0]), rtol=1e-6)
    assert relative(flat(two[1]), flat(one[1])) < 5e-6


def test_a_batch_without_a_target_is_no_nan(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    batch = ragged()
    batch["targets"] = np.full_like(batch["targets"], -1)
    loss, gradients = loss_and_gradients(
        graphdef, adapters, mask_keys, frozen, micro(batch, 2), key_of(0)
    )
    assert float(loss) == 0
    np.testing.assert_array_equal(flat(gradients), 0)


def test_tokens_that_are_no_target_have_no_loss(untied):
    """What stands behind the last target of a row is seen by no target."""
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    batch = ragged()
    changed = {name: x.copy() for name, x in batch.items()}
    for g in range(G):
        last = int(np.flatnonzero(batch["targets"][g] >= 0).max(initial=0))
        changed["tokens"][g, last + 1 :] = 5
    assert np.any(changed["tokens"] != batch["tokens"])
    losses = [
        loss_and_gradients(graphdef, adapters, mask_keys, frozen, micro(b, 2), key_of(0))[0]
        for b in (batch, changed)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_tokens_counts_what_is_no_padding(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    tx = optax.sgd(0.1)
    batch = ragged()
    _, metrics = train_step(
        graphdef, tx, init_state(adapters, tx), mask_keys, frozen, micro(batch, 2), ROOT
    )
    assert int(metrics["tokens"]) == (batch["segment_ids"] > 0).sum()


def test_grad_norm_is_the_norm_of_the_whole_gradient(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    tx = optax.sgd(1.0)
    batch = micro(ragged(), 2)
    _, metrics = train_step(graphdef, tx, init_state(adapters, tx), mask_keys, frozen, batch, ROOT)
    _, gradients = loss_and_gradients(graphdef, adapters, mask_keys, frozen, batch, key_of(0))
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(flat(gradients)), rtol=1e-6)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "sequence", "step"])
def test_every_step_draws_other_masks_and_a_step_the_same_ones_again(untied, granularity):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied, granularity=granularity)
    compute = jax.jit(partial(loss_and_gradients, graphdef))
    batch = micro(ragged(), 2)

    def gradients(step):
        return flat(compute(adapters, mask_keys, frozen, batch, key_of(step))[1])

    first, second = gradients(0), gradients(1)
    assert relative(second, first) > 0.1
    np.testing.assert_array_equal(gradients(0), first)


def test_the_step_counts_itself_on(untied):
    """The compiled step at a rate of nothing: only the masks differ from call to call."""
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    tx = optax.sgd(0.0)
    step = compile_train_step(graphdef, tx, adapters)
    state, batch = init_state(adapters, tx), micro(ragged(), 2)
    losses = []
    for n in range(3):
        assert int(state.step) == n
        state, metrics = step(state, mask_keys, frozen, batch, ROOT)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    again, metrics = step(
        replace(init_state(state.adapters, tx), step=jnp.int32(1)), mask_keys, frozen, batch, ROOT
    )
    assert float(metrics["loss"]) == losses[1]
    assert int(again.step) == 2


def test_the_same_step_twice_is_the_same_bit_for_bit(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    tx = optax.adamw(1e-2)
    step = compile_train_step(graphdef, tx, adapters)
    batch = micro(ragged(), 2)
    results = [
        step(init_state(jax.tree.map(jnp.copy, adapters), tx), mask_keys, frozen, batch, ROOT)
        for _ in range(2)
    ]
    one, two = (jax.tree.leaves(result) for result in results)
    assert len(one) > 20
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_documents_in_one_row_have_masks_of_their_own(untied):
    _, (_, _, mask_keys, _) = parts(untied, granularity="sequence")
    documents = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 2, 3]])
    keys = dl.draw(mask_keys, key_of(0), rows=jnp.arange(2), documents=documents)
    for leaf in jax.tree.leaves(keys):
        for layer in raw(leaf):  # [rows, positions, words of a key]
            per_document = {
                (row, int(documents[row, t])): tuple(layer[row, t])
                for row in range(2)
                for t in range(5)
            }
            assert len(set(per_document.values())) == len(per_document) == 6
            for row in range(2):
                for t in range(5):
                    expected = per_document[row, int(documents[row, t])]
                    assert tuple(layer[row, t]) == expected


def test_a_packed_row_is_trained_with_the_masks_of_its_documents(untied):
    """The step passes the documents on: the second document of a row meets another mask."""
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied, granularity="sequence")
    half = random_tokens(1, T // 2)
    batch = {
        "tokens": np.concatenate([half, half], axis=1),
        "segment_ids": np.repeat([[1, 2]], T // 2, axis=1).astype(np.int32),
    }

    def loss(document):
        targets = np.full((1, T), -1, np.int32)
        start = T // 2 * (document - 1)
        targets[0, start : start + T // 2 - 1] = half[0, 1:]
        whole = micro(batch | {"targets": targets}, 1)
        return float(loss_and_gradients(graphdef, adapters, mask_keys, frozen, whole, key_of(0))[0])

    # The same text, the same positions, the same weights: only the mask can differ.
    assert abs(loss(1) - loss(2)) > 1e-3


@pytest.mark.parametrize("mesh", [CUBE, EIGHT], ids=["2x2x2", "8x1x1"])
@pytest.mark.parametrize("granularity", ["token", "sequence", "step"])
def test_masks_are_the_same_bits_on_every_mesh(untied, mesh, granularity):
    """The gradient of B is zero exactly where a mask is: seen through the compiled step."""

    def drawn(config):
        mesh, (_, _, mask_keys, _) = parts(untied, config, granularity=granularity)
        batch = micro(ragged(documents=3), 1, mesh)
        keys = jax.jit(dl.draw)(
            mask_keys,
            key_of(4),
            rows=jnp.arange(G, dtype=jnp.int32),
            documents=batch["segment_ids"][0],
        )

        @jax.jit
        def bits(keys):
            return [
                jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (16,)))(key.reshape(-1))
                for key in jax.tree.leaves(keys)
            ]

        return [raw(key) for key in jax.tree.leaves(keys)], bits(keys)

    (keys, bits), (other_keys, other_bits) = drawn(ONE), drawn(mesh)
    assert len(keys) == 5
    for one, other in zip([*keys, *bits], [*other_keys, *other_bits], strict=True):
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("mesh", [CUBE, EIGHT], ids=["2x2x2", "8x1x1"])
def test_five_steps_are_the_same_on_every_mesh(untied, mesh):
    def losses(config):
        mesh, (graphdef, adapters, mask_keys, frozen) = parts(untied, config)
        tx = optax.adamw(3e-3)
        step = compile_train_step(graphdef, tx, adapters)
        state = init_state(adapters, tx)
        seen = []
        for n in range(5):
            batch = micro(ragged(seed=n), 1, mesh)
            state, metrics = step(state, mask_keys, frozen, batch, ROOT)
            seen.append(float(metrics["loss"]))
        return seen

    one = losses(ONE)
    np.testing.assert_allclose(losses(mesh), one, rtol=1e-5)
    assert one[0] != one[1]


def test_evaluation_has_no_random_number_in_it(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    batch = ragged()
    step = partial(eval_step, graphdef)
    assert not primitives(jax.make_jaxpr(step)(adapters, mask_keys, frozen, batch)) & RANDOM
    train = partial(loss_and_gradients, graphdef)
    found = primitives(
        jax.make_jaxpr(train)(adapters, mask_keys, frozen, micro(batch, 2), key_of(0))
    )
    assert found & RANDOM  # the same look does find those of training


def test_evaluation_is_the_merged_model(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    batch = ragged()
    loss, count = eval_step(graphdef, adapters, mask_keys, frozen, batch)
    merged = dl.merge(nnx.merge(graphdef, adapters, mask_keys, frozen))
    expected, expected_count = loss_sum(merged, batch)
    assert int(count) == int(expected_count) == (batch["targets"] >= 0).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# --- what is trained, and what it costs ------------------------------------------------------------


@pytest.mark.parametrize("mesh", [ONE, CUBE], ids=["1", "2x2x2"])
def test_only_adapters_have_gradients_and_moments_which_lie_as_they_do(untied, mesh):
    mesh, (graphdef, adapters, mask_keys, frozen) = parts(untied, mesh)
    tx = optax.adamw(1e-3)
    state = init_state(adapters, tx)
    paths = {path for path, _ in nnx.to_flat_state(adapters)}
    assert {path[-1] for path in paths} == {"lora_a", "lora_b"}
    step = compile_train_step(graphdef, tx, adapters)
    new, _ = step(state, mask_keys, frozen, micro(ragged(), 1, mesh), ROOT)
    scale = next(part for part in new.opt_state if hasattr(part, "mu"))
    for moments in (scale.mu, scale.nu, new.adapters):
        assert {path for path, _ in nnx.to_flat_state(moments)} == paths
        for moment, adapter in zip(
            jax.tree.leaves(moments), jax.tree.leaves(adapters), strict=True
        ):
            assert moment.shape == adapter.shape
            assert moment.sharding.is_equivalent_to(adapter.sharding, adapter.ndim)
    _, gradients = loss_and_gradients(
        graphdef, adapters, mask_keys, frozen, micro(ragged(), 1, mesh), key_of(0)
    )
    assert {path for path, _ in nnx.to_flat_state(gradients)} == paths


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def test_the_frozen_base_is_not_copied_and_the_state_is_reused(tmp_path):
    """A base far larger than the activations and the adapters: a copy of it would be seen."""
    from oracles import llama_folder

    folder = llama_folder(
        tmp_path, vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=4
    )
    _, (graphdef, adapters, mask_keys, frozen) = parts(folder, rank=2)
    tx = optax.adamw(1e-3)
    state = init_state(adapters, tx)
    batch = {name: x[:2, :8] for name, x in ragged().items()}
    step = compile_train_step(graphdef, tx, adapters)
    memory = step.lower(state, mask_keys, frozen, micro(batch, 2), ROOT).compile().memory_analysis()
    base = nbytes(frozen)
    assert memory.argument_size_in_bytes >= base > 16 * nbytes(state)
    # One layer of four may be sliced out for the scan, in the forward and in the backward pass.
    assert memory.temp_size_in_bytes < 0.75 * base
    assert memory.output_size_in_bytes < 0.1 * base
    assert memory.alias_size_in_bytes >= nbytes(state)


def test_the_state_is_donated_and_the_base_is_not(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    tx = optax.adamw(1e-3)
    step = compile_train_step(graphdef, tx, adapters)
    state = init_state(adapters, tx)
    step(state, mask_keys, frozen, micro(ragged(), 2), ROOT)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((mask_keys, frozen)))


def test_the_base_stays_as_it_was(untied):
    _, (graphdef, adapters, mask_keys, frozen) = parts(untied)
    before = [np.array(leaf) for leaf in jax.tree.leaves(frozen)]
    tx = optax.sgd(0.1)
    compile_train_step(graphdef, tx, adapters)(
        init_state(adapters, tx), mask_keys, frozen, micro(ragged(), 2), ROOT
    )
    for a, b in zip(jax.tree.leaves(frozen), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("strict")
def test_a_bfloat16_base_has_float32_adapters_gradients_and_moments(bfloat16):
    _, (graphdef, adapters, mask_keys, frozen) = parts(bfloat16, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    batch = micro(ragged(), 2)
    loss, gradients = loss_and_gradients(graphdef, adapters, mask_keys, frozen, batch, key_of(0))
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic mixes
        tx = optax.adamw(1e-2)
        state = init_state(adapters, tx)
        before = flat(adapters)
        new, _ = compile_train_step(graphdef, tx, adapters)(state, mask_keys, frozen, batch, ROOT)
    floats = [leaf for leaf in jax.tree.leaves(new) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    assert len(floats) == 3 * len(jax.tree.leaves(gradients))
    assert relative(flat(new.adapters), before) > 1e-4


@pytest.mark.parametrize("remat", ["everything", "dots"])
def test_what_is_saved_for_the_backward_pass_changes_no_mask(untied, remat):
    results = []
    for policy in ("nothing", remat):
        _, (graphdef, adapters, mask_keys, frozen) = parts(untied, remat=policy)
        results.append(
            jax.jit(partial(loss_and_gradients, graphdef))(
                adapters, mask_keys, frozen, micro(ragged(), 2), key_of(0)
            )
        )
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
    assert relative(flat(results[1][1]), flat(results[0][1])) < 5e-6
