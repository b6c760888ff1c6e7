"""Adapters into and out of modules that this project did not write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import (
    RANDOM,
    assert_unchanged,
    primitives,
    randomized,
    raw,
    relative,
    snapshot,
)
from small_models import random_module

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.core import prng
from droplora_jax.lowrank import rank_mask
from droplora_jax.nn.linear_spec import is_linear

KEY = dl.root_key(0)
B, T = 4, 5
ROWS = jnp.arange(B)


class Reversed(nnx.Module):
    """A linear layer of someone else's: kernel [O, I] under another name."""

    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.3)
        self.weight = nnx.Param(init(rngs.params(), (features_out, features_in)))

    def __call__(self, x):
        return x @ self.weight[...].T


@dl.linear_spec.register(Reversed)
def _reversed(layer: Reversed) -> dl.LinearSpec:
    return dl.LinearSpec("...i", "oi", "...o", attribute="weight")


class Two(nnx.Module):
    """Two layers with something that is not linear between and around them."""

    def __init__(self, first: nnx.Module, second: nnx.Module) -> None:
        self.first, self.second = first, second

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.silu(self.up(self.norm(x))))


class Listed(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Block(rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Stacked(nnx.Module):
    """Layers made by `nnx.vmap`, run by a scan."""

    def __init__(self, *, rngs: nnx.Rngs, remat: bool = True) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(rngs=rngs)

        self.layers = make(rngs)
        self.remat = remat

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)

        def run(x, layer_state):
            return nnx.merge(graphdef, layer_state)(x), None

        run = jax.checkpoint(run, prevent_cse=False) if self.remat else run
        return jax.lax.scan(run, x, state)[0]


@dataclass(frozen=True)
class Case:
    make: Callable[[nnx.Rngs], nnx.Module]
    shape: tuple[int, ...]
    layers: int = 2


def general(*args, **kwargs):
    return lambda rngs: nnx.LinearGeneral(*args, rngs=rngs, **kwargs)


def einsum(*args, **kwargs):
    return lambda rngs: nnx.Einsum(*args, rngs=rngs, **kwargs)


def two(first, second):
    return lambda rngs: Two(first(rngs), second(rngs))


CASES = {
    "Linear": Case(
        two(lambda r: nnx.Linear(6, 8, rngs=r), lambda r: nnx.Linear(8, 3, rngs=r)), (B, T, 6)
    ),
    "Linear on rows": Case(
        two(lambda r: nnx.Linear(6, 8, rngs=r), lambda r: nnx.Linear(8, 3, rngs=r)), (B, 6)
    ),
    "LinearGeneral": Case(two(general(6, (2, 4)), general((2, 4), 3, axis=(-2, -1))), (B, T, 6)),
    "LinearGeneral, not the last axes": Case(
        # [B, 3, T, 4] -> [B, T, 5, 2] -> [B, T, 2, 7]
        two(general((3, 4), (5, 2), axis=(1, -1)), general(5, 7, axis=2)),
        (B, 3, T, 4),
    ),
    "Einsum": Case(
        two(einsum("btd,dnh->btnh", (6, 2, 4), (2, 4)), einsum("...nh,nhd->...d", (2, 4, 6))),
        (B, T, 6),
    ),
    "Einsum of experts": Case(
        two(einsum("bti,eif->btef", (3, 6, 8)), einsum("btef,efo->bteo", (3, 8, 5))), (B, T, 6)
    ),
    "registered": Case(
        two(lambda r: Reversed(6, 8, rngs=r), lambda r: Reversed(8, 3, rngs=r)), (B, T, 6)
    ),
    "list": Case(lambda r: Listed(rngs=r), (B, T, 6), layers=6),
    "stacked": Case(lambda r: Stacked(rngs=r), (B, T, 6)),
}


# Axes in any place, batched kernels, and stacked layers: what a mask may get wrong.
SHAPES = ("LinearGeneral, not the last axes", "Einsum of experts", "stacked")
by_shape = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def build(case: Case) -> tuple[nnx.Module, jax.Array]:
    x = np.random.default_rng(0).normal(size=case.shape).astype(np.float32)
    return random_module(lambda: case.make(nnx.Rngs(0))), jnp.asarray(x)


def lora(**options) -> dl.DropLoRA:
    return dl.DropLoRA(**{"rank": 4, "alpha": 8.0, "targets": "all-linear", **options})


@jax.jit
def apply(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)


def test_injecting_changes_no_output_and_not_the_input(case):
    model, x = build(case)
    before, expected = snapshot(model), apply(model, x)
    injected = dl.inject(model, lora(), key=KEY)
    assert (
        len(adapters_of(injected))
        == case.layers
        == sum(is_linear(node) for _, node in nnx.iter_graph(model))
    )
    np.testing.assert_array_equal(apply(injected, x), expected)
    np.testing.assert_array_equal(apply(dl.masked(injected, KEY, rows=ROWS), x), expected)
    assert_unchanged(model, before)


def test_merging_keeps_the_function_the_classes_and_the_paths(case):
    model, x = build(case)
    injected = randomized(dl.inject(model, lora(), key=KEY))
    before = snapshot(injected)
    plain = dl.merge(injected)
    assert relative(apply(injected, x), apply(model, x)) > 0.1  # the adapters matter here
    assert relative(apply(plain, x), apply(injected, x)) < 1e-5
    assert_unchanged(injected, before)

    graphdef, state = nnx.split(plain)
    original_graphdef, original_state = nnx.split(model)
    assert graphdef == original_graphdef
    for (path, value), (other_path, other) in zip(
        nnx.to_flat_state(state), nnx.to_flat_state(original_state), strict=True
    ):
        assert (path, type(value), value[...].dtype) == (other_path, type(other), other[...].dtype)
        kernels = ("kernel", "weight")
        assert np.array_equal(value[...], other[...]) == (path[-1] not in kernels)
    classes = [(path, type(node)) for path, node in nnx.iter_graph(plain)]
    assert classes == [(path, type(node)) for path, node in nnx.iter_graph(model)]


@by_shape
def test_a_step_mask_removes_its_ranks_scales_the_others_and_does_not_reach_the_merge(name):
    """((x A) m) B = (x (A m)) B: the masked model equals an unmasked one with other factors."""
    config = lora(drop_rate=0.5, granularity="step", rank=8)
    model, x = build(CASES[name])
    injected = randomized(dl.inject(model, config, key=KEY))
    masked = dl.masked(injected, KEY)
    folded = nnx.clone(injected)
    dropped = 0
    masks = masks_of(masked, config)
    for path, adapter in adapters_of(folded).items():
        a = adapter.lora_a[...]
        m = masks[path].reshape(*masks[path].shape[:-1], *(1,) * (a.ndim - masks[path].ndim), 8)
        assert set(np.unique(m)) == {0.0, 2.0}
        dropped += int((m == 0).sum())
        adapter.lora_a.set_value(jnp.asarray(np.asarray(a) * m))
    assert dropped > 0
    assert relative(apply(masked, x), apply(folded, x)) < 1e-5
    assert relative(apply(masked, x), apply(injected, x)) > 1e-2
    for a, b in zip(*(jax.tree.leaves(dl.merge(m)) for m in (injected, masked)), strict=True):
        np.testing.assert_array_equal(a, b)


def masks_of(model: nnx.Module, config: dl.DropLoRA) -> dict[str, np.ndarray]:
    """The step masks [*stack, R] that a model's keys stand for."""

    def mask(key):
        return rank_mask(
            key[None],
            (1, config.rank),
            drop_rate=config.drop_rate,
            granularity="step",
            sampler=config.sampler,
            rescale=config.rescale,
            dtype=jnp.float32,
        )[0]

    masks = {}
    for path, adapter in adapters_of(model).items():
        keys = adapter.mask_key[...]
        flat = np.asarray(jax.jit(jax.vmap(mask))(keys.reshape(-1)))
        masks[path] = flat.reshape(*keys.shape[:-1], config.rank)
    return masks


@pytest.mark.parametrize(
    ("name", "granularity", "sampler"),
    [
        *((name, "token", "bernoulli") for name in SHAPES),
        ("Linear on rows", "token", "exact"),
        ("Linear", "sequence", "bernoulli"),
        ("stacked", "token", "exact"),
    ],
)
def test_a_rows_result_depends_on_its_index_and_on_no_other_row(name, granularity, sampler):
    check_rows(CASES[name], granularity, sampler)


def check_rows(case: Case, granularity: str, sampler: str) -> None:
    config = lora(drop_rate=0.5, granularity=granularity, sampler=sampler)
    model, x = build(case)
    injected = randomized(dl.inject(model, config, key=KEY))
    everything = apply(dl.masked(injected, KEY, rows=ROWS), x)
    order = jnp.asarray([2, 0])
    some = apply(dl.masked(injected, KEY, rows=order), x[order])
    assert relative(some, everything[order]) < 1e-5
    other_index = apply(dl.masked(injected, KEY, rows=jnp.asarray([0, 1])), x[order])
    assert relative(other_index[0], everything[2]) > 1e-2


@by_shape
def test_only_adapters_have_gradients(name):
    case = CASES[name]
    model, x = build(case)
    injected = dl.inject(model, lora(), key=KEY)

    @nnx.jit
    def differentiated(model):
        return nnx.value_and_grad(
            lambda model: jnp.sum(model(x) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam)
        )(model)

    loss, gradients = differentiated(injected)
    flat = nnx.to_flat_state(gradients)
    assert len(flat) == 2 * case.layers
    for path, gradient in flat:
        assert path[-1] in ("lora_a", "lora_b")
        # B = 0, so A has no gradient at first; B has one.
        assert np.any(np.asarray(gradient[...])) == (path[-1] == "lora_b")
    assert np.isfinite(loss)

    graphdef, adapters, mask_keys, frozen = dl.split(injected)
    trained = {id(leaf) for leaf in jax.tree.leaves(adapters)}
    assert len(trained) == 2 * case.layers
    assert len(jax.tree.leaves(mask_keys)) == case.layers
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(nnx.state(model)))
    again = jax.jit(jax.grad(lambda a: jnp.sum(nnx.merge(graphdef, a, mask_keys, frozen)(x) ** 2)))(
        adapters
    )
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_list_and_a_stack_of_the_same_layers_are_the_same():
    stacked = random_module(lambda: Stacked(rngs=nnx.Rngs(0)))
    listed = random_module(lambda: Listed(rngs=nnx.Rngs(0)), seed=1)
    for path, value in nnx.to_flat_state(nnx.state(stacked)):
        for i, layer in enumerate(listed.layers):
            target = layer
            for name in path[1:-1]:
                target = getattr(target, name)
            getattr(target, path[-1]).set_value(jnp.asarray(np.asarray(value[...])[i]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 6)).astype(np.float32))
    config = lora(drop_rate=0.5)
    one, many = (dl.inject(model, config, key=KEY) for model in (stacked, listed))
    for name in ("up", "down"):
        a = adapters_of(one)[f"layers.{name}"].lora_a[...]
        for i in range(3):
            np.testing.assert_array_equal(a[i], adapters_of(many)[f"layers.{i}.{name}"].lora_a[...])
        assert len({np.asarray(layer).tobytes() for layer in a}) == 3

    rng = np.random.default_rng(1)
    for name in ("up", "down"):
        b = adapters_of(one)[f"layers.{name}"].lora_b
        b.set_value(jnp.asarray(rng.normal(size=b[...].shape), jnp.float32))
        for i in range(3):
            adapters_of(many)[f"layers.{i}.{name}"].lora_b.set_value(b[...][i])
    one, many = (dl.masked(model, KEY, rows=ROWS) for model in (one, many))
    for name in ("up", "down"):
        keys = raw(adapters_of(one)[f"layers.{name}"].mask_key[...])
        for i in range(3):
            other = adapters_of(many)[f"layers.{i}.{name}"].mask_key[...]
            np.testing.assert_array_equal(keys[i], raw(other))
    assert relative(apply(one, x), apply(many, x)) < 1e-5


