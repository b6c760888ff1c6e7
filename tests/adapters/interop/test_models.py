"""Adapters in the models of other libraries, as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import assert_unchanged, randomized, relative, snapshot
from tunix_fixtures import KEY, MODELS, TARGETS, TOKENS, B, inputs, logits, tunix_model

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of

ROWS = jnp.arange(B)
CONFIG = dl.DropLoRA(rank=4, alpha=8, targets=TARGETS)


@pytest.fixture(params=MODELS)
def model(request) -> nnx.Module:
    pytest.importorskip("tunix")
    return tunix_model(request.param)


@pytest.fixture
def llama() -> nnx.Module:
    pytest.importorskip("tunix")
    return tunix_model("llama3")


def test_injecting_changes_no_output(model):
    before = snapshot(model)
    injected = dl.inject(model, CONFIG, key=KEY)
    assert set(adapters_of(injected)) == {
        f"layers.{i}.{name}"
        for i in range(2)
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert relative(logits(injected), logits(model)) < 1e-6
    assert relative(logits(dl.masked(injected, KEY, rows=ROWS)), logits(model)) < 1e-6
    assert_unchanged(model, before)


def test_merging_keeps_the_function_the_classes_and_the_paths(model):
    injected = randomized(dl.inject(model, CONFIG, key=KEY))
    merged = dl.merge(injected)
    assert relative(logits(injected), logits(model)) > 0.1
    assert relative(logits(merged), logits(injected)) < 1e-5
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    changed = {
        path
        for (path, ours), (_, theirs) in zip(
            nnx.to_flat_state(nnx.state(merged)), nnx.to_flat_state(nnx.state(model)), strict=True
        )
        if not np.array_equal(ours[...], theirs[...])
    }
    assert {".".join(map(str, path[:-1])) for path in changed} == set(adapters_of(injected))


def test_masks_change_from_step_to_step_and_only_adapters_have_gradients(model):
    injected = randomized(dl.inject(model, CONFIG, key=KEY))

    def loss(model, key):
        model = model if key is None else dl.masked(model, key, rows=ROWS)
        return jnp.mean(model(cache=None, **inputs(TOKENS))[0] ** 2)

    run = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    losses = [run(injected, jax.random.fold_in(KEY, step))[0] for step in (0, 1, 0)]
    assert losses[0] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]
    off, gradients = run(injected, None)
    assert off not in losses
    flat = nnx.to_flat_state(gradients)
    assert {path[-1] for path, _ in flat} == {"lora_a", "lora_b"}
    assert len(flat) == 2 * len(adapters_of(injected))
    assert all(np.any(np.asarray(g[...])) for _, g in flat)

    graphdef, adapters, mask_keys, frozen = dl.split(injected)
    keys = dl.draw(mask_keys, jax.random.fold_in(KEY, 1), rows=ROWS)

    def functional(adapters, keys, frozen):
        # A copy, as Tunix's layers may be rematerialised by nnx, which writes to their variables.
        return loss(nnx.merge(graphdef, adapters, keys, frozen, copy=True), None)

    again, others = jax.jit(jax.value_and_grad(functional))(adapters, keys, frozen)
    assert relative(again, losses[1]) < 1e-6
    assert jax.tree.structure(others) == jax.tree.structure(adapters)


def test_what_a_model_asks_its_layers_is_answered(llama):
    injected = dl.inject(llama, CONFIG, key=KEY)
    ours, theirs = injected.layers[0].attn, llama.layers[0].attn
    assert (ours.head_dim, ours.num_heads, ours.num_kv_heads) == (
        theirs.head_dim,
        theirs.num_heads,
        theirs.num_kv_heads,
    )
    with pytest.raises(AttributeError, match="'w' of a Einsum with an adapter: call the layer"):
        _ = ours.q_proj.w
    with pytest.raises(AttributeError, match="nothing_there"):
        _ = ours.q_proj.nothing_there


@pytest.mark.parametrize("options", [{"head": "lm_head"}, {"embedder": "embedder"}])
def test_a_head_is_a_linear_layer_and_an_embedding_is_none(llama, options):
    (target,) = options.values()
    config = dl.DropLoRA(rank=2, targets=target)
    if target == "lm_head":
        assert set(adapters_of(dl.inject(llama, config, key=KEY))) == {"lm_head"}
    else:
        with pytest.raises(dl.InputError, match=r"layers\.0\.attn\.q_proj"):
            dl.inject(llama, config, key=KEY)


def test_other_kinds_of_adapters_too(llama):
    injected = randomized(dl.inject(llama, dl.DoRA(rank=4, targets=TARGETS), key=KEY))
    assert relative(logits(dl.merge(injected)), logits(injected)) < 1e-5


def test_with_drop_rate_zero_it_is_the_lora_of_qwix(llama):
    """The same factors in Qwix's LoRA and in these adapters: the same logits."""
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path=f".*{TARGETS}", rank=4, alpha=8.0)
    given = {**inputs(TOKENS), "cache": None}
    theirs = randomized(qwix.apply_lora_to_model(llama, provider, rngs=nnx.Rngs(0), **given))
    ours = dl.inject(llama, dl.DropLoRA(rank=4, alpha=8, drop_rate=0, targets=TARGETS), key=KEY)
    modules = {".".join(map(str, path)): node for path, node in nnx.iter_graph(theirs)}
    for path, adapter in adapters_of(ours).items():
        for letter in "ab":
            factor = getattr(adapter, f"lora_{letter}")
            other = getattr(modules[path], f"{adapter.spec.attribute}_lora_{letter}")
            factor.set_value(other[...].reshape(factor.shape))
    assert relative(logits(ours), logits(theirs)) < 1e-5
    assert relative(logits(ours), logits(llama)) > 0.1


