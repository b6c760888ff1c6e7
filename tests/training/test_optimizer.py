"""Schedules at their corners, any optimizer of optax by name, and the update that PyTorch makes."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from oracles import relative

from droplora_jax.core.errors import InputError
from droplora_jax.training.config import OptimConfig
from droplora_jax.training.optimizer import build, learning_rate, optimizer

COMMON = {"adamw", "adam", "lion", "sgd", "adafactor", "lamb", "rmsprop", "radam"}


def rates(steps: int, **options) -> np.ndarray:
    schedule = learning_rate(OptimConfig(learning_rate=0.5, **options), steps)
    return np.array([float(schedule(n)) for n in range(steps)])


def test_linear_rises_over_the_warm_up_and_falls_to_zero_behind_the_last_step():
    expected = [0.0, 0.125, 0.25, 0.375, 0.5, 0.4, 0.3, 0.2, 0.1]
    np.testing.assert_allclose(rates(9, schedule="linear", warmup_steps=4), expected, rtol=1e-6)


def test_cosine_is_half_way_down_in_the_middle():
    actual = rates(9, schedule="cosine", warmup_steps=1)
    falling = 0.25 * (1 + np.cos(np.pi * np.arange(8) / 8))
    assert relative(actual, [0.0, *falling]) < 1e-6


def test_constant_stays():
    actual = rates(5, schedule="constant", warmup_steps=2)
    np.testing.assert_allclose(actual, [0.0, 0.25, 0.5, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_without_a_warm_up_the_first_step_has_the_full_rate(schedule):
    assert rates(4, schedule=schedule, warmup_steps=0)[0] == 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_warm_up_may_end_at_the_last_step(schedule):
    np.testing.assert_allclose(rates(4, schedule=schedule, warmup_steps=3)[-1], 0.5, rtol=1e-6)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 10), (100, 8), (1, 1)])
def test_a_warm_up_that_never_ends_is_an_error(warmup, steps):
    with pytest.raises(InputError, match=rf"warmup_steps={warmup}: .* {steps} steps"):
        learning_rate(OptimConfig(warmup_steps=warmup), steps)


def test_the_update_is_pytorch_s():
    random = np.random.default_rng(0)
    start = {"a": 0.1 * random.normal(size=(5, 3)), "b": 0.1 * random.normal(size=4)}
    parameters = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start.items()}
    other = torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.1)
    config = OptimConfig(schedule="constant", learning_rate=0.01, warmup_steps=0, clip_norm=None)
    tx = optimizer(config, learning_rate(config, 10))
    state = tx.init(parameters)
    for _ in range(5):
        gradients = {n: random.normal(size=v.shape).astype(np.float32) for n, v in start.items()}
        updates, state = tx.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        for name, gradient in gradients.items():
            theirs[name].grad = torch.tensor(gradient).double()
        other.step()
    for name, value in start.items():
        moved = np.asarray(parameters[name]) - value
        assert relative(moved, theirs[name].detach().numpy() - value) < 1e-5


def test_clipping_scales_the_whole_gradient_down_to_its_norm():
    config = OptimConfig(name="sgd", learning_rate=1.0, weight_decay=0.0, clip_norm=0.5)
    tx = optimizer(config, lambda count: 1.0)
    for gradient, expected in [([3.0, 4.0], [-0.3, -0.4]), ([0.03, 0.04], [-0.03, -0.04])]:
        updates, _ = tx.update(jnp.array(gradient), tx.init(jnp.zeros(2)), jnp.zeros(2))
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


def named_by_optax() -> list[str]:
    """The optimizers of optax, found without this package: functions that take a rate."""
    return sorted(
        name
        for name in dir(optax)
        if inspect.isfunction(make := getattr(optax, name))
        and "learning_rate" in inspect.signature(make).parameters
    )


def refused(**values) -> str:
    """Why an optimizer is not built; empty if it is."""
    try:
        build(OptimConfig(**values), 200)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", named_by_optax())
def test_an_optimizer_of_optax_works_or_is_refused(name):
    """Some need more than a gradient, or no schedule: that is told before a model is loaded."""
    takes_decay = "weight_decay" in inspect.signature(getattr(optax, name)).parameters
    values = {"name": name, "learning_rate": 0.1, "weight_decay": 0.01 * takes_decay}
    refusal = refused(**values)
    if refusal:
        assert f"name={name!r}" in refusal
        assert name not in COMMON
        return
    tx = build(OptimConfig(**values), 200).tx

    @jax.jit
    def second_update(parameters):
        state = tx.init(parameters)
        for _ in range(2):
            updates, state = tx.update(0.5 * parameters, state, parameters)
        return updates

    updates = second_update(np.ones((4, 4), np.float32))
    assert np.all(np.isfinite(updates))
    assert np.any(np.asarray(updates) != 0)


def test_the_common_ones_are_there():
    assert set(named_by_optax()) >= COMMON


def test_no_private_name_is_proposed():
    assert " _" not in refused(name="no_such_thing")


def test_options_reach_the_optimizer():
    def first_update(**options):
        config = OptimConfig(name="sgd", weight_decay=0.0, clip_norm=None, options=options)
        tx = optimizer(config, lambda count: 1.0)
        state = tx.init(jnp.zeros(2))
        for _ in range(2):
            updates, state = tx.update(jnp.ones(2), state, jnp.zeros(2))
        return np.asarray(updates)

    np.testing.assert_allclose(first_update(), [-1, -1])
    np.testing.assert_allclose(first_update(momentum=0.5), [-1.5, -1.5])


def test_weight_decay_may_be_an_option_too():
    config = OptimConfig(options={"weight_decay": 0.0}, clip_norm=None)
    tx = optimizer(config, lambda count: 1.0)
    updates, _ = tx.update(jnp.zeros(2), tx.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_array_equal(updates, [0, 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adamv"}, r"name='adamv': .*adamw"),
        ({"name": "chain"}, r"name='chain': optax has no such optimizer"),
        ({"name": "no_such_thing"}, r"name='no_such_thing'"),
        ({"name": "sgd"}, r"weight_decay=0\.1: optax\.sgd has no weight decay.*: 0"),
        ({"options": {"beta": 0.9}}, r"options\.beta: optax\.adamw .*b1, b2"),
        ({"options": {"learning_rate": 0.9}}, r"options\.learning_rate"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: must be positive"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0: must be positive"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan"),
        ({"learning_rate": float("inf")}, r"learning_rate=inf"),
        ({"warmup_steps": -1}, r"warmup_steps=-1: must not be negative"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"weight_decay": float("nan")}, r"weight_decay=nan"),
        ({"clip_norm": 0.0}, r"clip_norm=0\.0: must be positive, or null"),
        ({"clip_norm": float("nan")}, r"clip_norm=nan"),
    ],
)
def test_a_configuration_that_can_not_be(values, message):
    with pytest.raises(InputError, match=message):
        build(OptimConfig(**values), 200)


def test_every_wrong_value_is_named_at_once():
    with pytest.raises(InputError) as error:
        OptimConfig(learning_rate=-1.0, warmup_steps=-1, no_decay=("(", "x"), clip_norm=0.0)
    fields = [problem.partition("=")[0] for problem in error.value.problems]
    assert fields == ["learning_rate", "warmup_steps", "no_decay", "clip_norm"]


def test_an_unknown_name_comes_with_the_nearest():
    assert "did you mean adafactor?" in refused(name="adafactr")


# LoRA+, and what is not decayed.


def trained_tree():
    random = np.random.default_rng(1)
    shapes = {"lora_a": (6, 3), "lora_b": (3, 4), "magnitude": (4,)}
    return {
        "layers": {
            "q_proj": {
                name: jnp.asarray(0.1 * random.normal(size=shape), jnp.float32)
                for name, shape in shapes.items()
            }
        }
    }


def after_updates(config, parameters, steps=4):
    tx = optimizer(config, learning_rate(config, 10))
    state = tx.init(parameters)
    random = np.random.default_rng(2)
    for _ in range(steps):
        gradients = {
            "layers": {
                "q_proj": {
                    name: jnp.asarray(random.normal(size=value.shape), jnp.float32)
                    for name, value in parameters["layers"]["q_proj"].items()
                }
            }
        }
        updates, state = tx.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters["layers"]["q_proj"]


def test_a_larger_rate_for_b_is_pytorch_s_with_a_group_of_its_own():
    """As PEFT's LoRA+ makes its groups; `magnitude` is not decayed."""
    start = trained_tree()
    config = OptimConfig(
        schedule="constant",
        learning_rate=0.01,
        warmup_steps=0,
        clip_norm=None,
        b_ratio=16.0,
        no_decay=("magnitude",),
    )
    ours = after_updates(config, start)
    theirs = {
        name: torch.nn.Parameter(torch.tensor(np.asarray(value)))
        for name, value in start["layers"]["q_proj"].items()
    }
    other = torch.optim.AdamW(
        [
            {"params": [theirs["lora_a"]]},
            {"params": [theirs["lora_b"]], "lr": 0.16},
            {"params": [theirs["magnitude"]], "weight_decay": 0.0},
        ],
        lr=0.01,
        weight_decay=0.1,
    )
    random = np.random.default_rng(2)
    for _ in range(4):
        for value in theirs.values():
            value.grad = torch.tensor(random.normal(size=value.shape).astype(np.float32))
        other.step()
    for name, value in theirs.items():
        before = np.asarray(start["layers"]["q_proj"][name])
        moved = np.asarray(ours[name]) - before
        assert relative(moved, value.detach().numpy() - before) < 1e-5, name


def test_what_is_decayed_is_looked_for():
    config = OptimConfig(no_decay=("magnitud$",))
    with pytest.raises(InputError, match=r"no_decay='magnitud\$' matches nothing.* layers\.q_proj"):
        optimizer(config, lambda count: 1.0).init(trained_tree())
    with pytest.raises(InputError, match=r"no_decay='\(': not a regular expression"):
        OptimConfig(no_decay=("(",))
    with pytest.raises(InputError, match="optax.adam has no mask of what it decays"):
        build(OptimConfig(name="adam", weight_decay=0.0, no_decay=("x",)), 200)
    with pytest.raises(InputError, match=r"b_ratio=0\.0: must be positive"):
        OptimConfig(b_ratio=0.0)