def test_drop_rate_zero_is_lora_bit_for_bit():
    base = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    theirs = nnx.LoRA(6, 4, 8, base_module=base, rngs=nnx.Rngs(1))
    theirs.lora_b.set_value(jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32))
    model = dl.inject(Two(base, nnx.identity), lora(rank=4, alpha=4.0, drop_rate=0.0), key=KEY)
    adapter = adapters_of(model)["first"]
    adapter.lora_a.set_value(theirs.lora_a[...])
    adapter.lora_b.set_value(theirs.lora_b[...])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, 6)), jnp.float32)
    training = dl.masked(model, KEY, rows=ROWS)
    np.testing.assert_array_equal(training.first(x), theirs(x))


@pytest.mark.parametrize("name", ["Linear", "stacked"])
def test_random_numbers_are_drawn_by_a_masked_forward_pass_and_by_no_other(name):
    model, x = build(CASES[name])

    def drawn(drop_rate: float, training: bool) -> set[str]:
        injected = dl.inject(model, lora(drop_rate=drop_rate), key=KEY)
        graphdef, adapters, mask_keys, frozen = dl.split(injected)

        def forward(adapters, key):
            keys = dl.draw(mask_keys, key, rows=ROWS) if training else mask_keys
            return nnx.merge(graphdef, adapters, keys, frozen)(x)

        return primitives(jax.make_jaxpr(forward)(adapters, KEY)) & RANDOM

    assert "random_bits" in drawn(0.5, training=True)
    assert drawn(0.5, training=False) == set()
    assert drawn(0.0, training=True) == set()


