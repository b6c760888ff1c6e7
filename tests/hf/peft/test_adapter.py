"""The adapter contract: a layer as an einsum, where the factors lie, and what the options allow."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import primitives, relative

from droplora_jax import DoRA, DropLoRA, InputError, LinearSpec, linear_spec
from droplora_jax.adapters import ADAPTERS
from droplora_jax.adapters.base import Adapter
from droplora_jax.adapters.fully_trained import wholes_of
from droplora_jax.adapters.layout import factor_shapes, factor_shardings
from droplora_jax.adapters.surgery import draw, inject, merge, split
from droplora_jax.core import prng
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.lowrank import rank_mask
from droplora_jax.nn.layer_paths import dotted, layer_names, select
from droplora_jax.nn.linear_spec import is_linear

KEY = prng.root_key(0)

# A kernel's sharding, and what A [I, R] and B [R, O] are to have on a mesh 2 x 2 x 2.
FACTOR_SHARDINGS = [
    # q, k, v, gate, up: input on fsdp, output on tensor; B takes fsdp on its long dimension too.
    (P("fsdp", "tensor"), P("fsdp", None), P(None, ("tensor", "fsdp"))),
    # o, down: the other way round, and A takes it.
    (P("tensor", "fsdp"), P(("tensor", "fsdp"), None), P(None, "fsdp")),
    (P(None, "tensor"), P("fsdp", None), P(None, ("tensor", "fsdp"))),
    (P(), P("fsdp", None), P(None, "fsdp")),
]


@pytest.mark.parametrize(("kernel_spec", "a_spec", "b_spec"), FACTOR_SHARDINGS)
@pytest.mark.parametrize("stacked", [False, True])
def test_factors_lie_as_the_kernel_does_and_none_is_replicated(
    kernel_spec, a_spec, b_spec, stacked
):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    front: tuple[int, ...] = (3,) if stacked else ()
    lead = (None,) if stacked else ()
    kernel = jax.device_put(
        jnp.zeros((*front, 16, 32)), NamedSharding(mesh, P(*lead, *kernel_spec))
    )
    layer = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(kernel)
    adapter = DropLoRA(rank=4).adapt(layer, linear_spec(layer), ("q_proj",), KEY)
    for factor, spec in [(adapter.lora_a, a_spec), (adapter.lora_b, b_spec)]:
        value = factor.get_value()
        expected = NamedSharding(mesh, P(*lead, *spec))
        assert value.sharding.is_equivalent_to(expected, value.ndim), value.sharding
    assert adapter.lora_a.get_value().shape == (*front, 16, 4)
    assert adapter.lora_b.get_value().shape == (*front, 4, 32)


def test_a_dimension_that_fsdp_does_not_divide_is_left_alone():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    kernel = jax.device_put(jnp.zeros((16, 12)), NamedSharding(mesh, P("fsdp", None)))
    spec = LinearSpec("...i", "io", "...o")
    a, b = factor_shardings(kernel, spec)
    assert a.is_equivalent_to(NamedSharding(mesh, P("fsdp", None)), 2)
    assert b.is_equivalent_to(NamedSharding(mesh, P()), 2)


def test_factors_of_kernels_with_several_dimensions():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = NamedSharding(mesh, P(None, "fsdp", "tensor", None))
    kernel = jax.device_put(jnp.zeros((3, 16, 4, 8)), layout)
    spec = LinearSpec("...i", "inh", "...nh")  # stacked once
    a, b = factor_shardings(kernel, spec)
    assert factor_shapes(kernel, spec, 5) == ((3, 16, 5), (3, 5, 4, 8))
    assert a.is_equivalent_to(NamedSharding(mesh, P(None, "fsdp", None)), 3)
    assert b.is_equivalent_to(NamedSharding(mesh, P(None, None, "tensor", "fsdp")), 4)


def test_no_mesh_no_sharding():
    assert factor_shardings(jnp.zeros((4, 4)), LinearSpec("...i", "io", "...o")) == (None, None)


SPECS = [
    (LinearSpec("...i", "io", "...o"), (2, 3, 5), (5, 4)),
    (LinearSpec("...ab", "abcd", "...cd"), (2, 3, 4), (3, 4, 2, 5)),
    (LinearSpec("bti", "io", "bto"), (2, 3, 5), (5, 4)),
    (LinearSpec("bei", "eio", "beo"), (2, 3, 5), (3, 5, 4)),
    (LinearSpec("btr", "ro", "bto"), (2, 3, 5), (5, 4)),  # "r" is taken
    (LinearSpec("BTD", "SNDH", "SBTNH"), (2, 3, 5), (3, 4, 5, 2)),  # q, k, v in one, in front
    (LinearSpec("btd", "nhd", "btnh"), (2, 3, 5), (4, 2, 5)),  # contracted letter last
]


@pytest.mark.parametrize(("spec", "x_shape", "kernel_shape"), SPECS)
def test_two_products_of_the_factors_equal_one_with_their_product(spec, x_shape, kernel_shape):
    """x (A B) = (x A) B, for every way of writing a linear layer."""
    rng = np.random.default_rng(0)
    rank = 3
    a_shape, b_shape = factor_shapes(jnp.zeros(kernel_shape), spec, rank)
    assert np.prod(a_shape) / rank * np.prod(b_shape) / rank == np.prod(kernel_shape) * np.prod(
        [n for c, n in zip(spec.kernel, kernel_shape, strict=True) if c in spec.batched]
    )
    x, a, b = (rng.normal(size=shape) for shape in (x_shape, a_shape, b_shape))
    kernel = np.einsum(spec.product, a, b)
    assert kernel.shape == kernel_shape
    hidden = np.einsum(spec.down, x, a)
    assert hidden.shape[-1] == rank
    expected = np.einsum(f"{spec.inputs},{spec.kernel}->{spec.outputs}", x, kernel)
    assert relative(np.einsum(spec.up, hidden, b), expected) < 1e-12


def test_what_is_not_linear_has_no_spec():
    for layer in [nnx.Embed(4, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)), object()]:
        assert not is_linear(layer)
        with pytest.raises(InputError, match="is no linear layer"):
            linear_spec(layer)
    assert is_linear(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))


class Shaped(nnx.Module):
    """What Tunix's Einsum is, in a few lines."""

    def __init__(self):
        self.einsum_str, self.shape = "BTD,DNH->BTNH", (4, 2, 3)
        self.w = nnx.Param(jnp.ones(self.shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


def test_layers_of_other_libraries_are_known_by_the_names_of_their_classes():
    assert not is_linear(Shaped())
    namespace = {"__module__": "tunix.models.llama3.model", "__qualname__": "Einsum"}
    theirs = type("Einsum", (Shaped,), namespace)
    own = type("Own", (theirs,), {})
    for layer in (theirs(), own()):
        assert linear_spec(layer) == LinearSpec("BTD", "DNH", "BTNH", attribute="w")
    theirs.w_scale = 2.0
    with pytest.raises(InputError, match="scaled as it is read"):
        linear_spec(own())


def test_what_a_layer_is_asked_beside_being_called_is_answered_by_the_base():
    adapter = DropLoRA(rank=2).adapt(
        layer := Shaped(), LinearSpec("BTD", "DNH", "BTNH", attribute="w"), ("q_proj",), KEY
    )
    assert adapter.shape is layer.shape
    assert adapter.base_kernel is layer.w
    with pytest.raises(AttributeError, match="'w' of a Shaped with an adapter: call the layer"):
        _ = adapter.w
    with pytest.raises(AttributeError, match="nothing_there"):
        _ = adapter.nothing_there


def adapter_of(features_in: int = 64, features_out: int = 48, **options) -> Adapter:
    layer = nnx.Linear(features_in, features_out, rngs=nnx.Rngs(0))
    return DropLoRA(**options).adapt(layer, linear_spec(layer), ("q_proj",), KEY)


def test_a_starts_as_a_linear_layer_of_pytorch_does_and_b_at_zero():
    a = np.asarray(adapter_of(256, 8, rank=128).lora_a[...])
    theirs = torch.nn.Linear(256, 128).weight.detach().numpy()  # PEFT's lora_A
    assert a.dtype == np.float32
    assert np.abs(a).max() == pytest.approx(np.abs(theirs).max(), rel=2e-3)
    assert a.std() == pytest.approx(theirs.std(), rel=2e-2)
    assert abs(a.mean()) < 5 * a.std() / np.sqrt(a.size)
    assert not np.asarray(adapter_of().lora_b[...]).any()


@pytest.mark.parametrize("rank_pattern", [{}, {"layers.1": 4}])
def test_an_exact_mask_of_a_step_is_a_branch_of_fewer_ranks(rank_pattern):
    """Forward and gradients are the masked branch's, and no product is of the whole rank."""
    config = DropLoRA(rank=10, rank_pattern=rank_pattern, granularity="step", sampler="exact")
    key = jax.random.key(1)
    x, a, b = (
        jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate([(3, 7, 12), (2, 12, 10), (2, 10, 6)])
    )

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stacked(rngs):
        return nnx.Linear(12, 6, use_bias=False, rngs=rngs)

    layer = stacked(nnx.Rngs(0))
    adapter = config.adapt(layer, linear_spec(layer), ("layers", "q_proj"), KEY)
    there = jnp.arange(10) < jnp.asarray([branch.rank for branch in adapter.branches])[:, None]
    a, b = a * there[:, None], b * there[..., None]
    graphdef, factors, keys, rest = split(adapter)
    factors["lora_a"].set_value(a)
    factors["lora_b"].set_value(b)
    keys = draw(keys, prng.root_key(3))
    layers = [jax.tree.map(lambda v, i=i: v[i], (keys, rest)) for i in range(2)]

    def pruned(factors):
        ys = []
        for i, (keys, rest) in enumerate(layers):
            own = jax.tree.map(lambda v, i=i: v[i], factors)
            ys.append(nnx.merge(graphdef, own, keys, rest)(x))
        return jnp.stack(ys)

    def masked(a, b):
        ys = []
        for i, (keys, rest) in enumerate(layers):
            mask = rank_mask(
                keys["mask_key"].get_value(),
                (3, 7, 10),
                drop_rate=0.5,
                granularity="step",
                sampler="exact",
                rescale=True,
                dtype=jnp.float32,
                rank=adapter.branches[i].rank,
            )
            w = rest["base"]["kernel"].get_value()
            ys.append(x @ w + adapter.branches[i].scale * ((x @ a[i]) * mask) @ b[i])
        return jnp.stack(ys)

    y, pullback = jax.vjp(pruned, factors)
    expected, expected_pullback = jax.vjp(masked, a, b)
    assert relative(y, expected) < 1e-5
    assert not np.allclose(expected, x @ layer.kernel[...][:, None])
    (gradients,), (da, db) = pullback(y), expected_pullback(expected)
    assert relative(gradients["lora_a"].get_value(), da) < 1e-5
    assert relative(gradients["lora_b"].get_value(), db) < 1e-5
    program = str(jax.make_jaxpr(pruned)(factors))
    assert "f32[3,7,5]" in program
    assert "f32[3,7,10]" not in program


def test_the_initial_a_depends_on_seed_and_path_only():
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    other = nnx.Linear(8, 8, rngs=nnx.Rngs(5))

    def a(layer, path=("q_proj",), seed=0, **options):
        config = DropLoRA(rank=4, **options)
        adapter = config.adapt(layer, linear_spec(layer), path, prng.root_key(seed))
        return np.asarray(adapter.lora_a[...])

    first = a(layer)
    np.testing.assert_array_equal(first, a(other))
    np.testing.assert_array_equal(first, a(layer, drop_rate=0.0, granularity="step"))
    for different in [a(layer, path=("k_proj",)), a(layer, seed=1)]:
        assert not np.any(first == different)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank=0"),
        ({"alpha": 0.0}, r"alpha=0\.0"),
        ({"alpha": -1.0}, r"alpha=-1\.0"),
        ({"alpha": float("inf")}, r"alpha=inf"),
        ({"alpha": float("nan")}, r"alpha=nan"),
        ({"drop_rate": 1.0}, r"drop_rate=1\.0"),
        ({"drop_rate": -0.1}, r"drop_rate=-0\.1"),
        ({"drop_rate": float("nan")}, r"drop_rate=nan"),
        ({"rank": 2, "drop_rate": 0.9, "sampler": "exact"}, r"drop_rate=0\.9.*no rank of 2"),
    ],
)
def test_impossible_options_name_the_key_and_the_value(options, message):
    with pytest.raises(InputError, match=message):
        DropLoRA(**options)


