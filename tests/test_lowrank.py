"""The method as pure functions: what a mask is, and the branch against PyTorch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import relative, torch_lowrank

from droplora_jax.core import prng
from droplora_jax.core.mask_options import kept_ranks
from droplora_jax.lowrank import (
    compress,
    lowrank_delta,
    merged_kernel,
    rank_mask,
    subspace,
)


@partial(jax.jit, static_argnames=("shape", "granularity", "sampler", "rescale", "dtype", "kept"))
def _draw(keys, drop_rate, **options):
    return rank_mask(keys, drop_rate=drop_rate, **options)


def draw(
    keys,
    shape,
    drop_rate=0.5,
    granularity="token",
    sampler="bernoulli",
    rescale=True,
    dtype=jnp.float32,
) -> np.ndarray:
    """One program for all rates."""
    return np.asarray(
        _draw(
            keys,
            jnp.float32(drop_rate),
            shape=shape,
            granularity=granularity,
            sampler=sampler,
            rescale=rescale,
            dtype=dtype,
            kept=kept_ranks(shape[-1], drop_rate) if sampler == "exact" else None,
        )
    )


DEFAULTS = {"sampler": "bernoulli", "rescale": True, "dtype": jnp.float32, "kept": None}
ROW_KEYS = prng.fold_stack(prng.root_key(0), (256,))


def row_keys(rows: int) -> jax.Array:
    return ROW_KEYS[:rows]


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_bernoulli_keeps_each_rank_of_each_token_with_probability_1_minus_p(drop_rate):
    kept = draw(row_keys(8), (8, 128, 32), drop_rate) != 0
    for axes in [(0, 1, 2), (0, 1), (0, 2), (1, 2)]:  # over all, per rank, per position, per row
        fraction = kept.mean(axis=axes)
        deviation = np.sqrt(drop_rate * (1 - drop_rate) * fraction.size / kept.size)
        assert np.all(np.abs(fraction - (1 - drop_rate)) < 5 * deviation)
    # Independent of the neighbours: the covariances of ranks and of positions are 0 to the noise.
    centred = kept - kept.mean()
    for shifted in [centred[..., 1:] * centred[..., :-1], centred[:, 1:] * centred[:, :-1]]:
        assert abs(shifted.mean()) < 5 * drop_rate * (1 - drop_rate) / np.sqrt(shifted.size)


@pytest.mark.parametrize(
    ("granularity", "rank", "drop_rate"),
    [("token", 8, 0.5), ("sequence", 7, 0.3), ("step", 10, 0.9)],
)
def test_exact_keeps_the_same_number_always_and_every_rank_equally_often(
    granularity, rank, drop_rate
):
    keys = row_keys(256)
    options = {"drop_rate": drop_rate, "sampler": "exact", "rescale": False, "dtype": jnp.float32}
    run = partial(rank_mask, granularity=granularity, **options)
    if granularity == "step":
        masks = np.asarray(jax.jit(jax.vmap(partial(run, shape=(1, 1, rank))))(keys[:, None]))
    else:
        masks = np.asarray(jax.jit(partial(run, shape=(256, 4, rank)))(keys))
    kept = masks != 0
    number = int(np.floor((1 - drop_rate) * rank + 0.5))
    assert kept_ranks(rank, drop_rate) == number
    np.testing.assert_array_equal(kept.sum(-1), number)
    per_rank = kept.reshape(-1, rank).mean(0)
    p = number / rank
    samples = kept.size / rank
    assert np.all(np.abs(per_rank - p) < 5 * np.sqrt(p * (1 - p) / samples))


@pytest.mark.parametrize("granularity", ["token", "step"])
def test_exact_counts_the_ranks_that_are_there(granularity):
    """Of R = 8 that are padding beyond `rank`, whatever the rank: it is traced."""
    options = {"drop_rate": 0.3, "sampler": "exact", "rescale": False, "dtype": jnp.float32}
    keys = row_keys(1 if granularity == "step" else 3)

    @jax.jit
    def draw(rank, kept):
        return rank_mask(
            keys, (3, 200, 8), granularity=granularity, rank=rank, kept=kept, **options
        )

    for rank in range(9):
        mask = np.asarray(draw(jnp.int32(rank), jnp.int32(kept_ranks(rank, 0.3))))
        assert set(mask[..., :rank].sum(axis=-1).flat) <= {kept_ranks(rank, 0.3)}
        assert not mask[..., rank:].any()
    unpadded = jax.jit(partial(rank_mask, shape=(3, 200, 8), granularity=granularity, **options))
    full_rank = draw(jnp.int32(8), jnp.int32(kept_ranks(8, 0.3)))
    np.testing.assert_array_equal(full_rank, unpadded(keys))


@pytest.mark.parametrize(("drop_rate", "rescale"), [(0.3, True), (0.75, False)])
def test_a_subspace_is_what_the_exact_mask_of_a_step_keeps(drop_rate, rescale):
    """Also where some of R = 8 are padding, which is traced."""
    keys, shape = row_keys(1), (3, 5, 8)
    options = {"drop_rate": drop_rate, "rescale": rescale, "dtype": jnp.float32}

    @jax.jit
    def both(rank, kept):
        given = options | {"rank": rank, "kept": kept}
        mask = rank_mask(keys, shape, granularity="step", sampler="exact", **given)
        return mask, subspace(keys, 8, kept_ranks(8, drop_rate), **given)

    for rank in [None, *range(9)]:
        kept = kept_ranks(8 if rank is None else rank, drop_rate)
        mask, (index, values) = both(None if rank is None else jnp.int32(rank), jnp.int32(kept))
        assert len(set(index.tolist())) == kept_ranks(8, drop_rate)
        expected = np.zeros(8, np.float32)
        expected[index] = values
        np.testing.assert_array_equal(mask.reshape(-1, 8)[0], expected)


@pytest.mark.parametrize(
    ("sampler", "rescale", "value"), [("bernoulli", False, 1.0), ("exact", True, 4.0)]
)
def test_values_are_zero_or_one_over_the_kept_share(sampler, rescale, value):
    mask = draw(row_keys(4), (4, 16, 32), 0.75, "token", sampler, rescale)
    assert set(np.unique(mask)) == {0.0, value}


def test_drop_rate_zero_keeps_everything():
    np.testing.assert_array_equal(draw(row_keys(4), (4, 16, 32), 0.0), 1.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_changes_the_values_not_the_choice(dtype, strict):
    mask = draw(row_keys(4), (4, 16, 32), dtype=dtype)
    assert mask.dtype == dtype
    np.testing.assert_array_equal(mask.astype(np.float32), draw(row_keys(4), (4, 16, 32)))


@pytest.mark.parametrize("sampler", ["bernoulli", "exact"])
def test_a_rows_mask_depends_on_its_own_key_only(sampler):
    keys = row_keys(4)
    together = draw(keys, (4, 16, 32), sampler=sampler)
    order = np.asarray([3, 1])
    np.testing.assert_array_equal(draw(keys[order], (2, 16, 32), sampler=sampler), together[order])
    assert len({row.tobytes() for row in together}) == 4


@pytest.mark.parametrize("sampler", ["bernoulli", "exact"])
def test_a_tokens_mask_does_not_depend_on_the_length_of_its_row(sampler):
    keys = row_keys(4)
    short, long = (draw(keys, (4, length, 32), sampler=sampler) for length in (16, 61))
    np.testing.assert_array_equal(long[:, :16], short)


def test_token_masks_differ_from_token_to_token():
    mask = draw(row_keys(4), (4, 16, 32))
    assert len({token.tobytes() for token in mask[0]}) == 16


@pytest.mark.parametrize("sampler", ["bernoulli", "exact"])
def test_sequence_masks_are_one_a_row(sampler):
    mask = draw(row_keys(4), (4, 16, 32), granularity="sequence", sampler=sampler)
    assert mask.shape == (4, 1, 32)
    assert len({row.tobytes() for row in mask}) == 4


@pytest.mark.parametrize("sampler", ["bernoulli", "exact"])
def test_sequence_masks_of_a_packed_row_are_one_a_document(sampler):
    documents = jnp.asarray([[1, 1, 1, 2, 2, 3], [1, 2, 2, 2, 0, 0]])
    keys = prng.fold_rows(row_keys(2), documents)
    mask = draw(keys, (2, 6, 32), granularity="sequence", sampler=sampler)
    assert mask.shape == (2, 6, 32)
    seen: dict[tuple[int, int], bytes] = {}
    for row in range(2):
        for position in range(6):
            document = (row, int(documents[row, position]))
            assert (
                seen.setdefault(document, mask[row, position].tobytes())
                == mask[row, position].tobytes()
            )
    assert len(set(seen.values())) == len(seen) == 6


@pytest.mark.parametrize("sampler", ["bernoulli", "exact"])
def test_a_step_mask_is_one_vector_for_everything(sampler):
    mask = draw(row_keys(1), (4, 16, 32), granularity="step", sampler=sampler)
    assert mask.shape == (1, 1, 32)
    assert 0 < (mask != 0).sum() < 32


@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 8), (4, 3, 2, 8)])
@pytest.mark.parametrize("granularity", ["token", "sequence", "step"])
def test_a_mask_fits_inputs_of_any_number_of_dimensions(shape, granularity):
    keys = row_keys(1 if granularity == "step" else 4)
    mask = jax.eval_shape(
        partial(_draw, shape=shape, granularity=granularity, **DEFAULTS), keys, 0.5
    )
    assert np.broadcast_shapes(mask.shape, shape) == shape


@pytest.mark.parametrize("masked", [True, False])
def test_branch_and_gradients_equal_pytorch(masked, strict):
    rng = np.random.default_rng(0)
    x, w, a, b = (
        rng.normal(size=shape).astype(np.float32)
        for shape in [(2, 5, 12), (12, 7), (12, 4), (4, 7)]
    )
    m = draw(row_keys(2), (2, 5, 4)) if masked else np.ones((2, 5, 4), np.float32)
    weight = rng.normal(size=(2, 5, 7)).astype(np.float32)  # of every output in the loss
    scale = 0.7

    tensors = [torch.tensor(value, requires_grad=True) for value in (x, a, b)]
    tx, ta, tb = tensors
    expected = torch_lowrank(tx, torch.tensor(w), ta, tb, torch.tensor(m), scale)
    (expected * torch.tensor(weight)).sum().backward()

    def forward(x, a, b):
        (h,) = compress(x, a)
        return x @ w + lowrank_delta(h * jnp.asarray(m) if masked else h, b, scale=scale)

    @jax.jit
    def both(*arguments):
        y, pullback = jax.vjp(forward, *arguments)
        return y, *pullback(jnp.asarray(weight))

    y, *gradients = both(x, a, b)
    assert relative(y, expected.detach()) < 1e-5
    for ours, tensor in zip(gradients, tensors, strict=True):
        assert relative(ours, tensor.grad) < 1e-5


def test_branch_has_the_dtype_of_its_input(strict):
    x, a, b = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 2)), jnp.ones((2, 5))
    branch = jax.eval_shape(
        lambda *xab: lowrank_delta(*compress(*xab[:2]), xab[2], scale=0.5), x, a, b
    )
    assert branch.dtype == jnp.bfloat16


def test_merged_kernel_is_float32_and_equals_the_branch():
    rng = np.random.default_rng(0)
    x, w, a, b = (
        rng.normal(size=shape).astype(np.float32) for shape in [(5, 12), (12, 7), (12, 4), (4, 7)]
    )
    w = jnp.asarray(w, jnp.bfloat16)
    merged = merged_kernel(w, jnp.asarray(a), jnp.asarray(b), scale=2.0)
    assert merged.dtype == jnp.float32
    expected = torch_lowrank(*(torch.tensor(np.float64(v)) for v in (x, w, a, b)), 1.0, 2.0)
    assert relative(x @ merged, expected) < 1e-5