def test_a_model_of_mamba_layers():
    """Another library's model, with lists of layers that hold convolutions and state spaces."""
    mamba2 = pytest.importorskip("mamba2_jax")
    model = mamba2.Mamba2ForCausalLM(mamba2.Mamba2Config.tiny(), rngs=nnx.Rngs(0))
    config = dl.DropLoRA(rank=4, targets=r"(in|out)_proj$")
    injected = randomized(dl.inject(model, config, key=KEY), size=0.1)

    def run(model):
        return nnx.jit(lambda model, tokens: model(tokens)["logits"])(model, TOKENS)

    assert len(adapters_of(injected)) == 4
    assert relative(run(dl.inject(model, config, key=KEY)), run(model)) < 1e-6
    assert relative(run(dl.merge(injected)), run(injected)) < 1e-4
    steps = [run(dl.masked(injected, jax.random.fold_in(KEY, i), rows=ROWS)) for i in range(2)]
    assert relative(steps[0], steps[1]) > 1e-3


def test_a_stacked_llama_of_another_library():
    """Made by `nnx.vmap`, run by `nnx.scan`."""
    pytest.importorskip("zlynx")
    from zlynx.model import LlamaConfig, LlamaLanguageModel

    shape = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        attention_head=4,
        kv_head=2,
        head_dim=8,
        dtype="float32",
    )
    model = LlamaLanguageModel(shape, rngs=nnx.Rngs(0))
    config = dl.DropLoRA(rank=4, alpha=8)
    injected = randomized(dl.inject(model, config, key=KEY), size=0.1)

    def run(model):
        return nnx.jit(lambda model, tokens: model(tokens).logits)(model, TOKENS)

    assert len(adapters_of(injected)) == 5
    assert {a.lora_a.shape[0] for a in adapters_of(injected).values()} == {3}
    assert relative(run(dl.inject(model, config, key=KEY)), run(model)) < 1e-6
    assert relative(run(injected), run(model)) > 1e-2
    assert relative(run(dl.merge(injected)), run(injected)) < 1e-5
    steps = [run(dl.masked(injected, jax.random.fold_in(KEY, i), rows=ROWS)) for i in range(2)]
    assert relative(steps[0], steps[1]) > 1e-3


def test_a_dense_layer_of_maxtext():
    linears = pytest.importorskip("maxtext.layers.linears")

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.query = linears.DenseGeneral(8, (2, 4), rngs=rngs)
            self.out = linears.DenseGeneral((2, 4), 8, axis=(-2, -1), use_bias=True, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.query(x)))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 3, 8)), jnp.float32)
    model = Block(nnx.Rngs(0))
    config = dl.DropLoRA(rank=4, targets="all-linear")
    injected = randomized(dl.inject(model, config, key=KEY))
    assert set(adapters_of(injected)) == {"query", "out"}
    np.testing.assert_array_equal(dl.inject(model, config, key=KEY)(x), model(x))
    assert relative(dl.merge(injected)(x), injected(x)) < 1e-5
    assert relative(dl.masked(injected, KEY, rows=ROWS)(x), injected(x)) > 1e-2
