"""Decoding: the tokens of transformers' `generate`, whatever the batch, the mesh, the adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from data_fixtures import END, make_tokenizer
from flax import nnx
from oracles import Folder, model_folder, randomized
from run_fixtures import VOCAB, make_base
from small_models import load

import droplora_jax as dl
from droplora_jax.adapters.surgery import view
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import RULES
from droplora_jax.data.end_markers import EndMarkers
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.decode import apart
from droplora_jax.inference.generator import Generator, bucket, ending_ids

PROMPTS = ["Is 7 odd? ", "the answer", "Write a response that appropriately completes", "x", "1 2"]
NEW = 20

# What could differ between training and decoding, by family.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 6, "tie_word_embeddings": True, "rope_parameters": DYNAMIC},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def make_model(path, name: str) -> Folder:
    shape = {"vocab_size": VOCAB, "max_position_embeddings": 128}
    folder = model_folder(path, name, **{**shape, **MODELS[name]})
    make_tokenizer().save_pretrained(path)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(base_folder) -> nnx.Module:
    """No test changes it."""
    return load(base_folder)


@pytest.fixture(scope="module")
def generator(model, tokenizer) -> Generator:
    return Generator(model, tokenizer, batch_size=4)


def their_ids(model, tokenizer, ends, prompts=PROMPTS, new: int = NEW) -> list[list[int]]:
    """transformers' greedy completions of one batch, padded on the left."""
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    longest = max(map(len, ids))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=sorted(ends)[0],
    )[:, longest:].tolist()
    ended = [next((n for n, token in enumerate(row) if token in ends), len(row)) for row in out]
    return [row[:end] for row, end in zip(out, ended, strict=True)]


def theirs(model, tokenizer, ends, prompts=PROMPTS, new: int = NEW) -> list[str]:
    ids = their_ids(model, tokenizer, ends, prompts, new)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_transformers(tmp_path, tokenizer, name, strict):
    folder = make_model(tmp_path, name)
    generator = Generator(load(folder), tokenizer, batch_size=4)
    completions = generator(PROMPTS, Sampling(max_new_tokens=NEW))
    assert completions == theirs(folder.torch, tokenizer, generator.ends)
    assert len(set(completions)) == len(PROMPTS)


def test_a_long_row_is_in_many_steps_of_the_loop(base_folder, tokenizer, generator):
    """More new tokens than are looked at together, and than the sliding of any bucket."""
    sampling = Sampling(max_new_tokens=70)
    expected = theirs(base_folder.torch, tokenizer, generator.ends, PROMPTS[:2], 70)
    assert generator(PROMPTS[:2], sampling) == expected


DRAWN = Sampling(NEW, temperature=1.0, top_k=50, top_p=0.9, seed=3)


@pytest.mark.parametrize(
    ("mesh", "sampling"),
    [
        ({"tensor": 2, "data": 2, "context": 2}, Sampling(NEW)),
        ({"tensor": 4, "fsdp": 2}, DRAWN),  # more than there are key heads
        ({"fsdp": 4, "replica": 2}, DRAWN),
    ],
    ids=str,
)
def test_eight_devices_as_one(base_folder, tokenizer, generator, mesh, sampling):
    sharded = Generator(load(base_folder, dl.MeshConfig(**mesh)), tokenizer, batch_size=4)
    assert sharded(PROMPTS, sampling) == generator(PROMPTS, sampling)


