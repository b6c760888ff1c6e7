"""A model from wherever it lies: base, merged, run, adapter."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from data_fixtures import CHATML, END
from fake_step import use
from oracles import relative
from run_fixtures import write_run

import droplora_jax as dl
from droplora_jax.core.errors import InputError
from droplora_jax.data.end_markers import EndMarkers
from droplora_jax.hf.generation_config import eos_ids
from droplora_jax.hf.tokenizer import load_tokenizer
from droplora_jax.runs.open_model import decoding_mesh, find_model, open_model

TOKENS = np.arange(1, 9, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    from droplora_jax import cli

    folder = tmp_path_factory.mktemp("trained")
    assert (
        cli.main(["train", str(write_run(base, folder, train={"steps": 4, "eval_every": 2}))]) == 0
    )
    return folder / "run"


def logits(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: model(tokens))(TOKENS))


def opened_logits(*arguments, **options) -> np.ndarray:
    return logits(open_model(*map(str, arguments), **options).model)


def test_a_base(base):
    opened = open_model(str(base))
    assert relative(logits(opened.model), logits(dl.load(base, dtype="float32"))) < 1e-6
    assert (opened.template, opened.tokenizer.eos_token) == (None, "</s>")
    assert opened.model.dtype == "float32"
    assert open_model(str(base), dtype="bfloat16").model.dtype == "bfloat16"


def test_a_run_its_adapter_and_its_merge_are_one_model(base, run, tmp_path, droplora):
    droplora.good("export", run, "--to", tmp_path / "merged", "--format", "merged")
    of_run = open_model(str(run))
    assert of_run.template == "alpaca"
    assert of_run.end_markers == EndMarkers((of_run.tokenizer.eos_token_id,))
    assert open_model(str(run / "adapter")).end_markers == of_run.end_markers
    assert set(of_run.end_markers.token_ids) <= set(eos_ids(tmp_path / "merged"))
    assert relative(logits(of_run.model), opened_logits(base)) > 1e-3
    for arguments in ((run / "adapter",), (base, run / "adapter"), (tmp_path / "merged",)):
        assert relative(opened_logits(*arguments), logits(of_run.model)) < 1e-5
    assert open_model(str(base), str(run / "adapter")).template == "alpaca"
    assert open_model(str(run / "adapter")).template == "alpaca"


def test_a_checkpoint_of_a_run(run):
    last, best = (opened_logits(run, step=step) for step in ("last", "best"))
    np.testing.assert_array_equal(last, opened_logits(run, step="4"))
    assert np.isfinite(best).all()
    with pytest.raises(InputError, match="99"):
        open_model(str(run), step="99")


def test_a_run_without_checkpoints_has_its_adapter(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(moved / "checkpoints")
    np.testing.assert_array_equal(opened_logits(moved), opened_logits(run))
    with pytest.raises(InputError, match="no complete checkpoint"):
        open_model(str(moved), step="4")
    shutil.rmtree(moved / "adapter")
    with pytest.raises(InputError, match="no complete checkpoint"):
        open_model(str(moved))


def test_several_adapters_are_their_weighted_sum(base, run, tmp_path, droplora):
    early, late = tmp_path / "a=b", run / "adapter"
    droplora.good("export", run, "--to", early, "--format", "peft", "--step", "2")
    loaded = dl.load(base, dtype="float32")
    models = {str(folder): dl.load_adapter(loaded, folder) for folder in (early, late)}
    expected = logits(dl.combine(models, {str(early): 1.0, str(late): -0.5}))
    names = [str(early), f"{late}=-0.5"]
    opened = open_model(str(base), names)
    np.testing.assert_array_equal(logits(opened.model), expected)
    assert opened.template == "alpaca"
    droplora.good("export", *names, "--to", tmp_path / "sum", "--format", "merged")
    assert relative(opened_logits(tmp_path / "sum"), expected) < 1e-5
    droplora.good("export", *names, "--to", tmp_path / "one", "--format", "peft")
    assert relative(opened_logits(base, tmp_path / "one"), expected) < 1e-6
    half = open_model(str(base), [f"{late}=0.5"]).model
    assert relative(logits(half), opened_logits(base, late)) > 1e-4
    assert relative(opened_logits(base, late), opened_logits(run)) < 1e-6


def chat_tokenizer(base):
    """The base's with ChatML, an added token and another EOS."""
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>", END]})
    tokenizer.eos_token, tokenizer.chat_template = END, CHATML
    return tokenizer


