"""The decoder against transformers and PEFT, and the properties that any decoder must have."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from gradients import loss_and_gradients
from oracles import (
    model_folder,
    random_tokens,
    randomized,
    raw,
    relative,
    torch_logits,
    with_config,
)
from small_models import load, one_device
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh, named_sharding
from droplora_jax.lowrank import rank_mask
from droplora_jax.models.embed_and_head import Head
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.parameter_table import LOGICAL_AXES
from droplora_jax.nn.options import StepOptions

pytestmark = pytest.mark.usefixtures("strict")

KEY = dl.root_key(0)
MESHES = {
    "8": MeshConfig(),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "1x4x2": MeshConfig(data=1, fsdp=4, tensor=2),
}
LONG = 96  # more than the 64 positions that the fixtures' rotary scaling starts from


@nnx.jit
def forward(model, tokens, positions=None, segment_ids=None):
    return model(tokens, positions=positions, segment_ids=segment_ids)


def test_logits_equal_transformers(either):
    tokens = random_tokens(2, LONG)
    assert relative(forward(load(either), tokens), either.logits(tokens)) < 1e-5


LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3},
}


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_settings_in_the_new_and_in_the_old_spelling(kind, tmp_path):
    folder = model_folder(tmp_path / "new", num_hidden_layers=1, rope_parameters=ROPE[kind])
    tokens = random_tokens(1, LONG)
    expected = folder.logits(tokens)
    assert relative(forward(load(folder), tokens), expected) < 1e-5

    new = load(folder).config
    scaling = {k: v for k, v in ROPE[kind].items() if k != "rope_theta"}
    without_kind = {k: v for k, v in scaling.items() if k != "rope_type"}
    spellings = {
        "rope_type": scaling,
        "type": {"type": scaling["rope_type"], **without_kind},
        "both": {"type": scaling["rope_type"], **scaling},
    }
    if scaling["rope_type"] == "default":
        spellings["none"] = None
    for name, rope_scaling in spellings.items():
        old = with_config(
            folder.path,
            tmp_path / name,
            rope_parameters=None,
            rope_theta=ROPE[kind]["rope_theta"],
            rope_scaling=rope_scaling,
        )
        assert dl.load(old, mesh=one_device(), dtype=jnp.float32).config == new, name
    # And transformers reads the old spelling as the same model.
    reread = AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32)
    assert relative(torch_logits(reread, tokens), expected) < 1e-6


@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 4, "rms_norm_eps": 0.1},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"hidden_size": 48, "head_dim": 8, "num_attention_heads": 4},
    ],
    ids=str,
)
def test_shapes_equal_transformers(shape, tmp_path):
    folder = model_folder(tmp_path, num_hidden_layers=1, **shape)
    tokens = random_tokens(2, 16)
    assert relative(forward(load(folder), tokens), folder.logits(tokens)) < 1e-5


def test_a_packed_row_equals_its_documents(either):
    model = load(either)
    documents = [random_tokens(1, n, seed=n) for n in (5, 9, 1, 7)]
    packed = np.concatenate([*documents, np.zeros((1, 2), np.int32)], axis=1)
    segments = np.concatenate(
        [np.full(d.shape, i + 1, np.int32) for i, d in enumerate(documents)]
        + [np.zeros((1, 2), np.int32)],
        axis=1,
    )
    logits = forward(model, packed, None, segments)
    start = 0
    for document in documents:
        end = start + document.shape[1]
        assert relative(logits[:, start:end], either.logits(document)) < 1e-5
        start = end


def test_positions_can_be_given(untied):
    model, tokens = load(untied), random_tokens(1, 8)
    positions = jnp.asarray([[0, 1, 2, 50, 51, 52, 90, 91]])
    with torch.no_grad():
        expected = untied.torch(
            torch.tensor(tokens), position_ids=torch.tensor(np.asarray(positions))
        ).logits.numpy()
    assert relative(forward(model, tokens, positions), expected) < 1e-5


def test_a_token_changes_no_earlier_logit(untied):
    model, tokens = load(untied), random_tokens(1, 16)
    logits = np.asarray(forward(model, tokens))
    for t in (0, 7, 15):
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % 64
        other = np.asarray(forward(model, changed))
        np.testing.assert_array_equal(other[:, :t], logits[:, :t])
        assert np.all(np.any(other[:, t:] != logits[:, t:], axis=-1))


def injected(model: nnx.Module, **options) -> nnx.Module:
    config = dl.DropLoRA(**{"rank": 4, "alpha": 6.0, **options})
    return randomized(dl.inject(model, config, key=KEY))


def test_every_rematerialisation_gives_the_same_gradients(untied):
    tokens, model = random_tokens(2, 16), injected(load(untied))
    results = [
        loss_and_gradients(model, tokens, KEY, options=StepOptions(remat=remat))
        for remat in ("everything", "dots", "attention", "nothing")
    ]
    unmasked = loss_and_gradients(injected(load(untied)), tokens)
    assert relative(unmasked[0], results[0][0]) > 1e-3
    for loss, gradients in results[1:]:
        assert relative(loss, results[0][0]) < 1e-6
        for path, gradient in gradients.items():
            assert relative(gradient, results[0][1][path]) < 1e-5, path


def test_bfloat16_loads_and_is_close(untied):
    tokens = random_tokens(2, 32)
    model = injected(load(untied, dtype=jnp.bfloat16))
    frozen = dl.split(model)[3]
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(dl.split(model)[1])} == {jnp.dtype(jnp.float32)}
    logits = forward(load(untied, dtype=jnp.bfloat16), tokens)
    assert logits.dtype == jnp.bfloat16
    assert relative(logits, untied.logits(tokens)) < 0.05
    loss, gradients = loss_and_gradients(model, tokens, KEY)
    assert loss.dtype == jnp.float32
    assert all(g.dtype == np.float32 and np.isfinite(g).all() for g in gradients.values())


# Invariants 1 and 5: one device and eight.


@pytest.fixture(scope="module")
def reference(untied):
    with jax.numpy_dtype_promotion("strict"):
        model = injected(load(untied))
        tokens = random_tokens(8, 16)
        return forward(load(untied), tokens), loss_and_gradients(model, tokens, KEY)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gives_the_logits_and_the_gradients_of_one_device(untied, reference, name):
    tokens = random_tokens(8, 16)
    logits, (loss, gradients) = reference
    assert relative(forward(load(untied, MESHES[name]), tokens), logits) < 1e-5
    on_mesh = loss_and_gradients(injected(load(untied, MESHES[name])), tokens, KEY)
    assert relative(on_mesh[0], loss) < 1e-5
    for path, gradient in on_mesh[1].items():
        assert relative(gradient, gradients[path]) < 1e-4, path


@pytest.mark.parametrize("name", MESHES)
def test_the_initial_a_and_the_masks_are_bit_identical_on_a_mesh(untied, name):
    config = dl.DropLoRA(rank=4)
    one = dl.inject(load(untied), config, key=KEY)
    mesh = make_mesh(MESHES[name])
    many = dl.inject(load(untied, MESHES[name]), config, key=KEY)
    rows = jnp.arange(8)
    keys = {}
    for model, sharding in [(one, None), (many, named_sharding(mesh, ("batch",)))]:
        mask_keys = dl.split(model)[2]
        draw = jax.jit(lambda key, rows, state=mask_keys: dl.draw(state, key, rows=rows))
        keys[sharding is None] = nnx.to_flat_state(
            draw(KEY, rows if sharding is None else jax.device_put(rows, sharding))
        )
    for (path, a), (other_path, b) in zip(keys[True], keys[False], strict=True):
        assert path == other_path
        np.testing.assert_array_equal(raw(a[...]), raw(b[...]))
    for path, adapter in adapters_of(one).items():
        a = adapters_of(many)[path].lora_a[...]
        np.testing.assert_array_equal(adapter.lora_a[...], a)
        assert np.unique(np.asarray(a)).size > 0.9 * a.size

    # The masks themselves, drawn where the rows are.
    options = {"drop_rate": 0.5, "granularity": "token", "sampler": "bernoulli", "rescale": True}

    @jax.jit
    def masks(keys):
        return rank_mask(keys, (8, 16, 4), dtype=jnp.float32, **options)

    row_keys = keys[True][0][1][...][0]
    sharded = masks(jax.device_put(row_keys, named_sharding(mesh, ("batch",))))
    np.testing.assert_array_equal(masks(row_keys), sharded)


@pytest.mark.parametrize("name", MESHES)
def test_factors_lie_where_the_kernel_does(untied, name):
    """A as the input dimension, B as the output; the other one has fsdp on its long dimension."""
    mesh = make_mesh(MESHES[name])
    model = dl.inject(load(untied, MESHES[name]), dl.DropLoRA(targets="all-linear"), key=KEY)
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    for path, adapter in adapters_of(model).items():
        backwards = path in ("layers.o_proj", "layers.down_proj")
        assert parts(adapter.base_kernel) == (1, *((tensor, fsdp) if backwards else (fsdp, tensor)))
        assert parts(adapter.lora_a) == (1, fsdp * tensor if backwards else fsdp, 1), path
        assert parts(adapter.lora_b) == (1, 1, fsdp if backwards else fsdp * tensor), path


def parts(parameter: nnx.Variable) -> tuple[int, ...]:
    """Into how many parts each dimension is cut."""
    value = parameter.get_value()
    shard = value.addressable_shards[0].data.shape
    return tuple(whole // part for whole, part in zip(value.shape, shard, strict=True))


def test_the_frozen_base_is_shared_not_copied(untied):
    model = load(untied)
    before = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))}
    frozen = dl.split(dl.inject(model, dl.DropLoRA(), key=KEY))[3]
    assert {id(leaf) for leaf in jax.tree.leaves(frozen)} == before


def test_every_parameter_has_a_name_and_logical_axes(either):
    paths = {".".join(path) for path, _ in nnx.to_flat_state(nnx.state(load(either)))}
    assert paths <= LOGICAL_AXES.keys()
    config = load(either).config
    assert paths == FAMILIES[config.family].tensor_names(config).keys()


def test_the_head_is_no_target_as_in_peft(untied):
    model = dl.inject(load(untied), dl.DropLoRA(targets="all-linear"), key=KEY)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(untied.path),
        peft.LoraConfig(r=4, target_modules="all-linear"),
    )
    modules = {
        n.split(".lora_A")[0].split(".")[-1] for n, _ in theirs.named_parameters() if "lora_A" in n
    }
    assert {path.split(".")[-1] for path in adapters_of(model)} == modules


def test_the_configuration_is_hashable(untied):
    config = load(untied).config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("folder", "mesh", "length"),
    [
        ("untied", None, 64),
        ("tied", MESHES["8"], 4),
        ("untied", MESHES["2x2x2"], 4),
        ("tied", MESHES["2x2x2"], 64),
        ("untied", MESHES["1x4x2"], 64),
        ("untied", MeshConfig(fsdp=2, context=4), 4),
    ],
    ids=str,
)
def test_a_projection_gives_the_logits_of_any_head(folder, mesh, length, request):
    """Of 4 positions the rows are gathered, of 64 the head; also for a head with an adapter."""
    folder = request.getfixturevalue(folder)

    class Twice(Head):
        def __call__(self, x_BTD):
            return 2 * super().__call__(x_BTD)

    @nnx.jit
    def both(model, x):
        taken, project = model.projection(x)
        return project(taken), model.logits(x)

    model = load(folder, mesh)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, length, 32), np.float32))
    plain, expected = both(model, x)
    assert relative(plain, expected) < 1e-6
    if not model.config.tie_embeddings:
        model.lm_head = Twice(model.lm_head.kernel[...])
        twice, _ = both(model, x)
        assert relative(twice, 2 * np.asarray(expected)) < 1e-6