def test_kinds_are_listed_under_their_own_names():
    for name, kind in ADAPTERS.items():
        assert kind().kind == name
        assert hash(kind()) == hash(kind())


def test_the_branch_computes_in_the_dtype_of_the_layer(strict):
    layer = nnx.Linear(8, 8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapter = DropLoRA(rank=4).adapt(layer, linear_spec(layer), ("q_proj",), KEY)
    assert adapter.lora_a[...].dtype == adapter.lora_b[...].dtype == jnp.float32
    assert adapter(jnp.ones((2, 8), jnp.bfloat16)).dtype == jnp.bfloat16


def test_an_empty_mask_key_draws_nothing():
    adapter = adapter_of(drop_rate=0.5)
    assert adapter.mask_key[...].size == 0
    jaxpr = jax.make_jaxpr(adapter)(jnp.ones((2, 3, 64)))
    assert not any("random" in name or "threefry" in name for name in primitives(jaxpr))


# Options by layer.

STACK = {path: (3,) for path in [("layers", "q_proj"), ("layers", "up_proj")]} | {("head",): ()}


@pytest.mark.parametrize(
    ("targets", "exclude", "chosen"),
    [
        (("q_proj",), (), {"layers.q_proj": (True,) * 3}),
        (("all-linear",), ("head",), {"layers.q_proj": (True,) * 3, "layers.up_proj": (True,) * 3}),
        ((r"layers\.[02]\.q", "head"), (), {"layers.q_proj": (True, False, True), "head": (True,)}),
        (
            ("paper",),
            (r"\.1\.",),
            {p: (True, False, True) for p in ("layers.q_proj", "layers.up_proj")},
        ),
    ],
)
def test_targets_of_some_layers_of_a_stack(targets, exclude, chosen):
    found = select(STACK, targets, exclude)
    assert {dotted(path): layers for path, layers in found.items()} == chosen


@pytest.mark.parametrize(("targets", "exclude"), [(("x",), ()), (("q_proj",), (r"\.3\.",))])
def test_patterns_that_match_nothing(targets, exclude):
    with pytest.raises(InputError, match=r"matches no module; linear modules are layers\.q_proj"):
        select(STACK, targets, exclude)


def test_ranks_and_scales_by_pattern():
    config = DropLoRA(
        rank=8,
        alpha=16,
        rank_pattern={r"\.1\.q_proj": 2, "q_proj": 4},
        alpha_pattern={r"layers\.2": 1},
        rank_stabilized=True,
    )
    names = layer_names(("layers", "q_proj"), (3,))
    branches = config.branches(names, (True, True, False))
    assert [(b.rank, b.alpha) for b in branches] == [(4, 16), (2, 16), (0, 1)]
    assert [b.scale for b in branches] == [8, 16 / 2**0.5, 0]
    assert config.branches(layer_names(("head",), ())) == ((8, 16, 16 / 8**0.5, 0.5),)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\.q=0: must be at least 1"),
        ({"alpha_pattern": {"q": -1.0}}, r"alpha_pattern\.q=-1\.0: must be a positive"),
        ({"rank_pattern": {"q": 1}, "sampler": "exact"}, "keeps no rank of 1"),
    ],
)
def test_impossible_patterns(options, message):
    with pytest.raises(InputError, match=message):
        DropLoRA(**options)