def assert_same_tokenizer(folder, tokenizer) -> None:
    loaded = load_tokenizer(folder)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.chat_template) == (END, CHATML)


def test_an_adapter_s_own_tokenizer_is_used_wherever_the_adapter_is(
    base, run, tmp_path, droplora, monkeypatch
):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    tokenizer = chat_tokenizer(base)
    tokenizer.save_pretrained(adapter)
    for files in (find_model(str(adapter)), find_model(str(base), str(adapter))):
        assert files.base.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert files.base.tokenizer.chat_template == CHATML
    said = droplora.good("export", adapter, "--to", tmp_path / "merged", "--format", "merged")
    assert "the tokenizer and its chat templates are the adapter's" in said
    assert_same_tokenizer(tmp_path / "merged", tokenizer)
    assert tokenizer.eos_token_id in eos_ids(tmp_path / "merged")
    droplora.good("export", adapter, "--to", tmp_path / "peft", "--format", "peft")
    assert_same_tokenizer(tmp_path / "peft", tokenizer)

    # Trained on from it: the data, the adapter that comes out, and all that is made of it.
    use(monkeypatch)
    (tmp_path / "later").mkdir()
    later = {"model": {"adapter": str(adapter)}, "data": {"template": "chat"}}
    file = write_run(base, tmp_path / "later", train={"steps": 4}, **later)
    assert "<|start|>user" in droplora.good("train", file)
    trained = tmp_path / "later" / "run"
    assert_same_tokenizer(trained / "adapter", tokenizer)
    shutil.rmtree(adapter)
    assert find_model(str(trained / "adapter")).base.tokenizer.chat_template == CHATML
    with pytest.raises(InputError, match=r"no such folder.*model\.adapter="):
        find_model(str(trained))
    shutil.rmtree(trained / "checkpoints")
    assert find_model(str(trained)).base.tokenizer.chat_template == CHATML


def test_tokenizers_of_several_adapters_have_to_be_one(base, run, tmp_path):
    folders = [shutil.copytree(run / "adapter", tmp_path / name) for name in "ab"]
    for folder in folders:
        chat_tokenizer(base).save_pretrained(folder)
    names = [str(folder) for folder in folders]
    assert find_model(str(base), names).base.tokenizer.chat_template == CHATML
    (folders[1] / "chat_template.jinja").write_text("another")
    with pytest.raises(InputError, match="bring different tokenizers"):
        find_model(str(base), names)


def test_an_adapter_where_a_base_is_expected(base, run, tmp_path, droplora):
    adapter = run / "adapter"
    result = droplora("train", write_run(adapter, tmp_path))
    assert result.code == 2
    assert f"config.json: missing; the folder holds an adapter for {base}" in result.err
    assert f"model.adapter={adapter}" in result.err
    shutil.copytree(adapter, tmp_path / "above" / "one")
    result = droplora("export", tmp_path / "above", "--to", tmp_path / "out", "--format", "merged")
    assert f"name one: {tmp_path / 'above' / 'one'}" in result.err


def test_what_adapters_can_not_be_added_is_said(base, run, tmp_path, droplora):
    adapter = run / "adapter"
    with pytest.raises(InputError, match="is named twice"):
        open_model(str(base), [str(adapter), f"{adapter}=2"])
    with pytest.raises(InputError, match="half: no such folder, and no DIR=WEIGHT"):
        open_model(str(base), [f"{adapter}=half"])
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "another/base"})
    )
    result = droplora("export", adapter, other, "--to", tmp_path / "out", "--format", "merged")
    assert result.code == 2
    assert f"{other} is for the base another/base" in result.err
    assert not (tmp_path / "out").exists()
    droplora.good(
        "export", adapter, other, "--base", base, "--to", tmp_path / "out", "--format", "merged"
    )


def test_what_does_not_go_together(base, run):
    with pytest.raises(InputError, match="has an adapter of its own"):
        open_model(str(run), str(run / "adapter"))
    with pytest.raises(InputError, match="only a run has several"):
        open_model(str(base), step="best")
    with pytest.raises(InputError, match="no such folder"):
        open_model("/nowhere/at/all")


def test_devices_go_along_tensor_as_far_as_there_are_heads(base):
    shape = open_model(str(base)).model.config
    assert dict(decoding_mesh(shape).shape) == {
        "replica": 1, "data": 1, "fsdp": 4, "tensor": 2, "context": 1
    }  # fmt: skip