@pytest.mark.parametrize("name", ["Linear", "stacked"])
def test_a_plain_nnx_loop_draws_other_masks_every_step_and_trains_adapters_only(name):
    config = lora(drop_rate=0.5, granularity="step", rank=16)
    model, x = build(CASES[name])
    model = dl.inject(model, config, key=KEY)
    for adapter in adapters_of(model).values():
        adapter.lora_b.set_value(adapter.lora_b[...] + 0.1)
    before = snapshot(model)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, key):
        def loss(model):
            return jnp.mean(dl.masked(model, key, rows=ROWS)(x) ** 2)

        loss, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return loss, gradients

    def ranks_used(gradients) -> dict:
        return {
            path: np.any(np.asarray(g[...]).reshape(-1, 16, g[...].shape[-1]) != 0, axis=-1)
            for path, g in nnx.to_flat_state(gradients)
            if path[-1] == "lora_b"
        }

    used = []
    for n in range(2):
        key = jax.random.fold_in(KEY, n)
        expected = masks_of(dl.masked(model, key), config)
        _, gradients = step(model, optimizer, key)
        used.append(ranks_used(gradients))
        for path, kept in used[-1].items():
            mask = expected[".".join(map(str, path[:-1]))].reshape(kept.shape)
            np.testing.assert_array_equal(kept, mask != 0)
    for path in used[0]:
        assert not np.array_equal(used[0][path], used[1][path])

    graphdef, after = snapshot(model)
    assert graphdef == before[0]  # the masks are off again
    for path, value in after.items():
        changed = not np.array_equal(value, before[1][path])
        assert changed == (path[-1] in ("lora_a", "lora_b")), path


