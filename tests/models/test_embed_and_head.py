"""Adapters of the embedding and of the head, also where they are one: the contract, and PEFT's."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from contract import Training, assert_merge_is_evaluation, pairs
from flax import nnx
from gradients import loss_and_gradients as of_logits
from oracles import random_tokens, randomized, relative, torch_logits
from safetensors.numpy import load_file, save_file
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.adapters.truncate import truncated
from droplora_jax.commands.inspect_report import describe
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf.peft.adapter import adapter_config, adapter_tensors
from droplora_jax.hf.peft.config import PEFT_FILE
from droplora_jax.hf.peft.consumers import VLLM_ENDS
from droplora_jax.models.decoder import with_noise
from droplora_jax.training.loss import cross_entropy
from droplora_jax.training.step import loss_and_gradients, loss_sum

TOKENS = random_tokens(2, 24)
SMALL = {"rank": 4, "alpha": 6.0}
UNTIED = ("q_proj$", "embed", "lm_head")
TIED = ("q_proj$", "embed")
CONFIGS = {
    "token": dl.DropLoRA(**SMALL),
    "sequence, ranks": dl.DropLoRA(
        **SMALL, granularity="sequence", rank_pattern={"embed|lm_head": 2}
    ),
    "pissa, input dropout": dl.DropLoRA(**SMALL, init="pissa", input_dropout=0.3),
    "olora, step": dl.DropLoRA(**SMALL, init="olora", granularity="step", sampler="exact"),
    "learned": dl.Learned(**SMALL),
    "dora": dl.DoRA(**SMALL),
}
TRAINED = [("untied", "token"), ("tied", "token")]  # two entries of the contract of all kinds
CASES = [
    ("untied", "sequence, ranks"),
    ("untied", "pissa, input dropout"),
    ("untied", "learned"),
    ("untied", "dora"),
    ("tied", "olora, step"),
]


def config_of(base: str, name: str):
    return dataclasses.replace(CONFIGS[name], targets=UNTIED if base == "untied" else TIED)


@nnx.jit
def forward(model, tokens):
    return model(tokens)


@pytest.fixture(scope="module")
def trained(untied, tied):
    """After three steps of each, made once."""
    made: dict[tuple[str, str], tuple] = {}

    def of(base: str, name: str):
        if (base, name) not in made:
            folder = {"untied": untied, "tied": tied}[base]
            training = Training(folder, config_of(base, name))
            made[base, name] = (training, *training.steps(3))
        return made[base, name]

    return of


# The contract of all kinds, for ends that were trained.


@pytest.mark.parametrize(("base", "name"), TRAINED)
def test_unchanged_at_first_and_the_merge_is_evaluation(base, name, trained):
    training, state, _ = trained(base, name)
    assert_merge_is_evaluation(training, state)
    for path, (start, moved) in pairs(training.adapters, state.adapters).items():
        assert not np.array_equal(start, moved), path


@pytest.mark.parametrize(("base", "name"), TRAINED)
def test_training_is_the_same_on_any_mesh_and_in_any_split(base, name, trained, untied, tied):
    _, state, losses = trained(base, name)
    folder = {"untied": untied, "tied": tied}[base]
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    other = Training(folder, config_of(base, name), mesh, remat="nothing")
    moved, others = other.steps(3, k=1)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    ours, theirs = (
        np.concatenate([np.ravel(v[...]) for _, v in nnx.to_flat_state(s.adapters)])
        for s in (state, moved)
    )
    assert relative(theirs, ours) < 1e-3  # Adam amplifies the rounding of its first steps


# Every kind and way to start, with factors of any values.


@pytest.fixture(scope="module", params=CASES, ids=": ".join)
def ends(request, untied, tied):
    base, name = request.param
    plain = load({"untied": untied, "tied": tied}[base].path)
    model = dl.inject(plain, config_of(base, name), key=dl.root_key(1))
    assert relative(forward(model, TOKENS), forward(plain, TOKENS)) < 2e-6
    return base, name, plain, randomized(model)


def test_the_merge_is_evaluation(ends):
    *_, model = ends
    assert relative(forward(dl.merge(model), TOKENS), forward(model, TOKENS)) < 1e-5


def test_the_loss_of_some_positions_has_the_masks_of_all(ends):
    """And its gradients, against those of the whole logits: masks, dropped inputs, and all."""
    *_, model = ends
    graphdef, adapters, mask_keys, frozen = dl.split(model)
    targets = jnp.asarray(np.where(np.arange(23) % 3 == 1, TOKENS[:, 1:], -1), jnp.int32)
    batch = {
        "tokens": jnp.asarray(TOKENS[:, :-1]),
        "targets": targets,
        "segment_ids": jnp.ones_like(targets),
    }

    def model_of(adapters):
        keys = dl.draw(mask_keys, dl.root_key(3), rows=jnp.arange(2))
        return nnx.merge(graphdef, adapters, keys, frozen)

    def by_blocks(adapters):
        return loss_sum(model_of(adapters), batch)[0]

    def whole(adapters):
        return cross_entropy(model_of(adapters)(batch["tokens"]), targets)[0]

    ours, expected = (jax.jit(jax.value_and_grad(loss))(adapters) for loss in (by_blocks, whole))
    assert float(ours[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    theirs = dict(nnx.to_flat_state(expected[1]))
    for path, gradient in nnx.to_flat_state(ours[1]):
        other = np.asarray(theirs[path][...])  # zero if a learned mask keeps no rank of a layer
        assert relative(gradient[...], other) < 1e-5 if other.any() else not gradient[...].any()


def test_embeddings_and_heads_are_masked_in_training(trained):
    training, state, _ = trained("untied", "token")
    model = training.with_state(state)
    for name in ("embed", "lm_head"):
        other = dl.inject(
            training.base, dataclasses.replace(CONFIGS["token"], targets=name), key=dl.root_key(0)
        )
        other = randomized(other, seed=1)
        first, second = (
            forward(dl.masked(other, dl.root_key(seed), rows=jnp.arange(2)), TOKENS)
            for seed in (0, 1)
        )
        assert relative(first, second) > 1e-3
    np.testing.assert_array_equal(forward(model, TOKENS), forward(model, TOKENS))


@pytest.mark.parametrize("targets", ["paper", "all-linear"])
def test_they_are_targeted_by_name_only(targets, untied):
    model = dl.inject(load(untied.path), dl.DropLoRA(targets=targets), key=dl.root_key(0))
    assert not {"embed", "lm_head"} & adapters_of(model).keys()
    named = dl.DropLoRA(targets=(targets, "lm_head", "^embed$"))
    model = dl.inject(load(untied.path), named, key=dl.root_key(0))
    assert {"embed", "lm_head"} < adapters_of(model).keys()


def test_a_tied_head_is_no_target_of_its_own_and_has_no_magnitude(tied):
    base = load(tied.path)
    with pytest.raises(dl.InputError, match=r"'lm_head' matches no module; .*\bembed,"):
        dl.inject(base, dl.DropLoRA(targets=("paper", "lm_head")), key=dl.root_key(0))
    for key in (dl.root_key(0), "later", None):
        with pytest.raises(dl.InputError, match=r"kind='dora'.*leave embed out"):
            dl.inject(base, dl.DoRA(targets=("paper", "embed")), key=key)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("granularity", ["token", "step"])
def test_beside_a_bfloat16_base(granularity, bfloat16):
    """Factors and their gradients are float32; no step mixes dtypes unasked."""
    base = dl.load(bfloat16.path, mesh=make_mesh(), dtype=jnp.bfloat16)
    config = dl.DropLoRA(**SMALL, targets=UNTIED, granularity=granularity, sampler="exact")
    model = with_noise(randomized(dl.inject(base, config, key=dl.root_key(0))), 5.0)
    graphdef, adapters, keys, frozen = dl.split(model)
    tokens = jnp.asarray(random_tokens(1, 8, 17))
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:]}
    batch["segment_ids"] = jnp.ones_like(batch["tokens"])
    step = jax.jit(partial(loss_and_gradients, graphdef))
    loss, gradients = step(adapters, keys, frozen, batch, dl.root_key(1))
    assert np.isfinite(float(loss))
    for _, gradient in nnx.to_flat_state(gradients):
        assert gradient[...].dtype == jnp.float32
        assert np.abs(np.asarray(gradient[...])).max() > 0


# Out, to any tool.


def test_what_is_exported_is_evaluation_here_and_elsewhere(ends, tmp_path):
    base, name, plain_base, model = ends
    expected = forward(model, TOKENS)
    limits = dl.save_adapter(model, tmp_path / "adapter")
    modules = "embed_tokens and lm_head" if base == "untied" else "embed_tokens"
    of_ends = [limit for limit in limits if f"adapters of {modules} (target_modules)" in limit]
    assert bool(of_ends) == (model.config.family not in VLLM_ENDS)
    again = dl.load_adapter(plain_base, tmp_path / "adapter")
    assert relative(forward(again, TOKENS), expected) < 1e-5
    assert adapter_config(plain_base.config, tmp_path / "adapter") == config_of(base, name)
    theirs = AutoModelForCausalLM.from_pretrained(plain_base.source.path, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert relative(torch_logits(theirs, TOKENS), expected) < 2e-5

    report = dl.save_merged(model, tmp_path / "merged")
    assert report.merged == (5 if base == "untied" else 4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(torch_logits(plain, TOKENS), expected) < 2e-5


def test_a_smaller_rank_of_both_ends(trained):
    training, state, _ = trained("untied", "token")
    model = training.with_state(state)
    smaller, report = truncated(model, 2)
    assert 0 < report.kept <= 1
    assert adapters_of(smaller)["embed"].lora_a[...].shape == (64, 2)
    assert relative(forward(smaller, TOKENS), forward(model, TOKENS)) < 0.5


# In, and trained as PEFT trains it.

OPTIONS = {
    "head": ("untied", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("untied", {"target_modules": ["embed_tokens"]}),
    "both": (
        "untied",
        {"target_modules": ["v_proj", "lm_head", "embed_tokens"], "rank_pattern": {"lm_head": 5}},
    ),
    "both, DoRA, rsLoRA": (
        "untied",
        {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True, "use_rslora": True},
    ),
    "tied": (
        "tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied, by the head": (
        "tied",
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    ),
}


def in_peft(base, adapter) -> peft.PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter)


def train_in_peft(base, folder, **options):
    """Two steps of SGD: every trained tensor moves, and what is tied stays so."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options),
        )
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3)
        batch = torch.tensor(TOKENS, dtype=torch.long)
        for _ in range(2):
            theirs(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs.save_pretrained(folder)
    return torch_logits(theirs.eval(), TOKENS)


@pytest.fixture(scope="module", params=OPTIONS)
def theirs(request, untied, tied, tmp_path_factory):
    base, options = OPTIONS[request.param]
    folder, adapter = {"untied": untied, "tied": tied}[base], tmp_path_factory.mktemp("theirs")
    expected = train_in_peft(folder.path, adapter, **options)
    return folder.path, adapter, expected


def test_what_peft_trained_is_the_same_function_here_and_back(theirs, tmp_path):
    base, folder, expected = theirs
    model = dl.load_adapter(load(base), folder)
    out = forward(model, TOKENS)
    assert relative(out, expected) < 1e-5
    assert relative(forward(load(base), TOKENS), expected) > 1e-3
    described = describe(folder)
    assert "trained_whole" not in described
    assert {layer.module for layer in described["branches"]} >= {"embed_tokens", "lm_head"} & {
        name.rpartition(".")[2]
        for name in json.loads((folder / PEFT_FILE).read_text())["target_modules"]
    }
    dl.save_adapter(model, tmp_path / "ours")
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "ours")
    )
    assert after.keys() == {key for key in before if not key.endswith("base_layer.weight")}
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert relative(torch_logits(in_peft(base, tmp_path / "ours").eval(), TOKENS), out) < 1e-5