def test_the_cache_is_split_over_the_mesh(base_folder):
    model = load(base_folder, dl.MeshConfig(tensor=2, fsdp=4))
    (cache,) = jax.jit(lambda: nnx.merge(*nnx.split(model)).empty_caches(8, 16))()
    for kept in (cache.k_LBKHS, cache.v_LBKSH):
        _, rows, heads, *_ = kept.sharding.shard_shape(kept.shape)
        assert (rows, heads) == (8 // 4, 2 // 2)
    assert RULES["heads"] == ("tensor",)


def test_a_stack_and_layers_by_themselves_decode_the_same(model, tokenizer, generator, monkeypatch):
    monkeypatch.setattr("droplora_jax.inference.generator.better_apart", lambda model: False)
    stacked = Generator(model, tokenizer, batch_size=4)
    assert len(nnx.merge(stacked._graphdef, stacked._state).stacks) == 1
    assert len(nnx.merge(generator._graphdef, generator._state).stacks) == 2
    sampling = Sampling(NEW)
    assert stacked(PROMPTS, sampling) == generator(PROMPTS, sampling)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"alpha_pattern": {r"\.1\.": 2.0}}], ids=["one", "by layer"]
)
def test_an_adapter_and_its_merge_give_the_same(
    base_folder, model, tokenizer, tmp_path, options, generator
):
    peft = pytest.importorskip("peft")
    config = dl.DropLoRA(rank=4, alpha=8, drop_rate=0.5, targets="all-linear", **options)
    tuned = randomized(dl.inject(model, config, key=dl.root_key(0)))
    dl.save_adapter(tuned, tmp_path / "adapter")
    sampling = Sampling(NEW)
    given = [
        Generator(adapted, tokenizer, batch_size=4)(PROMPTS, sampling)
        for adapted in (
            tuned,
            dl.load_adapter(model, tmp_path / "adapter"),
            dl.merge(tuned),
        )
    ]
    in_peft = peft.PeftModel.from_pretrained(make_copy(base_folder), tmp_path / "adapter").eval()
    expected = theirs(in_peft, tokenizer, generator.ends)
    assert given == [expected] * 3
    assert expected != generator(PROMPTS, sampling)


def make_copy(folder: Folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder.path).eval()


# --- sampling -------------------------------------------------------------------------------------


def test_what_is_drawn_depends_on_the_row_alone(model, tokenizer, generator):
    whole = generator(PROMPTS, DRAWN)
    assert Generator(model, tokenizer, batch_size=1)(PROMPTS, DRAWN) == whole
    assert generator(PROMPTS[2:], DRAWN, rows=[2, 3, 4]) == whole[2:]


def test_rows_and_seeds_differ(generator):
    same = generator([PROMPTS[0]] * 3, DRAWN)
    assert len(set(same)) == 3
    assert generator([PROMPTS[0]] * 3, DRAWN) == same
    assert generator([PROMPTS[0]] * 3, replace(DRAWN, seed=4)) != same


# --- ends -----------------------------------------------------------------------------------------


