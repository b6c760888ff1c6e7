"""Tokens that a frozen embedding or head can't tell apart are named before a run begins."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import BOS, CHATML, END, EOS, START, make_tokenizer
from run_fixtures import make_base, write_jsonl
from safetensors.numpy import load_file, save_file

from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.data.end_markers import EndMarkers
from droplora_jax.data.load import load
from droplora_jax.hf.base import Base
from droplora_jax.runs.special_tokens import UsedTokens, check_added_tokens, check_special_tokens

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied_or_not(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_base(path, tie_word_embeddings=request.param)
    make_tokenizer(chat_template=CHATML).save_pretrained(path)
    return path, request.param


def used_by(base: Base, tmp_path: Path, tokenizer) -> UsedTokens:
    file = write_jsonl(tmp_path / "rows.jsonl", [CHAT])
    rows, report = load(file, tokenizer, DataConfig(train=file, cache=str(tmp_path / "cache")))
    return UsedTokens.of(rows, EndMarkers.of(report.end_markers, tokenizer), base)


def changed(folder: Path, tmp_path: Path, tensor: str, change) -> Path:
    """A copy of a base in which a function has changed a tensor."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for file in copy.glob("*.safetensors"):
        tensors = {name: np.array(value) for name, value in load_file(file).items()}
        if tensor in tensors:
            change(tensors[tensor])
        save_file(tensors, file, metadata={"format": "pt"})
    return copy


def check(folder: Path, tmp_path: Path, trained=(), targets="paper") -> list[str]:
    base = Base.open(folder)
    used = used_by(base, tmp_path, base.tokenizer)
    return list(check_special_tokens(used, base, trained, targets))


def test_a_base_whose_rows_differ_is_right(tied_or_not, tmp_path):
    assert check(tied_or_not[0], tmp_path) == []


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_an_end_that_the_frozen_head_can_not_tell_apart_is_an_error(tied_or_not, tmp_path, noise):
    folder, tied = tied_or_not
    end, unused = make_tokenizer().convert_tokens_to_ids([END, EOS])

    def share(table):
        table[end] = table[unused] * (1 + noise)

    copy = changed(folder, tmp_path, EMBED if tied else HEAD, share)
    module, ends = ("embed", "embed") if tied else ("lm_head", "embed, lm_head")
    with pytest.raises(InputError) as info:
        check(copy, tmp_path)
    (message,) = info.value.problems
    assert f"the frozen {module} has the same row for '{END}' ({end}) and for '{EOS}' (" in message
    assert f"set adapter.targets='[paper, {ends}]'" in message
    assert check(copy, tmp_path, trained=["layers", module]) == []


@pytest.mark.parametrize("value", [0.0, -1e-20])
def test_an_end_whose_row_is_zero_is_an_error(tied_or_not, tmp_path, value):
    folder, tied = tied_or_not
    end = make_tokenizer().convert_tokens_to_ids(END)
    copy = changed(folder, tmp_path, EMBED if tied else HEAD, lambda table: table[end].fill(value))
    with pytest.raises(InputError, match="a row of zeros for .* can't learn to write them"):
        check(copy, tmp_path)


def test_tokens_that_are_read_alike_are_a_warning(tied_or_not, tmp_path):
    folder, tied = tied_or_not
    start, unused, end = make_tokenizer().convert_tokens_to_ids([START, BOS, END])

    def share(table):
        table[start] = table[unused]

    assert check(changed(folder, tmp_path, EMBED, share), tmp_path) == []  # BOS is not in the rows
    if tied:
        return

    def share_with_the_end(table):
        table[start] = table[end]

    copy = changed(folder, tmp_path / "again", EMBED, share_with_the_end)
    (warning,) = check(copy, tmp_path, targets=("paper", "lm_head"), trained=["lm_head"])
    assert f"'{START}' ({start}), '{END}' ({end})" in warning
    assert "set adapter.targets='[paper, lm_head, embed]'" in warning
    assert check(copy, tmp_path, trained=["embed"]) == []


def test_rows_of_added_tokens_that_stay_frozen_are_an_error(tied_or_not):
    folder, tied = tied_or_not
    base = Base.open(folder)
    check_added_tokens(base.with_tokens([START]), [], "paper")  # the tokenizer has it
    base, ends = base.with_tokens(["<|new|>"]), ["embed"] if tied else ["embed", "lm_head"]
    check_added_tokens(base, ends, "paper")
    with pytest.raises(InputError) as info:
        check_added_tokens(base, ends[1:], "paper")
    (message,) = info.value.problems
    assert message.startswith("model.add_tokens=['<|new|>']: ")
    assert "the frozen embed would keep it so" in message
    assert f"adapter.train_whole='[{', '.join(ends)}]'" in message