def test_gradients_are_pefts(theirs, request):
    """On one device; of two adapters on eight."""
    base, folder, _ = theirs
    name = request.node.callspec.params["theirs"]
    model = dl.load_adapter(load(base, devices=8 if name in ("both", "tied") else 1), folder)
    _, gradients = of_logits(model, TOKENS)
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    as_values = nnx.map_state(lambda path, p: p.replace(jnp.asarray(gradients[path])), adapters)
    ours = adapter_tensors(nnx.merge(graphdef, as_values, rest))
    other = in_peft(base, folder)
    for name, parameter in other.named_parameters():
        parameter.requires_grad_("lora_" in name)
    batch = torch.tensor(TOKENS, dtype=torch.long)
    other(batch, labels=batch).loss.backward()
    expected = {
        name.replace(".default", "").removesuffix(".weight"): p.grad.numpy()
        for name, p in other.named_parameters()
        if p.grad is not None
    }
    tied = "base_model.model.lm_head.lora_A.weight" in ours and model.config.tie_embeddings
    for name, value in ours.items():
        there = expected[name.removesuffix(".weight")]
        if tied and "lora_embedding_" in name:  # PEFT has a parameter for each of the two
            other_end = "lora_B" if name.endswith("A") else "lora_A"
            there = there + expected[f"base_model.model.lm_head.{other_end}"].T
        if tied and "lm_head" in name:
            continue
        assert relative(value, there) < 1e-4, name