@pytest.mark.parametrize("granularity", ["token", "sequence", "step"])
def test_jit_and_rematerialisation_see_the_same_masks(granularity):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 6)).astype(np.float32))
    results = []
    for remat in (True, False):
        model = dl.inject(
            Stacked(rngs=nnx.Rngs(0), remat=remat), lora(granularity=granularity), key=KEY
        )
        graphdef, adapters, mask_keys, frozen = dl.split(randomized(model))

        def loss(adapters, key, graphdef=graphdef, mask_keys=mask_keys, frozen=frozen):
            keys = dl.draw(mask_keys, key, rows=ROWS)
            return jnp.sum(nnx.merge(graphdef, adapters, keys, frozen)(x) ** 2)

        gradient = jax.value_and_grad(loss)
        results += [jax.jit(gradient)(adapters, KEY)]
        if remat and granularity == "token":
            results += [gradient(adapters, KEY)]
            assert relative(gradient(adapters, jax.random.fold_in(KEY, 1))[0], results[0][0]) > 1e-3
    for result in results[1:]:
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(results[0]), strict=True):
            assert relative(a, b) < 1e-6


def test_documents_of_a_packed_row_have_masks_of_their_own():
    config = lora(granularity="sequence", drop_rate=0.5, rank=16)
    model = Two(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.identity)
    model = randomized(dl.inject(model, config, key=KEY))
    x = jnp.broadcast_to(jnp.arange(6.0), (2, 6, 6))
    documents = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3]])
    y = dl.masked(model, KEY, rows=jnp.arange(2), documents=documents).first(x)
    # Equal inputs, so that outputs are equal just where the masks are.
    flat, owner = y.reshape(12, -1), np.asarray(documents + jnp.asarray([[0], [10]])).reshape(12)
    for i in range(12):
        for j in range(12):
            assert (relative(flat[i], flat[j]) < 1e-6) == (owner[i] == owner[j])


