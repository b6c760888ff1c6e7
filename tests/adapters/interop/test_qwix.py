"""Qwix's LoRA with this project's masks in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from oracles import randomized, raw, relative
from tunix_fixtures import KEY, MODELS, TARGETS, TOKENS, B, inputs, logits, tunix_model

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of

qwix = pytest.importorskip("qwix")
pytest.importorskip("tunix")

from droplora_jax.adapters.interop.qwix import DropLoraProvider, DropLoraRule
from droplora_jax.nn.mask_keys import MaskKey

ROWS = jnp.arange(B)
RULE = {"module_path": f".*{TARGETS}", "rank": 4, "alpha": 8.0}


def adapted(model: nnx.Module, provider) -> nnx.Module:
    """The model with factors that are not zero, the same for every provider."""
    given = {**inputs(TOKENS), "cache": None}
    return randomized(qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **given))


def masked(model: nnx.Module, step: int = 0) -> nnx.Module:
    return dl.masked(model, jax.random.fold_in(KEY, step), rows=ROWS)


@pytest.mark.parametrize("name", MODELS)
def test_without_a_mask_it_is_qwix_own_lora(name):
    model = tunix_model(name)
    ours = adapted(model, DropLoraProvider(**RULE))
    theirs = adapted(model, qwix.LoraProvider(**RULE))
    factors, expected = (nnx.to_flat_state(nnx.state(m, nnx.LoRAParam)) for m in (ours, theirs))
    assert [(path, v.shape) for path, v in factors] == [(path, v.shape) for path, v in expected]
    assert relative(logits(ours), logits(theirs)) < 1e-6
    zero = adapted(model, DropLoraProvider(**RULE, drop_rate=0.0))
    assert relative(logits(masked(zero)), logits(theirs)) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_masks_change_from_step_to_step_and_evaluation_has_none(name):
    model = adapted(tunix_model(name), DropLoraProvider(**RULE))
    evaluation = logits(model)
    steps = [logits(masked(model, step)) for step in (0, 1, 0)]
    np.testing.assert_array_equal(steps[0], steps[2])
    assert relative(steps[0], steps[1]) > 1e-3
    assert relative(steps[0], evaluation) > 1e-3
    np.testing.assert_array_equal(logits(model), evaluation)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "sequence", "rescale": False},
        {"granularity": "step", "sampler": "exact"},
    ],
    ids=str,
)
def test_the_masked_model_is_the_one_of_these_adapters(options):
    """The same factors and key: the same logits and gradients as with `inject`."""
    model = tunix_model("llama3")
    theirs = adapted(model, DropLoraProvider(**RULE, **options))
    ours = dl.inject(model, dl.DropLoRA(rank=4, alpha=8, targets=TARGETS, **options), key=KEY)
    modules = {".".join(map(str, path)): node for path, node in nnx.iter_graph(theirs)}
    for path, adapter in adapters_of(ours).items():
        for letter in "ab":
            factor = getattr(adapter, f"lora_{letter}")
            other = getattr(modules[path], f"{adapter.spec.attribute}_lora_{letter}")
            factor.set_value(other[...].reshape(factor.shape))

    def loss(model):
        return jnp.mean(masked(model)(cache=None, **inputs(TOKENS))[0] ** 2)

    run = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    (value, gradients), (expected, expected_gradients) = run(ours), run(theirs)
    assert relative(value, expected) < 1e-6
    assert abs(value - jnp.mean(logits(ours) ** 2)) > 1e-3 * value
    expected_by_path = dict(nnx.to_flat_state(expected_gradients))
    flat = nnx.to_flat_state(gradients)
    assert len(flat) == len(expected_by_path)
    for (*path, name), gradient in flat:
        kernel = adapters_of(ours)[".".join(map(str, path))].spec.attribute
        other = expected_by_path[*path, f"{kernel}_{name}"][...]
        assert relative(gradient[...], other.reshape(gradient.shape)) < 1e-5, path


def test_a_quantised_base():
    rule = {**RULE, "weight_qtype": jnp.int8}
    model = tunix_model("llama3")
    ours = adapted(model, DropLoraProvider(**rule))
    theirs = adapted(model, qwix.LoraProvider(**rule))
    assert relative(logits(ours), logits(theirs)) < 1e-6
    assert relative(logits(ours), logits(adapted(model, DropLoraProvider(**RULE)))) > 1e-6
    assert relative(logits(masked(ours)), logits(ours)) > 1e-3


def test_rules_of_both_kinds():
    rules = [
        DropLoraRule(module_path=".*[qk]_proj", rank=4, alpha=8.0),
        qwix.LoraRule(module_path=".*up_proj", rank=4, alpha=8.0),
    ]
    model = adapted(tunix_model("qwen3, remat"), DropLoraProvider(rules))
    keys = {path[-2] for path, _ in nnx.to_flat_state(nnx.state(model, MaskKey))}
    factors = {path[-2] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    assert keys == {"q_proj", "k_proj"}
    assert factors == keys | {"up_proj"}
    assert relative(logits(masked(model)), logits(model)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 1.0}, r"drop_rate=1\.0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 1, "sampler": "exact"}, "keeps no rank"),
        ({"dropout": 0.1}, r"dropout=0\.1 would stay on"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(dl.InputError, match=message):
        DropLoraRule(**{**RULE, **options})


def test_a_wrong_number_of_rows_is_an_error():
    model = adapted(tunix_model("llama3"), DropLoraProvider(**RULE))
    model = dl.masked(model, KEY, rows=jnp.arange(B + 1))
    with pytest.raises(dl.InputError, match=rf"{B + 1} rows.*sees {B}"):
        logits(model)


class Twice(nnx.Module):
    def __init__(self):
        self.first, self.second = (nnx.Param(jnp.eye(4)) for _ in range(2))

    def __call__(self, x):
        return jnp.dot(jnp.dot(x, self.first[...]), self.second[...])


def test_kernels_of_one_module_have_masks_of_their_own():
    provider = DropLoraProvider(module_path=".*", rank=2, alpha=2.0)
    x = jnp.ones((B, 4))
    model = randomized(qwix.apply_lora_to_model(Twice(), provider, x, rngs=nnx.Rngs(0)))
    keys = nnx.to_flat_state(nnx.state(masked(model), MaskKey))
    assert {path[-1] for path, _ in keys} == {"mask_key", "second_mask_key"}
    first, second = (raw(value.get_value()) for _, value in keys)
    assert not np.any(first == second)
    assert relative(masked(model)(x), model(x)) > 1e-3


class Experts(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 4, 5)))

    def __call__(self, x):
        return jnp.einsum("bei,eio->beo", x, self.kernel[...])


def test_a_layer_that_has_to_be_left_to_another_rule():
    provider = DropLoraProvider(module_path=".*", rank=2, alpha=2.0)
    with pytest.raises(dl.InputError, match="no axis of the kernel; leave the layer"):
        qwix.apply_lora_to_model(Experts(), provider, jnp.ones((2, 3, 4)), rngs=nnx.Rngs(0))


def test_linen_models_have_a_way_of_their_own():
    provider = DropLoraProvider(module_path=".*", rank=2, alpha=2.0)
    model = qwix.apply_lora_to_model(nn.Dense(4), provider)
    with pytest.raises(dl.InputError, match=r"droplora_jax\.linen"):
        model.init(jax.random.key(0), jnp.ones((2, 4)))