def edited(folder, tensors, **fields) -> None:
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kept = load_file(file) | tensors
    save_file({name: value for name, value in kept.items() if value is not None}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


MODEL = "base_model.model."
APART = {
    "the embedding of a tied base": ("tied", {"target_modules": ["embed_tokens"]}, {}),
    "the head of a tied base": ("tied", {"target_modules": ["lm_head"]}, {}),
    "tied, DoRA": (
        "tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
        {},
    ),
    "beside another head than the base's": (
        "untied",
        {"target_modules": ["lm_head"]},
        {f"{MODEL}lm_head.base_layer.weight": np.full((64, 32), 0.01, np.float32)},
    ),
}


@pytest.mark.parametrize("case", APART)
def test_ends_that_the_base_has_otherwise_are_as_peft_has_them(case, untied, tied, tmp_path):
    base, options, tensors = APART[case]
    folder = {"untied": untied, "tied": tied}[base]
    train_in_peft(folder.path, tmp_path / "theirs", **options)
    edited(tmp_path / "theirs", tensors)
    ours = dl.load_adapter(load(folder.path), tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "theirs").eval()
    assert relative(forward(ours, TOKENS), torch_logits(theirs, TOKENS)) < 2e-5


def test_factors_of_a_tied_end_that_differ_are_refused(tied, tmp_path):
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    train_in_peft(tied.path, tmp_path / "theirs", **options)
    edited(tmp_path / "theirs", {f"{MODEL}lm_head.lora_A.weight": np.ones((3, 32), np.float32)})
    message = r"lm_head\.lora_A\.weight is not .*lora_embedding_B, transposed"
    with pytest.raises(dl.InputError, match=message):
        dl.load_adapter(load(tied.path), tmp_path / "theirs")


# NEFTune.


def noise_of(model, key, tokens, segments=None, rows=None) -> np.ndarray:
    """What a step adds to the vectors of the tokens."""
    rows = jnp.arange(len(tokens)) if rows is None else rows
    noise = dl.masked(model, key, rows=rows).noise
    segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
    return np.asarray(noise(jnp.zeros((*tokens.shape, 256)), segments))


@pytest.fixture(scope="module")
def noisy(untied):
    return with_noise(load(untied.path), 5.0)


def test_noise_is_uniform_in_the_bound_of_its_document(noisy):
    """alpha / sqrt(L * D) of the paper's equation, whatever the padding and packing."""
    segments = np.zeros((3, 40), np.int32)
    segments[0, :40], segments[1, :10], segments[2, :10], segments[2, 10:30] = 1, 1, 1, 2
    values = noise_of(noisy, dl.root_key(0), segments, jnp.asarray(segments))
    for row, begin, end in [(0, 0, 40), (1, 0, 10), (2, 0, 10), (2, 10, 30)]:
        bound = 5.0 / np.sqrt((end - begin) * 256)
        part = values[row, begin:end]
        assert 0.99 * bound < np.abs(part).max() <= bound
        assert abs(part.mean()) < 0.1 * bound
        assert part.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)