def with_ends(base_folder: Folder, path: Path, *ends: int) -> Path:
    """A copy of the folder whose generation_config.json names these tokens."""
    folder = Path(shutil.copytree(base_folder.path, path / "copy"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def test_every_eos_of_the_generation_config_ends_a_row(base_folder, tmp_path, tokenizer):
    (greedy,) = their_ids(base_folder.torch, tokenizer, {0}, PROMPTS[:1], 8)
    other = next(token for token in greedy[2:] if token not in greedy[:2])
    folder = with_ends(base_folder, tmp_path, other, 340)
    model = load(folder)
    assert ending_ids(model, tokenizer) == {other, 340, tokenizer.eos_token_id}
    (text,) = Generator(model, tokenizer, batch_size=4)(PROMPTS[:1], Sampling(NEW))
    assert text == tokenizer.decode(greedy[: greedy.index(other)], skip_special_tokens=True)
    (folder / "generation_config.json").write_text("{}")  # config.json counts then
    assert ending_ids(model, tokenizer) == {2, tokenizer.eos_token_id}


def test_a_finished_row_leaves_the_others_as_they_are(base_folder, tmp_path, tokenizer):
    ((first,),) = their_ids(base_folder.torch, tokenizer, {0}, PROMPTS[:1], 1)
    ending = Generator(load(with_ends(base_folder, tmp_path, first)), tokenizer, batch_size=4)
    completions = ending(PROMPTS, Sampling(NEW))
    assert completions[0] == ""
    assert completions == theirs(base_folder.torch, tokenizer, ending.ends)


def test_stop_strings_are_left_out_wherever_they_begin(generator):
    sampling = Sampling(NEW)
    whole = generator(PROMPTS, sampling)
    stop = whole[1][3:6]  # across tokens
    assert stop in whole[1]
    stopped = generator(PROMPTS, replace(sampling, stop=(stop, "never there")))
    assert stopped == [text.split(stop)[0] for text in whole]


def test_what_training_taught_ends_a_row(model, tokenizer, generator, base_folder):
    """Tokens as EOS does, and texts for which the tokenizer has no token."""
    (greedy,) = their_ids(base_folder.torch, tokenizer, generator.ends, PROMPTS[1:2])
    whole = generator(PROMPTS[1:2], Sampling(NEW))[0]
    text = whole[3:6]
    for markers in (EndMarkers((greedy[4],)), EndMarkers((), (text,))):
        ended = Generator(model, tokenizer, batch_size=4, end_markers=markers)
        by_token = tokenizer.decode(greedy[: greedy.index(greedy[4])], skip_special_tokens=True)
        expected = by_token if markers.token_ids else whole.split(text)[0]
        assert ended(PROMPTS[1:2], Sampling(NEW)) == [expected]
        assert "".join(ended.stream(PROMPTS[1], Sampling(NEW))) == expected


def test_a_special_token_can_stop(base_folder, model, tokenizer):
    end = tokenizer.convert_tokens_to_ids(END)
    ((first,),) = their_ids(base_folder.torch, tokenizer, {0}, ["x"], 1)
    model = view(model)
    head = np.array(model.lm_head.kernel[...])
    head[:, end] = 2 * head[:, first]  # the greatest logit is positive, and END's is twice it
    model.lm_head.kernel = nnx.Param(jnp.asarray(head))
    assert Generator(model, tokenizer, batch_size=4)(["x"], Sampling(NEW, stop=(END,))) == [""]


def test_a_stream_adds_up_to_the_completion(generator):
    for sampling in (Sampling(NEW), Sampling(NEW, stop=("es",))):
        for prompt in PROMPTS:
            pieces = list(generator.stream(prompt, sampling))
            assert "".join(pieces) == generator([prompt], sampling)[0]
            assert "" not in pieces


def test_the_text_of_the_prompt_does_not_come_back(generator, tokenizer):
    """A character whose bytes are in several tokens, some of them in the prompt."""
    ids = tokenizer("é").input_ids
    assert len(ids) == 3
    assert generator._text(ids[:2], ids[2:]) == "é"
    assert generator._text(tokenizer("a b").input_ids, tokenizer(" c").input_ids[1:]) == " c"


# --- prompts --------------------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are(generator, tokenizer):
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    sampling = Sampling(NEW)
    assert generator(ids, sampling) == generator(PROMPTS, sampling)
    assert generator([ids[0][1:]], sampling) != generator(PROMPTS[:1], sampling)


def test_special_tokens_that_are_there_are_not_doubled(generator):
    assert generator(["<s>x"], Sampling(NEW)) == generator(["x"], Sampling(NEW))


def test_no_prompts(generator):
    assert generator([]) == []


def test_more_than_the_model_has_positions(generator, tokenizer):
    longest = Sampling(128 - len(tokenizer(PROMPTS[0]).input_ids))
    generator.check("x", tokenizer(PROMPTS[0]).input_ids, longest)
    with pytest.raises(InputError, match=r"prompt 1: its \d+ tokens.*are 129, more than 128"):
        generator(PROMPTS[:1], replace(longest, max_new_tokens=longest.max_new_tokens + 1))


def test_dynamic_scaling_only_within_the_original_length(tmp_path, tokenizer):
    path = tmp_path / "base"
    make_base(path, rope_parameters=DYNAMIC | {"max_position_embeddings": 32})
    generator = Generator(load(path), tokenizer)
    assert generator.longest == 32
    with pytest.raises(InputError, match="more than 32: beyond, rotary scaling 'dynamic'"):
        generator(["x"], Sampling(31))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: must be"),
        ({"temperature": float("nan")}, "temperature=nan: must be"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5: must be above 0"),
        ({"top_p": 0.5}, "nothing is drawn at temperature 0"),
        ({"stop": ("",)}, "must not hold an empty text"),
        ({"seed": -1}, "seed=-1: must be from 0"),
    ],
)
def test_sampling_that_makes_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_buckets_are_few_and_fit():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * n for n, size in enumerate(sizes, 1) if n > 16)
    assert len(set(sizes)) == 17


def test_layers_by_themselves_lie_in_the_memory_of_the_stack(model):
    pointer = lambda x: x.addressable_shards[0].data.unsafe_buffer_pointer()  # noqa: E731
    whole = model.layers.up_proj.kernel[...]
    for i, layer in enumerate(apart(model).stacks):
        own = layer.up_proj.kernel[...]
        assert own.shape == (1, *whole.shape[1:])
        assert pointer(own) == pointer(whole) + i * own.nbytes
