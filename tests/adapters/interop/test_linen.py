"""Adapters in models of flax.linen: the same numbers as in the same model in nnx."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from oracles import RANDOM, assert_unchanged, primitives, randomized, raw, relative, snapshot
from small_models import random_module

import droplora_jax as dl
from droplora_jax.adapters.interop import linen
from droplora_jax.adapters.learned import Learned
from droplora_jax.adapters.surgery import adapters_of

KEY = dl.root_key(0)
V, D, F, N, L, B, T = 16, 12, 20, 3, 2, 4, 5
ROWS = jnp.arange(B)


def attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


class Layer(nn.Module):
    """A LLaMA-style layer, with every way linen has of writing a linear one."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        h = nn.RMSNorm(name="attn_norm")(x)
        q = nn.DenseGeneral((N, D // N), use_bias=False, name="q_proj")(h)
        k = nn.DenseGeneral((N, D // N), use_bias=False, name="k_proj")(h)
        v = nn.Einsum((D, N, D // N), "...d,dnh->...nh", name="v_proj")(h)
        o = nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="o_proj")(attention(q, k, v))
        x = x + nn.Dropout(0.1)(o, deterministic=deterministic)
        h = nn.RMSNorm(name="mlp_norm")(x)
        gate = nn.Dense(F, use_bias=False, name="gate_proj")(h)
        up = nn.Dense(F, name="up_proj")(h)
        return x + nn.Dense(D, use_bias=False, name="down_proj")(nn.silu(gate) * up)


class Listed(nn.Module):
    @nn.compact
    def __call__(self, tokens, deterministic=True):
        x = nn.Embed(V, D, name="embed")(tokens)
        for i in range(L):
            x = Layer(name=f"layers_{i}")(x, deterministic)
        return nn.Dense(V, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


class Stacked(nn.Module):
    remat: bool = False
    axis: int = 0

    @nn.compact
    def __call__(self, tokens, deterministic=True):
        x = nn.Embed(V, D, name="embed")(tokens)
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=L,
        )
        x, _ = scan(layer(name="layers"), x, None)
        return nn.Dense(V, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


class NnxLayer(nnx.Module):
    """`Layer` in nnx."""

    def __init__(self, rngs):
        heads = (N, D // N)
        self.attn_norm = nnx.RMSNorm(D, rngs=rngs)
        self.q_proj = nnx.LinearGeneral(D, heads, use_bias=False, rngs=rngs)
        self.k_proj = nnx.LinearGeneral(D, heads, use_bias=False, rngs=rngs)
        self.v_proj = nnx.Einsum("...d,dnh->...nh", (D, *heads), heads, rngs=rngs)
        self.o_proj = nnx.LinearGeneral(heads, D, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(D, rngs=rngs)
        self.gate_proj = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(D, F, rngs=rngs)
        self.down_proj = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        h = self.attn_norm(x)
        x = x + self.o_proj(attention(self.q_proj(h), self.k_proj(h), self.v_proj(h)))
        h = self.mlp_norm(x)
        return x + self.down_proj(nn.silu(self.gate_proj(h)) * self.up_proj(h))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.layers = nnx.List([NnxLayer(rngs) for _ in range(L)])
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.lm_head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
MODELS = {"list": Listed(), "scan": Stacked(), "scan, remat": Stacked(remat=True)}


def random_params(module: nn.Module):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)


@pytest.fixture(params=MODELS)
def both(request):
    """A linen model and its parameters."""
    module = MODELS[request.param]
    return module, random_params(module)


def lora(**options) -> dl.DropLoRA:
    return dl.DropLoRA(**{"rank": 4, "alpha": 8.0, "targets": "paper", **options})


@jax.jit
def apply(model, tokens=TOKENS):
    return model(tokens)


@partial(jax.jit, static_argnums=0)
def applied(module: nn.Module, params):
    """What linen itself computes."""
    return module.apply({"params": params}, TOKENS)


def test_a_model_is_the_same_in_nnx(both):
    module, params = both
    model = linen.to_nnx(module, params, TOKENS)
    back = linen.params_of(model)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert ours is theirs
    expected = applied(module, params)
    np.testing.assert_array_equal(apply(model), expected)


def test_injecting_changes_no_output_and_merging_gives_plain_parameters(both):
    module, params = both
    model = linen.to_nnx(module, params, TOKENS)
    injected = dl.inject(model, lora(), key=KEY)
    before = snapshot(model)
    assert relative(apply(injected), apply(model)) < 1e-6
    assert_unchanged(model, before)

    injected = randomized(injected)
    with pytest.raises(dl.InputError, match=r"has an adapter: merge\(model\) first"):
        linen.params_of(injected)
    merged = linen.params_of(dl.merge(injected))
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    expected = applied(module, merged)
    assert relative(apply(injected), expected) < 1e-5
    assert relative(apply(model), expected) > 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("list", {}),
        ("scan", {"granularity": "step", "sampler": "exact"}),
        ("scan, remat", {"granularity": "sequence"}),
        ("scan", {"alpha_pattern": {r"layers\.1\.": 2}, "exclude": (r"layers\.1\.q_proj",)}),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_same_model_in_nnx(name, options):
    module = MODELS[name]
    params = random_params(module)
    config = lora(**options)
    theirs = dl.inject(nnx_model(params), config, key=KEY)
    ours = dl.inject(linen.to_nnx(module, params, TOKENS), config, key=KEY)
    ours, theirs = (with_b(model) for model in (ours, theirs))

    def loss(model):
        return jnp.mean(dl.masked(model, KEY, rows=ROWS)(TOKENS) ** 2)

    run = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    (value, gradients), (expected, expected_gradients) = run(ours), run(theirs)
    assert relative(value, expected) < 1e-6
    gradients, expected_gradients = by_layer(gradients), by_layer(expected_gradients)
    assert expected_gradients.keys() <= gradients.keys()
    for path, gradient in expected_gradients.items():
        assert relative(gradients[path], gradient) < 1e-5, path


def nnx_model(params) -> Nnx:
    """The nnx model with a linen model's parameters, whose layers may be stacked."""
    model = random_module(lambda: Nnx(nnx.Rngs(0)))
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = params
        if "layers" in params:
            for name in (name for name in path if not isinstance(name, int)):
                value = value[name]
            value = jnp.asarray(np.asarray(value)[path[1]]) if path[0] == "layers" else value
        else:
            names = (f"layers_{path[1]}", *path[2:]) if path[0] == "layers" else path
            for name in names:
                value = value[name]
        parameter.set_value(value)
    return model


def with_b(model):
    """Another B than zero, the same for a layer of a stack as for one of a list."""

    def fill(path, parameter):
        value = parameter.get_value()
        if path[-1] != "lora_b":
            return parameter
        stacked = path[0] == "layers" and not isinstance(path[1], int)
        shape = value.shape[1:] if stacked else value.shape
        rank, *out = shape
        wave = np.sin(7 * np.arange(rank)[:, None] + np.arange(np.prod(out))).reshape(shape)
        return parameter.replace(jnp.asarray(np.broadcast_to(wave, value.shape), jnp.float32))

    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, nnx.map_state(fill, adapters), rest)


def by_layer(state) -> dict:
    """Factors by module and layer, whether the layers are stacked or in a list."""
    layers = {}
    for path, value in nnx.to_flat_state(state):
        value = np.asarray(value[...])
        if path[0] == "layers" and not isinstance(path[1], int):
            layers |= {("layers", i, *path[1:]): layer for i, layer in enumerate(value)}
        else:
            layers[path] = value
    return layers


def test_masks_and_first_values_are_those_of_the_same_model_in_nnx(both):
    module, params = both
    theirs = dl.masked(dl.inject(nnx_model(params), lora(), key=KEY), KEY, rows=ROWS)
    ours = dl.inject(linen.to_nnx(module, params, TOKENS), lora(), key=KEY)
    ours = dl.masked(ours, KEY, rows=ROWS)
    for path, adapter in adapters_of(theirs).items():
        adapters = adapters_of(ours)
        if path in adapters:
            a, keys = adapters[path].lora_a[...], adapters[path].mask_key[...]
        else:
            _, index, name = path.split(".")
            stacked = adapters[f"layers.{name}"]
            a, keys = stacked.lora_a[int(index)], stacked.mask_key[int(index)]
        np.testing.assert_array_equal(a, adapter.lora_a[...])
        np.testing.assert_array_equal(raw(keys), raw(adapter.mask_key[...]))


def test_a_training_loop_draws_other_masks_every_step_and_evaluates_without():
    module = MODELS["scan, remat"]
    params = random_params(module)
    model = randomized(dl.inject(linen.to_nnx(module, params, TOKENS), lora(), key=KEY))
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, key):
        def loss(model):
            return jnp.mean(dl.masked(model, key, rows=ROWS)(TOKENS) ** 2)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    evaluation = apply(model)
    losses = [step(model, optimizer, jax.random.fold_in(KEY, n)) for n in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    np.testing.assert_array_equal(apply(model), evaluation)
    drawn = primitives(jax.make_jaxpr(lambda m: m(TOKENS))(model)) & RANDOM
    assert drawn == set()
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    "config",
    [
        dl.DoRA(rank=4, train_whole=("norm.*scale$",)),
        dl.DropLoRA(rank=4, init="pissa"),
        Learned(rank=4),
    ],
    ids=lambda config: config.kind,
)
def test_other_kinds_and_what_is_trained_whole(config):
    module = MODELS["scan"]
    params = random_params(module)
    model = randomized(dl.inject(linen.to_nnx(module, params, TOKENS), config, key=KEY))
    merged = linen.params_of(dl.merge(model))
    assert relative(apply(model), applied(module, merged)) < 1e-5


def test_what_apply_takes_is_passed_on():
    module = Listed()
    params = random_params(module)
    model = dl.inject(linen.to_nnx(module, params, TOKENS), lora(), key=KEY)
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(1)}}
    expected = module.apply({"params": params}, TOKENS, **options)
    assert relative(model(TOKENS, **options), expected) < 1e-6
    assert relative(model(TOKENS), expected) > 1e-3


def test_layers_that_are_stacked_along_another_axis_are_refused():
    module = Stacked(axis=1)
    with pytest.raises(dl.InputError, match=r"layers\.\w+ is .*, stacked .*along the first axis"):
        linen.to_nnx(module, random_params(module), TOKENS)


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral(4, batch_dims=(0,), name="batched")(x)
        x = nn.Dense(4, name="plain")(x)
        return nn.Einsum((4, 4), use_bias=False, name="told")(x, "...i,io->...o")


def test_a_layer_that_cannot_be_adapted_says_so_when_it_is_a_target():
    x = jnp.ones((2, 4))
    model = linen.to_nnx(Odd(), Odd().init(jax.random.key(0), x)["params"], x)
    for target, message in {"batched": "batch_dims", "told": "einsum_str"}.items():
        with pytest.raises(dl.InputError, match=message):
            dl.inject(model, lora(targets=target), key=KEY)
    assert set(adapters_of(dl.inject(model, lora(targets="plain"), key=KEY))) == {"plain"}
    with pytest.raises(dl.InputError, match="by the model alone"):
        model.plain(x)


class Named(nn.Module):
    name_of_one: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name=self.name_of_one)(x)


@pytest.mark.parametrize("name", ["linen_module", "a-b", "train"])
def test_a_name_that_no_attribute_can_have(name):
    x = jnp.ones((2, 4))
    module = Named(name)
    with pytest.raises(dl.InputError, match=f"'{name}' in linen's params"):
        linen.to_nnx(module, module.init(jax.random.key(0), x)["params"], x)


def test_boxes_of_metadata_are_taken_off():
    init = nn.with_partitioning(nn.initializers.ones, (None, "tensor"))

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, kernel_init=init, name="q_proj")(x)

    x = jnp.ones((2, 4))
    params = Boxed().init(jax.random.key(0), x)["params"]
    model = randomized(dl.inject(linen.to_nnx(Boxed(), params, x), lora(), key=KEY))
    assert relative(model(x), dl.merge(model)(x)) < 1e-5