def test_injecting_twice_is_an_error():
    model = dl.inject(CASES["list"].make(nnx.Rngs(0)), lora(), key=KEY)
    with pytest.raises(dl.InputError, match=r"already.*layers\.0\.down.*6 in all.*merge"):
        dl.inject(model, lora(), key=KEY)
    assert adapters_of(dl.inject(dl.merge(model), lora(), key=KEY))


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            setattr(self, f"{name}_proj", nnx.Linear(4, 4, rngs=rngs))
        self.embed = nnx.Embed(4, 4, rngs=rngs)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("paper", "q k v up down"),
        ("all-linear", "q k v o gate up down"),
        ("q_proj", "q"),
        (r"^(q|o)_", "q o"),
        (("q_proj", "down_proj$"), "q down"),
        (("paper", "o_proj"), "q k v o up down"),
    ],
)
def test_targets(targets, expected):
    model = dl.inject(Attention(nnx.Rngs(0)), lora(targets=targets), key=KEY)
    assert set(adapters_of(model)) == {f"{name}_proj" for name in expected.split()}


@pytest.mark.parametrize("targets", ["q_porj", ("q_proj", "q_porj")])
def test_a_pattern_that_matches_nothing_lists_the_linear_modules(targets):
    with pytest.raises(dl.InputError, match=r"targets='q_porj'.*down_proj, gate_proj.*7 in all"):
        dl.inject(Attention(nnx.Rngs(0)), lora(targets=targets), key=KEY)


def test_a_broken_pattern_is_named():
    with pytest.raises(dl.InputError, match=r"targets='q_\(proj'.*regular expression"):
        dl.inject(Attention(nnx.Rngs(0)), lora(targets="q_(proj"), key=KEY)


