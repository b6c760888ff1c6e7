"""The contract of all kinds of adapter, with every way to start and to prune."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from contract import (
    ROOT,
    STEPS,
    TOKENS,
    Stack,
    Training,
    assert_merge_is_evaluation,
    both_outputs,
    logits,
    output,
    pairs,
    small_step,
)
from flax import nnx
from oracles import assert_unchanged, relative, snapshot, torch_logits
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax import lowrank
from droplora_jax.adapters import ADAPTERS
from droplora_jax.adapters.low_rank_layer import Initial
from droplora_jax.adapters.surgery import adapters_of, initial_of
from droplora_jax.core.config import MeshConfig
from droplora_jax.hf.peft.adapter import adapter_config, load_adapter
from droplora_jax.hf.peft.folder import OWN_FILE
from droplora_jax.nn.layer_paths import layer_names
from droplora_jax.nn.mask_keys import MaskKey
from droplora_jax.training.checkpoint import Checkpoints

SMALL = {"rank": 4, "alpha": 6.0, "targets": ("q_proj$", "up_proj$", "down_proj$")}
CONFIGS = {
    "droplora": dl.DropLoRA(**SMALL),
    "dora": dl.DoRA(**SMALL),
    "learned": dl.Learned(**SMALL),
    "gaussian": dl.DropLoRA(**SMALL, init="gaussian"),
    "orthogonal": dl.DropLoRA(**SMALL, init="orthogonal", rank_pattern={r"\.1\.": 2}),
    "pissa": dl.DropLoRA(**SMALL, init="pissa"),
    "milora": dl.DropLoRA(**SMALL, init="milora", granularity="sequence"),
    "olora": dl.DropLoRA(**SMALL, init="olora", sampler="exact", granularity="step"),
    "pissa, rank_stabilized, ranks": dl.DropLoRA(
        **SMALL, init="pissa", rank_stabilized=True, rank_pattern={r"\.0\.q": 2, "up": 3}
    ),
    "dora, olora": dl.DoRA(**SMALL, init="olora"),
    "learned, pissa, ranks": dl.Learned(**SMALL, init="pissa", rank_pattern={r"\.2\.": 3}),
    "input dropout": dl.DropLoRA(**SMALL, input_dropout=0.3),
    "rates by layer": dl.DropLoRA(
        **SMALL, drop_rate_pattern={r"\.0\.": 0.0, "q_proj": 0.25}, sampler="exact"
    ),
    "rates by layer, step": dl.DropLoRA(
        **SMALL,
        drop_rate_pattern={r"\.0\.": 0.75, "q_proj": 0.25},
        sampler="exact",
        granularity="step",
    ),
    "schedule": dl.DropLoRA(**SMALL, drop_schedule="cosine", drop_warmup_steps=1),
    "schedule, step": dl.DropLoRA(
        **SMALL, drop_schedule="linear", sampler="exact", granularity="step"
    ),
}
# Those whose state differs are trained in a decoder, the rest in a small stack of layers.
WHOLE = (
    "droplora",
    "dora",
    "pissa, rank_stabilized, ranks",
    "learned, pissa, ranks",
    "input dropout",
    "schedule, step",
)
whole = pytest.mark.parametrize("name", WHOLE)


@pytest.fixture(scope="module")
def trained(untied):
    """After three steps of each, made once."""

    @cache
    def of(name: str):
        training = Training(untied, CONFIGS[name])
        return training, *training.steps(3)

    return of


def test_every_kind_is_held_to_the_contract():
    assert {config.kind for config in CONFIGS.values()} == set(ADAPTERS)
    assert {CONFIGS[name].kind for name in WHOLE} == set(ADAPTERS)


# Three steps on a stack of layers.


@pytest.fixture(scope="module", params=CONFIGS)
def stack(request):
    """The configuration, the plain model, with adapters, after training, and a share of rates."""
    config = CONFIGS[request.param]
    share = None if config.share(STEPS) is None else 0.9
    base = Stack()
    model = dl.inject(base, config, key=ROOT)
    graphdef, adapters, mask_keys, frozen = dl.split(model)
    for n in range(3):
        key = jax.random.fold_in(ROOT, n)
        adapters = small_step(graphdef, adapters, mask_keys, frozen, key, share)
    return config, base, model, nnx.merge(graphdef, adapters, mask_keys, frozen), share


def test_a_stack_is_unchanged_at_first_and_its_merge_is_evaluation(stack):
    _, base, model, after, share = stack
    before = output(base)
    assert relative(both_outputs(model, ROOT, share)[0], before) < 2e-6
    evaluated = both_outputs(after, ROOT, share)[0]
    assert relative(evaluated, before) > 1e-3
    merged = dl.merge(after)
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    assert relative(output(merged), evaluated) < 1e-5


def test_only_adapters_are_trained_and_ranks_that_a_layer_has_not_stay_zero(stack):
    config, base, model, after, _ = stack
    assert_unchanged(dl.without_adapters(after), snapshot(base))
    starts, ends = dl.split(model)[1], dl.split(after)[1]
    variables = jax.tree.leaves(ends, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert not any(isinstance(variable, Initial | MaskKey) for variable in variables)
    for path, (old, new) in pairs(starts, ends).items():
        assert not np.array_equal(old, new), path
    for path, adapter in adapters_of(after).items():
        names = layer_names(tuple(path.split(".")), (3,))
        assert [b.rank for b in adapter.branches] == [b.rank for b in config.branches(names)]
        for layer, branch in enumerate(adapter.branches):
            assert not np.asarray(adapter.lora_a[layer, ..., branch.rank :]).any()
            assert not np.asarray(adapter.lora_b[layer, branch.rank :]).any()


def test_masks_change_from_step_to_step_and_are_off_in_evaluation(stack):
    """A kind that draws nothing prunes by what it learnt, and is the same in both."""
    config, *_, after, share = stack
    keys = [jax.random.fold_in(ROOT, n) for n in (1, 2, 1)]
    evaluated, masked = zip(*(both_outputs(after, key, share) for key in keys), strict=True)
    np.testing.assert_array_equal(masked[0], masked[2])
    assert np.array_equal(masked[0], masked[1]) == (config.kind == "learned")
    np.testing.assert_array_equal(evaluated[0], evaluated[1])
    assert np.array_equal(masked[0], evaluated[0]) == (config.kind == "learned")


# Three steps of a decoder.


@whole
def test_the_model_is_unchanged_at_first_and_the_merge_is_evaluation(name, trained, untied):
    training, state, _ = trained(name)
    before = snapshot(load(untied))[1]
    assert_merge_is_evaluation(training, state)
    for path, (old, new) in pairs(training.adapters, state.adapters).items():
        assert not np.array_equal(old, new), path
    after = snapshot(training.base)[1]
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "droplora"])
def test_masks_and_gradients_are_the_same_on_any_mesh_and_in_any_split(name, untied, trained):
    """Also under rematerialisation: of a step with its masks on the losses and what it moved."""
    _, state, losses = trained(name)
    other = Training(untied, CONFIGS[name], MeshConfig(data=2, fsdp=2, tensor=2), remat="nothing")
    initial = jax.tree.map(
        lambda theirs, ours: jax.device_put(np.asarray(ours), theirs.sharding),
        initial_of(other.frozen),
        state.initial,  # a decomposition may have other signs on another number of devices
    )
    adapters = other.adapters
    if jax.tree.leaves(initial):
        adapters = nnx.merge_state(adapters, _as_started(adapters, initial))
        other.adapters = adapters
    moved, others = other.steps(3, state=replace(other.fresh(), initial=initial), k=1)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    mine = np.concatenate([np.ravel(b) for _, b in pairs(state.adapters, state.adapters).values()])
    theirs = np.concatenate(
        [np.ravel(b) for _, b in pairs(moved.adapters, moved.adapters).values()]
    )
    assert relative(theirs, mine) < 1e-3  # Adam amplifies the rounding of its first steps


def _as_started(adapters, initial):
    """Of the trained factors, those that start as the initial ones."""
    flat = dict(nnx.to_flat_state(adapters))
    for path, first in nnx.to_flat_state(initial):
        trained = (*path[:-1], path[-1].replace("first_", "lora_"))
        flat[trained] = flat[trained].replace(jnp.copy(first[...]))
    return nnx.from_flat_state(flat)


@whole
def test_a_run_that_is_resumed_is_exact(name, trained, tmp_path):
    training, state, _ = trained(name)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, {})
    checkpoints.wait()
    restored = checkpoints.restore(3, training.fresh())
    checkpoints.close()
    other = Training.__new__(Training)
    other.__dict__ |= training.__dict__
    empty = dl.inject(training.base, CONFIGS[name], key="later")
    *_, other.frozen = dl.split(empty)
    expected, losses = training.steps(2, state=jax.tree.map(jnp.copy, state))
    actual, others = other.steps(2, state=restored)
    assert others == losses
    for old, new in pairs(expected.adapters, actual.adapters).values():
        np.testing.assert_array_equal(old, new)


@whole
def test_what_is_exported_is_evaluation_here_and_in_peft(name, trained, tmp_path):
    training, state, _ = trained(name)
    model = training.with_state(state)
    expected = logits(model)
    dl.save_adapter(model, tmp_path / "adapter")
    again = load_adapter(training.base, tmp_path / "adapter")
    assert relative(logits(again), expected) < 1e-5
    assert next(iter(adapters_of(again).values())).config == CONFIGS[name]
    theirs = AutoModelForCausalLM.from_pretrained(training.base.source.path, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert relative(torch_logits(theirs.eval(), TOKENS), expected) < 2e-5


def test_options_are_read_as_they_were_written(trained, tmp_path):
    training, _, _ = trained("droplora")
    dl.save_adapter(training.model, tmp_path / "adapter")
    for config in CONFIGS.values():
        own = {"format_version": 1, **dataclasses.asdict(config)}
        (tmp_path / "adapter" / OWN_FILE).write_text(json.dumps(own))
        assert adapter_config(training.base.config, tmp_path / "adapter") == config


# What the ways to start are, against PEFT's.


@pytest.mark.parametrize(("init", "theirs"), [("pissa", "pissa"), ("olora", "olora")])
@pytest.mark.parametrize("stabilized", [False, True])
def test_a_branch_that_starts_from_the_kernel_trains_as_in_peft(init, theirs, stabilized, untied):
    """Logits and the gradients of A and B, up to the signs that a decomposition leaves open."""
    config = dl.DropLoRA(**SMALL, drop_rate=0.0, init=init, rank_stabilized=stabilized)
    training = Training(untied, config)
    options = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj", "down_proj"],
        init_lora_weights=theirs,
        use_rslora=stabilized,
    )
    base = AutoModelForCausalLM.from_pretrained(untied.path, dtype=torch.float32)
    other = peft.get_peft_model(base, options)
    ids = torch.tensor(TOKENS).long()
    other(ids, labels=ids).loss.backward()

    def loss(adapters):
        model = nnx.merge(training.graphdef, adapters, training.mask_keys, training.frozen)
        out = model(jnp.asarray(TOKENS))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(out, TOKENS[:, 1:]).mean()

    gradients = jax.jit(jax.grad(loss))(training.adapters)
    ours = dict(nnx.to_flat_state(gradients))
    for layer in range(3):
        for name in ("q_proj", "up_proj", "down_proj"):
            block = "self_attn" if name == "q_proj" else "mlp"
            module = other.base_model.model.model.layers[layer].get_submodule(f"{block}.{name}")
            for factor, attribute in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
                weight = getattr(module, factor)["default"].weight
                start = dict(nnx.to_flat_state(training.adapters))["layers", name, attribute]
                start = np.asarray(start[...][layer]).T
                signs = np.sign(start * weight.detach().numpy()).sum(1 if factor == "lora_A" else 0)
                signs = np.sign(signs)[:, None] if factor == "lora_A" else np.sign(signs)[None]
                assert relative(start * signs, weight.detach().numpy()) < 1e-4
                own = np.asarray(ours["layers", name, attribute][...][layer]).T
                assert relative(own * signs, weight.grad.numpy()) < 1e-4, (layer, name, factor)


@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_what_a_branch_starts_from_is_a_part_of_the_kernel(init, untied):
    training = Training(untied, dl.DropLoRA(**SMALL, init=init))
    for adapter in adapters_of(training.model).values():
        for layer, w_IO in enumerate(np.asarray(adapter.base_kernel[...], np.float64)):
            a, b = (np.asarray(f[layer], np.float64) for f in (adapter.lora_a, adapter.lora_b))
            u, s, v = np.linalg.svd(w_IO)
            own = slice(4) if init == "pissa" else slice(-4, None)
            part = (u[:, : len(s)][:, own] * s[own]) @ v[: len(s)][own]
            assert relative(adapter.branches[layer].scale * a @ b, part) < 1e-4


def test_gaussian_and_orthogonal_starts():
    layer = nnx.Linear(256, 128, rngs=nnx.Rngs(0))
    wide = dl.DropLoRA(rank=64, init="gaussian").adapt(
        layer, dl.linear_spec(layer), ("q_proj",), ROOT
    )
    assert np.asarray(wide.lora_a[...]).std() == pytest.approx(1 / 64, rel=0.02)
    assert not np.asarray(wide.lora_b[...]).any()
    both = dl.DropLoRA(rank=64, init="orthogonal").adapt(
        layer, dl.linear_spec(layer), ("q_proj",), ROOT
    )
    a, b = np.asarray(both.lora_a[...]), np.asarray(both.lora_b[...])
    assert np.linalg.norm(a) > 1
    assert np.linalg.norm(b) > 1
    assert np.linalg.norm(a @ b) < 1e-5 * np.linalg.norm(a) * np.linalg.norm(b)
    with pytest.raises(dl.InputError, match=r"rank=3: .* needs an even rank"):
        dl.DropLoRA(rank=3, init="orthogonal")


# The learned mask, against a transcription of its definition.


def torch_learned(x, w, a, b, logits, scale):
    soft = torch.sigmoid(logits)
    hard = (soft >= 0.5).float()
    mask = hard - soft.detach() + soft
    share = hard.mean()
    if share > 0:
        mask = mask / share
    return x @ w + scale * ((x @ a) * mask) @ b


@pytest.mark.parametrize("kept", [4, 3, 1])
def test_the_learned_mask_and_its_gradient_equal_pytorch(kept):
    rng = np.random.default_rng(0)
    shapes = [(2, 5, 12), (12, 7), (12, 4), (4, 7)]
    x, w, a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    values = np.where(np.arange(4) < kept, 0.3, -0.2).astype(np.float32)
    layer = nnx.Linear(12, 7, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.asarray(w))
    config = dl.Learned(rank=4, alpha=6.0)
    adapter = config.adapt(layer, dl.linear_spec(layer), ("q_proj",), ROOT)
    graphdef, factors, rest = nnx.split(adapter, nnx.LoRAParam, ...)
    for name, value in {"lora_a": a, "lora_b": b, "mask_logits": values}.items():
        factors[name].set_value(jnp.asarray(value))
    y, pullback = jax.vjp(lambda f: nnx.merge(graphdef, f, rest)(jnp.asarray(x)), factors)
    weight = rng.normal(size=y.shape).astype(np.float32)
    (gradients,) = pullback(jnp.asarray(weight))

    tensors = [torch.tensor(v, requires_grad=True) for v in (a, b, values)]
    theirs = torch_learned(torch.tensor(x), torch.tensor(w), *tensors, 1.5)
    (theirs * torch.tensor(weight)).sum().backward()
    assert relative(y, theirs.detach()) < 1e-5
    for name, tensor in zip(("lora_a", "lora_b", "mask_logits"), tensors, strict=True):
        assert relative(gradients[name].get_value(), tensor.grad) < 1e-5
    model = nnx.merge(graphdef, factors, rest)
    assert relative(model.merged()(jnp.asarray(x)), y) < 1e-5


def test_a_learned_mask_that_keeps_nothing_is_no_branch():
    mask, pullback = jax.vjp(lowrank.learned_mask, jnp.full(4, -1.0))
    np.testing.assert_array_equal(mask, 0)
    assert np.all(np.asarray(pullback(jnp.ones(4))[0]) > 0)  # and it may find its way back
    np.testing.assert_array_equal(lowrank.learned_mask(jnp.zeros(4)), 1)
    ranks = lowrank.learned_mask(jnp.zeros((2, 4)), jnp.asarray([4, 1]))
    np.testing.assert_array_equal(ranks, [[1, 1, 1, 1], [1, 0, 0, 0]])


# Rates that change.


def test_rates_by_layer_are_those_of_the_layers():
    config = dl.DropLoRA(**SMALL, drop_rate_pattern={r"\.0\.": 0.0, "q_proj": 0.25})
    names = layer_names(("layers", "q_proj"), (3,))
    assert [branch.drop_rate for branch in config.branches(names)] == [0.0, 0.25, 0.25]


def test_a_schedule_changes_how_much_is_dropped():
    layer = nnx.Linear(12, 7, use_bias=False, rngs=nnx.Rngs(0))
    config = dl.DropLoRA(rank=256, drop_rate=0.8, drop_schedule="linear", drop_warmup_steps=4)
    adapter = config.adapt(layer, dl.linear_spec(layer), ("q_proj",), ROOT)
    graphdef, trained, keys, frozen = dl.split(adapter)
    share = config.share(12)
    for step, expected in {0: 0.0, 2: 0.4, 4: 0.8, 8: 0.4, 12: 0.0}.items():
        drawn = dl.draw(keys, ROOT, rows=jnp.arange(2), share=share(step))
        mask = nnx.merge(graphdef, trained, drawn, frozen).mask(jnp.zeros((2, 64, 256)))
        assert abs(np.mean(np.asarray(mask) == 0) - expected) < 0.01
        if expected:
            assert np.asarray(mask).max() == pytest.approx(1 / (1 - expected))
    with pytest.raises(dl.InputError, match=r"drop_schedule.*pass share="):
        dl.draw(keys, ROOT, rows=jnp.arange(2))
    with pytest.raises(dl.InputError, match=r"drop_warmup_steps=4: must be below"):
        config.share(4)


def test_options_that_say_how_to_train_are_the_adapter_s_own():
    for kind in ADAPTERS.values():
        names = {field.name for field in dataclasses.fields(kind)}
        assert set(kind.of_training) < names
