"""lm-evaluation-harness on our models says what it says on transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Folder
from run_fixtures import make_base

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from droplora_jax.core.errors import InputError
from droplora_jax.inference.harness import HarnessModel
from droplora_jax.runs.open_model import open_model

LENGTH = 96
PAIRS = [
    ("the answer is", " true"),
    ("the answer is ", "false: 0 1 2"),
    ("### Instruction: odd? 7", " the answer is true, the answer is false"),
    ("a", "b"),
    ("", "the answer"),
    ("Write a response " * 40, "that appropriately completes the request."),  # too long: cut
    ("request.", " the answer is" * 25),  # a continuation of most positions
    ("Café, 你好:", " 🙂"),  # tokens of bytes
]
TEXTS = ["the answer is true", "x", "", "Below is an instruction that describes a task. " * 30]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_base(tmp_path_factory.mktemp("base"), max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def ours(base: Folder) -> HarnessModel:
    opened = open_model(str(base.path), dtype="float32")
    return HarnessModel(opened.model, opened.tokenizer, batch_size=3)


@pytest.fixture(scope="module")
def theirs(base: Folder) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(base.path), device="cpu", dtype="float32", batch_size=3)


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=given) for given in arguments]


def by_hand(base: Folder, ids: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` ids, with PyTorch."""
    with torch.no_grad():
        logits = base.torch(torch.tensor([ids[:-1]])).logits[0].float()
    scored, targets = logits[-count:], torch.tensor(ids[-count:])
    values = torch.log_softmax(scored, -1)[torch.arange(count), targets]
    return float(values.sum()), bool((scored.argmax(-1) == targets).all())


def test_log_likelihoods_are_those_of_pytorch(base, ours):
    found = ours.loglikelihood(requests(*PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        if context == "":
            ids = [ours.prefix_token_id, *ours.tok_encode(continuation, add_special_tokens=False)]
            count = len(ids) - 1
        else:
            ids = ours.tok_encode(context + continuation)
            count = len(ids) - len(ours.tok_encode(context.rstrip()))
        expected = by_hand(base, ids[-LENGTH - 1 :], count)
        assert (value, greedy) == (pytest.approx(expected[0], rel=1e-4, abs=1e-4), expected[1])


def test_log_likelihoods_are_those_of_the_harness_own_model(ours, theirs):
    found, expected = (model.loglikelihood(requests(*PAIRS)) for model in (ours, theirs))
    np.testing.assert_allclose(*([v for v, _ in each] for each in (found, expected)), rtol=1e-4)
    assert [g for _, g in found] == [g for _, g in expected]


def test_a_continuation_within_the_last_token_of_its_context_is_encoded_alone(ours):
    def tokens(text):
        return ours.tok_encode(text, add_special_tokens=False)

    words = ("instruction", "response", "answer")
    cuts = [(word[:at], word[at:]) for word in words for at in range(1, len(word))]
    context, rest = next(
        ("the " + a, b) for a, b in cuts if len(tokens("the " + a + b)) <= len(tokens("the " + a))
    )
    spanning, alone = ours._encode_pair(context, rest), tokens(rest)
    assert spanning == (ours.tok_encode(context), alone)
    assert ours._encode_pair(" ", "answer") == ([ours.prefix_token_id], tokens(" answer"))
    ((value, _),) = ours.loglikelihood(requests((context, rest)))
    assert value < 0


def test_a_continuation_without_tokens_has_no_score(ours, theirs):
    with pytest.raises(InputError, match="the answer.* has no tokens"):
        ours.loglikelihood(requests(("the answer", "")))
    with pytest.raises(AssertionError):
        theirs.loglikelihood(requests(("the answer", "")), disable_tqdm=True)


def test_what_is_likeliest_is_said_to_be(ours):
    (said,) = ours.generate_until(requests(("the answer", {"until": [], "max_gen_toks": 3})))
    context = ours.tok_encode("the answer")
    ids = ours.tok_encode("the answer" + said)
    (value, greedy) = ours._loglikelihood_tokens([(None, context, ids[len(context) :])])[0]
    assert greedy
    assert value < 0
    (_, other) = ours._loglikelihood_tokens([(None, context, [ids[len(context)] - 1])])[0]
    assert not other


def test_whole_texts_are_scored_in_the_same_windows(ours, theirs):
    given = requests(*((text,) for text in TEXTS))
    found, expected = (model.loglikelihood_rolling(given) for model in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len(ours.tok_encode(TEXTS[-1])) > 3 * LENGTH


@pytest.mark.parametrize(
    "how",
    [
        {"until": [], "max_gen_toks": 12, "do_sample": False},
        {"until": ["e", "\n"], "max_gen_toks": 20},
        {"until": "a", "max_gen_toks": 20, "temperature": 0.0},
    ],
)
def test_completions_are_those_of_the_harness_own_model(ours, theirs, how):
    given = requests(*((context, how) for context, _ in PAIRS if context))
    assert ours.generate_until(given) == theirs.generate_until(given)


def test_what_cannot_be_done_is_said(ours):
    with pytest.raises(InputError, match=f"asks for {LENGTH} new tokens"):
        ours.generate_until(requests(("a", {"until": [], "max_gen_toks": LENGTH})))
    with pytest.raises(InputError, match=f"the model is made for {LENGTH}"):
        ours.loglikelihood(requests(("a", " the answer is" * 90)))
    with pytest.raises(InputError, match="num_beams"):
        ours.generate_until(requests(("a", {"until": [], "num_beams": 4})))


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: [" true", " false"]
num_fewshot: 0
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


def test_tasks_of_a_local_file_give_the_same_scores(tmp_path: Path, monkeypatch, ours, theirs):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"odd? {n} the answer is", "label": n % 2, "answer": "x"} for n in range(16)
    ]
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"choice": CHOICE, "generate": GENERATE, "rolling": ROLLING}.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = ["tiny_choice", "tiny_generate", "tiny_rolling"]
    found, expected = (
        lm_eval.simple_evaluate(model, tasks=names, task_manager=tasks, bootstrap_iters=0)
        for model in (ours, theirs)
    )
    for name in names:
        for key, value in expected["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    samples, others = (each["samples"]["tiny_choice"] for each in (found, expected))
    assert 0 < len(samples) == len(others) == len(rows)
    assert [one["filtered_resps"][0][1] for one in samples] == [
        one["filtered_resps"][0][1] for one in others
    ]