class Mixed(nnx.Module):
    """A layer that can be adapted beside one that can't."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.plain = nnx.Linear(4, 4, rngs=rngs)
        self.batched = nnx.LinearGeneral(4, 4, batch_axis={0: 3}, rngs=rngs)


def test_a_layer_that_cannot_be_adapted_says_so_when_it_is_a_target():
    with pytest.raises(dl.InputError, match="batch_axis"):
        dl.inject(Mixed(nnx.Rngs(0)), lora(targets="batched"), key=KEY)


def test_a_layer_that_cannot_be_adapted_is_left_alone_when_it_is_no_target():
    injected = dl.inject(Mixed(nnx.Rngs(0)), lora(targets="plain"), key=KEY)
    assert set(adapters_of(injected)) == {"plain"}


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_rows_are_asked_for(granularity):
    model = dl.inject(Attention(nnx.Rngs(0)), lora(granularity=granularity), key=KEY)
    with pytest.raises(dl.InputError, match=rf"'{granularity}'.*rows=.*arange"):
        dl.masked(model, KEY)


@pytest.mark.parametrize(("name", "granularity"), [("Linear", "token"), ("stacked", "sequence")])
def test_a_wrong_number_of_rows_is_an_error(name, granularity):
    model, x = build(CASES[name])
    model = dl.masked(
        dl.inject(model, lora(granularity=granularity), key=KEY), KEY, rows=jnp.arange(B + 1)
    )
    with pytest.raises(dl.InputError, match=rf"{B + 1} rows.*sees {B}.*rows="):
        model(x)


@pytest.mark.parametrize(
    ("name", "granularity"), [("Linear", "token"), ("stacked", "sequence"), ("stacked", "step")]
)
def test_drawing_again_replaces_the_masks(name, granularity):
    """`model = masked(model, ...)` in a loop is the obvious slip; it must not pile up."""
    model, _ = build(CASES[name])
    model = dl.inject(model, lora(granularity=granularity), key=KEY)
    options = {"rows": ROWS}
    if granularity == "sequence":
        options["documents"] = jnp.ones((B, T), jnp.int32)
    other = dl.root_key(9)
    once = dl.masked(model, KEY, **options)
    twice = dl.masked(dl.masked(model, other, **options), KEY, **options)
    assert_unchanged(twice, snapshot(once))


def test_masked_leaves_its_input_off():
    model = dl.inject(CASES["stacked"].make(nnx.Rngs(0)), lora(), key=KEY)
    before = snapshot(model)
    dl.masked(model, KEY, rows=ROWS)
    assert_unchanged(model, before)


def test_masks_differ_between_layers_modules_steps_and_seeds():
    model = dl.inject(CASES["stacked"].make(nnx.Rngs(0)), lora(), key=KEY)
    seen = []
    for seed in (0, 1):
        for step in (0, 1):
            key = jax.random.fold_in(prng.root_key(seed), step)
            for adapter in adapters_of(dl.masked(model, key, rows=ROWS)).values():
                seen += raw(adapter.mask_key[...]).reshape(-1, 2).tolist()
    assert len({tuple(key) for key in seen}) == len(seen) == 2 * 2 * 2 * 3 * B


def test_merging_inside_jit():
    model, x = build(CASES["stacked"])
    injected = randomized(dl.inject(model, lora(), key=KEY))
    inside = nnx.jit(lambda model, x: dl.merge(model)(x))(injected, x)
    assert relative(inside, apply(dl.merge(injected), x)) < 1e-6


def test_a_bfloat16_kernel_is_merged_in_float32_and_cast_once():
    layer = nnx.Linear(6, 8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    injected = randomized(dl.inject(Two(layer, nnx.identity), lora(), key=KEY))
    adapter = adapters_of(injected)["first"]
    kernel, a, b = (np.float64(v[...]) for v in (layer.kernel, adapter.lora_a, adapter.lora_b))
    merged = dl.merge(injected).first.kernel[...]
    assert merged.dtype == jnp.bfloat16
    expected = kernel + 2.0 * a @ b
    np.testing.assert_array_equal(merged, jnp.asarray(np.float32(expected), jnp.bfloat16))