# DoRA.


@pytest.mark.parametrize("masked", [False, True])
def test_dora_and_its_gradients_equal_pytorch(masked, strict):
    """The branch is masked, the norm is that of the kernel without a mask, and a constant."""
    rng = np.random.default_rng(0)
    layer = nnx.Linear(12, 10, rngs=nnx.Rngs(0))
    config = DoRA(rank=4, alpha=6, granularity="step")
    adapter = config.adapt(layer, linear_spec(layer), ("q_proj",), KEY)
    x = jnp.asarray(rng.standard_normal((3, 5, 12), np.float32))
    np.testing.assert_allclose(adapter(x), layer(x), rtol=1e-6, atol=1e-6)  # unchanged at first
    layer.bias.set_value(jnp.asarray(rng.standard_normal(10, np.float32)))
    for name in ("lora_a", "lora_b", "magnitude"):
        parameter = getattr(adapter, name)
        setattr(
            adapter,
            name,
            parameter.replace(jnp.asarray(rng.standard_normal(parameter.shape, np.float32))),
        )
    if masked:
        key = adapter.mask_key
        adapter.mask_key = key.replace(jax.random.split(KEY, 1))
    mask = np.ones(4, np.float32) if not masked else np.asarray(adapter.mask(jnp.ones((3, 5, 4))))
    assert masked == (mask == 0).any()
    graphdef, factors, rest = nnx.split(adapter, nnx.LoRAParam, ...)
    gradients = jax.grad(lambda f: jnp.sum(nnx.merge(graphdef, f, rest)(x) ** 2))(factors)

    w, bias, a, b, m = (
        torch.tensor(np.asarray(value), requires_grad=i > 1)
        for i, value in enumerate(
            [
                layer.kernel[...],
                layer.bias[...],
                *(factors[n][...] for n in ("lora_a", "lora_b", "magnitude")),
            ]
        )
    )
    norm = torch.linalg.norm(w + 1.5 * a @ b, dim=0).detach()
    h = torch.tensor(np.asarray(x)) @ a * torch.tensor(mask.reshape(-1)[-4:])
    y = m / norm * (torch.tensor(np.asarray(x)) @ w + 1.5 * h @ b) + bias
    (y**2).sum().backward()
    assert relative(adapter(x), y.detach().numpy()) < 1e-5
    for name, theirs in {"lora_a": a, "lora_b": b, "magnitude": m}.items():
        assert relative(gradients[name][...], theirs.grad.numpy()) < 1e-5
    if not masked:
        assert relative(adapter.merged()(x), y.detach().numpy()) < 1e-5


# Parameters that are trained whole.


def test_what_can_be_trained_whole():
    class Net(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.parts = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(1))])

    net = Net()
    config = DropLoRA(rank=2, targets="^a$", train_whole=("bias", r"parts\.0"))
    model = inject(net, config, key=KEY)
    paths = {dotted(path) for path in wholes_of(model)}
    assert paths == {"a.base.bias", "parts.0.kernel", "parts.0.bias"}
    _, trained, _, _ = split(model)
    assert len(jax.tree.leaves(trained)) == 3 + 2
    assert not wholes_of(net)
    assert nnx.graphdef(merge(model)) == nnx.graphdef(net)
    for pattern, message in {
        "x": "train_whole='x' matches no parameter; there are .*a.bias",
        "a": r"train_whole='a' matches a\.kernel, which has an adapter",
    }.items():
        with pytest.raises(InputError, match=message):
            inject(net, DropLoRA(targets="^a$", train_whole=(pattern,)), key=KEY)