def test_noise_is_of_the_step_and_the_row_and_off_in_evaluation(noisy, untied):
    first, second = (noise_of(noisy, dl.root_key(seed), TOKENS) for seed in (0, 1))
    np.testing.assert_array_equal(first, noise_of(noisy, dl.root_key(0), TOKENS))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    only = noise_of(noisy, dl.root_key(0), TOKENS[1:], rows=jnp.asarray([1]))
    np.testing.assert_array_equal(first[1:], only)
    np.testing.assert_array_equal(forward(noisy, TOKENS), forward(load(untied.path), TOKENS))
    drawn = dl.masked(noisy, dl.root_key(0), rows=jnp.arange(2))
    assert relative(forward(drawn, TOKENS), forward(noisy, TOKENS)) > 1e-3
    assert with_noise(noisy, 0).noise is None
    with pytest.raises(dl.InputError, match=r"drawn for 3 rows, but this layer sees 2: pass draw"):
        forward(dl.masked(noisy, dl.root_key(0), rows=jnp.arange(3)), TOKENS)


def test_noise_is_the_same_on_any_mesh_and_in_any_split(untied):
    tokens = random_tokens(8, 17)
    found = []
    for mesh, k in [(MeshConfig(fsdp=1), 4), (MeshConfig(data=2, fsdp=2, context=2), 1)]:
        placed = make_mesh(mesh, jax.devices()[: int(np.prod(mesh.sizes))])
        base = with_noise(dl.load(untied.path, mesh=placed, dtype=jnp.float32), 50.0)
        model = dl.inject(base, dl.DropLoRA(rank=2, targets="q_proj"), key=dl.root_key(0))
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.where(np.arange(16) < 12, 1, 2) + np.zeros((8, 1), np.int32),
        }
        parts = {name: jnp.asarray(v).reshape(k, -1, 16) for name, v in batch.items()}
        graphdef, *states = dl.split(model)
        step = jax.jit(partial(loss_and_gradients, graphdef))
        loss, gradients = step(*states, parts, dl.root_key(4))
        found.append((loss, jax.tree.leaves(gradients)))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert relative(one, other) < 2e-5 if np.any(other) else not np.any(one)
