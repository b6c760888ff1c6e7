"""Several adapters on one base: used in turn, trained apart, added up, and merged together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from oracles import random_tokens, randomized, relative, torch_logits
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of

TOKENS = random_tokens(2, 16)
KEY = dl.root_key(0)
CONFIGS = {
    "chat": dl.DropLoRA(rank=4, alpha=6.0, targets=("q_proj", "up_proj")),
    "code": dl.DropLoRA(
        rank=3, alpha=3.0, targets=("q_proj", "down_proj"), exclude=(r"\.1\.",), init="pissa"
    ),
    "maths": dl.Learned(rank=2, rank_pattern={r"\.2\.": 1}, rank_stabilized=True),
}


@pytest.fixture(scope="module")
def base(untied):
    return dl.load(untied.path, dtype=jnp.float32)


@pytest.fixture(scope="module")
def models(base, tmp_path_factory) -> dict[str, dl.models.Decoder]:
    """Moved as training moves them: where a layer has no rank, there is nothing to move."""
    made = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = randomized(dl.inject(base, config, key=KEY), seed=seed, size=0.1)
        folder = tmp_path_factory.mktemp(name) / "adapter"
        dl.save_adapter(model, folder)
        made[name] = dl.load_adapter(base, folder)
    return made


def logits(model) -> np.ndarray:
    return np.asarray(model(jnp.asarray(TOKENS)))


def kernels(model) -> dict[str, np.ndarray]:
    plain = dl.merge(model)
    return {
        ".".join(map(str, path)): np.asarray(v[...])
        for path, v in nnx.to_flat_state(nnx.state(plain))
    }


def test_each_is_used_by_its_name_and_the_base_is_one(base, models):
    before = logits(base)
    seen = {name: logits(model) for name, model in models.items()}
    assert len({value.tobytes() for value in [before, *seen.values()]}) == 4
    bare = dl.without_adapters(models["chat"])
    np.testing.assert_array_equal(logits(bare), before)
    for path, node in nnx.iter_graph(bare):
        if isinstance(node, nnx.Linear):
            there = base
            for part in path:
                there = getattr(there, part)
            assert node.kernel.get_value() is there.kernel.get_value()


def test_one_is_trained_while_the_others_stay(models):
    others = {name: logits(model) for name, model in models.items() if name != "chat"}
    graphdef, adapters, mask_keys, frozen = dl.split(models["chat"])
    before = logits(models["chat"])
    moved = jax.tree.map(lambda x: x + 0.1, adapters)
    assert relative(logits(nnx.merge(graphdef, moved, mask_keys, frozen)), before) > 1e-2
    for name, expected in others.items():
        np.testing.assert_array_equal(logits(models[name]), expected)
    np.testing.assert_array_equal(logits(models["chat"]), before)


@pytest.mark.parametrize("names", [("chat", "code"), ("maths", "code", "chat"), ("code",)])
def test_a_weighted_sum_is_the_sum_of_what_each_does_to_every_kernel(base, models, names):
    weights = dict(zip(names, (0.7, -0.4, 1.5), strict=False))
    both = dl.combine({name: models[name] for name in names}, weights)
    plain, expected = kernels(base), kernels(base)
    for name, weight in weights.items():
        of_one = kernels(models[name])
        expected = {p: w + weight * (of_one[p] - plain[p]) for p, w in expected.items()}
    actual = kernels(both)
    assert actual.keys() == expected.keys()
    for path, kernel in expected.items():
        np.testing.assert_allclose(actual[path], kernel, rtol=1e-5, atol=1e-6, err_msg=path)
    assert relative(logits(both), logits(dl.merge(both))) < 1e-5


def test_the_sum_is_an_adapter_that_peft_reads_and_adds_up_too(base, models, untied, tmp_path):
    both = dl.combine({"chat": models["chat"], "maths": models["maths"]}, {"chat": 0.5, "maths": 2})
    dl.save_adapter(both, tmp_path / "both")
    assert relative(logits(dl.load_adapter(base, tmp_path / "both")), logits(both)) < 1e-6
    theirs = AutoModelForCausalLM.from_pretrained(untied.path, dtype=torch.float32)
    own = peft.PeftModel.from_pretrained(theirs, tmp_path / "both")
    assert relative(torch_logits(own.eval(), TOKENS), logits(both)) < 1e-5


def test_the_sum_equals_the_one_that_peft_makes(base, untied, tmp_path):
    """`add_weighted_adapter` of PEFT, which puts ranks side by side as well."""
    models = {}
    for seed, name in enumerate(("chat", "code")):
        model = randomized(dl.inject(base, CONFIGS["chat"], key=KEY), seed=seed, size=0.1)
        dl.save_adapter(model, tmp_path / name)
        models[name] = model
    theirs = AutoModelForCausalLM.from_pretrained(untied.path, dtype=torch.float32)
    other = peft.PeftModel.from_pretrained(theirs, tmp_path / "chat", adapter_name="chat")
    other.load_adapter(tmp_path / "code", adapter_name="code")
    weights = {"chat": 0.25, "code": 1.5}
    other.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    other.set_adapter("sum")
    both = dl.combine(models, weights)
    assert relative(torch_logits(other.eval(), TOKENS), logits(both)) < 1e-5
    ranks = {adapter.rank for adapter in adapters_of(both).values()}
    assert ranks == {8}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("weights", "'code' has no weight; the models are 'chat', 'code'"),
        ("infinite", "the weight of 'code' is inf"),
        ("plain", "'code' has no adapters"),
        ("dora", r"'code' is dora \(layers.*whose effect is no sum; merge"),
        ("whole", "'code' trains final_norm.scale whole"),
        ("base", "'chat', 'code' do not share a base"),
        ("none", "no models are given"),
    ],
)
def test_what_can_not_be_added_up(case, message, base, models, untied):
    given = {"chat": models["chat"], "code": models["code"]}
    weights = {"chat": 1.0, "code": 1.0}
    if case == "weights":
        weights = {"chat": 1.0}
    elif case == "infinite":
        weights["code"] = float("inf")
    elif case == "plain":
        given["code"] = base
    elif case == "dora":
        given["code"] = dl.inject(base, dl.DoRA(rank=2), key=KEY)
    elif case == "whole":
        given["code"] = dl.inject(base, dl.DropLoRA(rank=2, train_whole=("final_norm",)), key=KEY)
    elif case == "base":
        other = dl.load(untied.path, dtype=jnp.float32)
        given["code"] = dl.inject(other, CONFIGS["chat"], key=KEY)
    else:
        given, weights = {}, {}
    with pytest.raises(dl.InputError, match=message):
        dl.combine(given, weights)


def test_a_base_that_was_trained_whole_is_not_given_back(base):
    model = dl.inject(base, dl.DropLoRA(rank=2, train_whole=("final_norm",)), key=KEY)
    with pytest.raises(dl.InputError, match="final_norm.scale is trained whole"):
        dl.without_adapters(model)
