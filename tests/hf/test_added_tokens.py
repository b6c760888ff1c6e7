"""Special tokens that are added to a base: their ids, their rows, and what exports have of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from data_fixtures import END, EOS, make_tokenizer
from flax import nnx
from oracles import randomized, relative, torch_logits
from run_fixtures import VOCAB, factors, make_base, write_jsonl, write_run
from safetensors.torch import load_file, save_file
from small_models import load
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

import droplora_jax as dl
from droplora_jax.core.errors import InputError
from droplora_jax.hf.base import Base

TOKENS = ("<|im_start|>", END, "<|im_end|>")  # the base has one of them
NEW = ("<|im_start|>", "<|im_end|>")
KNOWN = len(make_tokenizer())
PARAMETERS = {"model.embed_tokens.weight": "embed", "lm_head.weight": "lm_head"}
ENDS = ("embed", "lm_head")


@nnx.jit
def forward(model, tokens):
    return model(tokens)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """With rows to spare, with one, with none, and with fewer rows than tokens; tied or not."""
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"spare": VOCAB, "one": KNOWN + 1, "none": KNOWN, "fewer": KNOWN - 1}
    for name, rows in sizes.items():
        make_base(folder / name, vocab_size=rows)
    make_base(folder / "tied", vocab_size=KNOWN, tie_word_embeddings=True)
    for name in ("copy", "head"):
        shutil.copytree(folder / "tied", folder / name)
        write_head(folder / name, embedding=name == "copy")
    make_base(folder / "half", vocab_size=KNOWN + 1, dtype=torch.bfloat16)
    return {path.name: path for path in folder.iterdir()}


def write_head(base: Path, *, embedding: bool) -> None:
    """Let the file of a tied base hold its head too, or in place of the embedding."""
    tensors = stored(base)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    table = tensors.pop("model.embed_tokens.weight")
    tensors["lm_head.weight"] = table.clone()
    tensors |= {"model.embed_tokens.weight": table} if embedding else {}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", ["spare", "one", "none", "fewer", "tied", "half"])
def test_ids_are_those_of_transformers_and_rows_the_mean_of_the_others(bases, name):
    theirs = AutoTokenizer.from_pretrained(bases[name])
    special = [AddedToken(text, special=True, normalized=False) for text in TOKENS]
    theirs.add_special_tokens({"additional_special_tokens": special})
    base = Base.open(bases[name]).with_tokens(TOKENS)
    assert base.tokenizer.get_vocab() == theirs.get_vocab()
    text = f"a {NEW[0]}b{NEW[1]} c{END}"
    assert base.tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    assert base.tokenizer.decode(theirs(text)["input_ids"], skip_special_tokens=True) == "a b c"

    model = load(bases[name], add_tokens=TOKENS)
    tables = {k: v for k, v in stored(bases[name]).items() if k in PARAMETERS}
    assert len(tables) == (1 if name == "tied" else 2)
    for tensor, table in tables.items():
        known, rows = min(KNOWN, len(table)), max(len(table), len(theirs))
        expected = torch.zeros(rows, table.shape[1])
        expected[: len(table)] = table.float()
        mean = table[:known].float().mean(0).to(table.dtype).float()
        expected[known : len(theirs)] = mean
        module = getattr(model, PARAMETERS[tensor])
        ours = module.embedding[...] if tensor != "lm_head.weight" else module.kernel[...].T
        assert ours.shape == expected.shape
        new = np.arange(known, len(theirs))
        np.testing.assert_allclose(ours[new], expected[new], atol=1e-2 if name == "half" else 1e-6)
        np.testing.assert_array_equal(np.delete(ours, new, 0), np.delete(expected, new, 0))


def test_tokens_that_the_tokenizer_has_change_nothing(bases):
    base = Base.open(bases["none"])
    assert base.with_tokens(()) is base
    assert base.with_tokens((END, EOS)) is base
    ordinary = base.with_tokens(("t",))  # one token, in any word
    assert (ordinary.shape, len(ordinary.tokenizer)) == (base.shape, KNOWN)
    assert ordinary.tokenizer("t")["input_ids"] == base.tokenizer("t")["input_ids"]
    assert ordinary.source.added.first == ordinary.source.added.stop
    with pytest.raises(InputError, match="a token is a text that is not empty"):
        base.with_tokens(("<|a|>", ""))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("none", {"train_whole": ENDS}),
        ("spare", {"train_whole": ENDS}),
        ("tied", {"train_whole": ("embed",)}),
        ("copy", {"train_whole": ("embed",)}),
        ("copy", {}),
        ("head", {"train_whole": ("embed",)}),
        ("head", {}),
        ("none", {"targets": ("q_proj", *ENDS)}),
        ("spare", {"targets": ("q_proj", *ENDS)}),
        ("spare", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "frozen",
)
def test_exports_are_right_in_transformers_and_peft(bases, tmp_path, name, options):
    config = dl.DropLoRA(**{"rank": 2, "targets": "q_proj", **options})
    model = dl.inject(load(bases[name], add_tokens=TOKENS), config, key=dl.root_key(0))
    model = randomized(model)
    rows = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(1, KNOWN + 2, (2, 24), dtype=np.int32)
    tokens[0, :2] = KNOWN, KNOWN + 1
    expected = forward(model, tokens)

    dl.save_merged(model, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert theirs.config.vocab_size == rows
    assert relative(torch_logits(theirs, tokens), expected) < 1e-5
    dl.save_adapter(model, tmp_path / "adapter")
    for folder in ("merged", "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer.convert_tokens_to_ids(list(NEW)) == [KNOWN, KNOWN + 1]
        added = tokenizer.added_tokens_decoder
        assert all(added[id].special and not added[id].normalized for id in (KNOWN, KNOWN + 1))

    theirs = AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    theirs.resize_token_embeddings(max(theirs.config.vocab_size, len(tokenizer)))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert relative(torch_logits(theirs, tokens), expected) < 1e-5

    for added in ((), TOKENS):
        ours = dl.load_adapter(load(bases[name], add_tokens=added), tmp_path / "adapter")
        assert relative(forward(ours, tokens), expected) < 1e-6
    dl.save_adapter(ours, tmp_path / "again")
    assert factors(tmp_path / "again").keys() == factors(tmp_path / "adapter").keys()


def test_an_adapter_whose_tables_lack_the_tokens_is_refused(bases, tmp_path):
    config = dl.DropLoRA(rank=2, targets="q_proj", train_whole=ENDS)
    dl.save_adapter(
        dl.inject(load(bases["none"]), config, key=dl.root_key(0)), tmp_path / "adapter"
    )
    with pytest.raises(InputError, match=r"added to the base .*open the base without add_tokens"):
        dl.load_adapter(load(bases["none"], add_tokens=TOKENS), tmp_path / "adapter")


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def run(bases, tmp_path) -> Path:
    """A run that adds the tokens of a chat template to a base that lacks them."""
    base = Path(shutil.copytree(bases["none"], tmp_path / "base"))
    make_tokenizer(chat_template=CHAT).save_pretrained(base)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "is"}]}
        for n in range(16)
    ]
    return write_run(
        base,
        tmp_path,
        model={"add_tokens": list(TOKENS)},
        adapter={"rank": 2, "targets": ["q_proj"]},
        data={"train": write_jsonl(tmp_path / "rows.jsonl", rows), "valid": ...},
        optim={"warmup_steps": 0},
        train={"steps": 2, "save_every": 1, "eval_every": ...},
    )


def logits(folder: Path) -> np.ndarray:
    tokens = np.array([[1, KNOWN, 5, KNOWN + 1]], np.int32)
    opened = dl.open_model(str(folder))
    assert opened.tokenizer.convert_tokens_to_ids(list(NEW)) == [KNOWN, KNOWN + 1]
    assert KNOWN + 1 in opened.end_markers.token_ids or folder.name == "merged"
    return np.asarray(forward(opened.model, tokens))


def test_a_run_adds_tokens_and_all_that_is_made_of_it_has_them(run, tmp_path, droplora):
    refused = droplora("train", run, "--dry-run")
    assert refused.code == 2
    said = " ".join(refused.err.split())
    assert "the frozen embed and lm_head would keep it so" in said
    assert "adapter.train_whole='[embed, lm_head]'" in said

    ends = "adapter.train_whole=[embed,lm_head]"
    droplora.good("train", run, ends, "--dry-run")
    droplora.good("train", run, ends)
    droplora.good("train", run, ends, "train.steps=3")
    changed = droplora("train", run, ends, "train.steps=4", "model.add_tokens=[]")
    assert changed.code == 2
    assert "model.add_tokens: " in changed.err

    folder = tmp_path / "run"
    expected = logits(folder)
    droplora.good("export", folder, "--to", tmp_path / "merged", "--format", "merged")
    droplora.good("export", folder, "--to", tmp_path / "peft", "--format", "peft")
    droplora.good("inspect", folder / "adapter")
    for made in (folder / "adapter", tmp_path / "merged", tmp_path / "peft"):
        assert relative(logits(made), expected) < 1e-5
    shutil.rmtree(folder / "checkpoints")
    assert relative(logits(folder), expected) < 1e-5

    on = (ends, f"model.adapter={folder / 'adapter'}", f"output={tmp_path / 'second'}")
    droplora.good("train", run, *on, "--dry-run")
    droplora.good("train", run, *on, "model.add_tokens=[]", "train.steps=1")
    assert dl.open_model(str(tmp_path / "second")).model.config.vocab_size == KNOWN + 2
    more = droplora("train", run, *on, "model.add_tokens=[<|other|>]", "--dry-run")
    assert more.code == 2
    assert "was trained without them" in " ".join(more.err.split())
