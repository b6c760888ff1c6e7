"""Masks in the training loops of other libraries."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import randomized, relative
from tunix_fixtures import KEY, TARGETS, TOKENS, B, inputs, tunix_model

import droplora_jax as dl
from droplora_jax.adapters.interop.trainers import masked_loss, numbered

EXAMPLES = Path(__file__).parents[3] / "examples"
ROWS = jnp.arange(B)


class Line(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


def square(model, x):
    return jnp.mean(model(x) ** 2)


def line() -> nnx.Module:
    return randomized(dl.inject(Line(), dl.DropLoRA(rank=8, targets="layer"), key=KEY))


def test_batches_are_numbered_by_step_and_row():
    batches = [{"x": np.full((3, 2), n)} for n in range(4)]
    one, two = list(numbered(batches)), list(numbered(batches, microbatches=2))
    assert [int(b["step"]) for b in one] == [0, 1, 2, 3]
    assert [b["rows"].tolist() for b in one] == [[0, 1, 2]] * 4
    assert [int(b["step"]) for b in two] == [0, 0, 1, 1]
    assert [b["rows"].tolist() for b in two] == [[0, 1, 2], [3, 4, 5]] * 2
    for ours, batch in zip(one, batches, strict=True):
        assert ours["x"] is batch["x"]


@pytest.mark.parametrize(
    ("batch", "message"), [((1, 2), "is a tuple"), ({"rows": np.ones(2)}, r"\['rows'\] already")]
)
def test_batches_that_cannot_be_numbered(batch, message):
    with pytest.raises(dl.InputError, match=message):
        list(numbered([batch]))


def test_a_loss_has_the_masks_of_its_batch():
    model, loss = line(), masked_loss(square, KEY)
    x = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    batches = list(numbered([{"x": x}] * 2))
    losses = [float(nnx.jit(loss)(model, **batch)) for batch in batches]
    assert losses[0] != losses[1]
    for step, value in enumerate(losses):
        view = dl.masked(model, jax.random.fold_in(KEY, step), rows=jnp.arange(3))
        assert value == pytest.approx(float(square(view, jnp.asarray(x))), rel=1e-6)


def test_rates_that_change_over_a_run():
    config = dl.DropLoRA(rank=8, targets="layer", drop_warmup_steps=1)
    model = randomized(dl.inject(Line(), config, key=KEY))
    x = jnp.ones((2, 8))
    losses = [
        float(masked_loss(square, KEY, share=config.share(4))(model, **batch))
        for batch in numbered([{"x": x}] * 2)
    ]
    assert losses[0] == pytest.approx(float(square(model, x)), rel=1e-6)  # nothing is dropped yet
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)


def test_microbatches_of_a_step_have_the_masks_of_the_whole_step():
    model, loss = line(), masked_loss(square, KEY)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 8)), jnp.float32)
    (whole,) = numbered([{"x": x}])
    halves = list(numbered([{"x": x[:2]}, {"x": x[2:]}], microbatches=2))
    parts = [float(loss(model, **batch)) for batch in halves]
    assert np.mean(parts) == pytest.approx(float(loss(model, **whole)), rel=1e-6)


def test_training_on_batches_without_a_number_is_an_error():
    with pytest.raises(dl.InputError, match=r"no 'step' and 'rows'.*numbered\(batches\)"):
        masked_loss(square, KEY)(line(), x=np.ones((2, 8)))


# Tunix's trainer.


def next_token(model, input_tokens, positions, attention_mask):
    logits, _ = model(input_tokens, positions, None, attention_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], input_tokens[:, 1:])
    return losses.mean()


def model_input(batch):
    return {**batch, **inputs(batch["input_tokens"])}


class Losses:
    """What a trainer's steps and evaluations came to."""

    def __init__(self):
        self.train, self.evaluation = [], []

    def on_train_start(self, trainer): ...

    def on_train_end(self, trainer): ...

    def on_train_step_start(self, trainer): ...

    def on_eval_step_start(self, trainer): ...

    def on_train_step_end(self, trainer, step, loss):
        self.train.append(float(loss))

    def on_eval_step_end(self, trainer, loss):
        self.evaluation.append(float(loss))


def train(model, optimizer, *, steps=3, accumulate=None, folder=None) -> Losses:
    """Some steps of Tunix's trainer on one batch again and again, evaluated after each."""
    peft_trainer = pytest.importorskip("tunix.sft.peft_trainer")
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=1,
        max_steps=steps,
        gradient_accumulation_steps=accumulate,
        checkpoint_root_directory=folder,
    )
    trainer = peft_trainer.PeftTrainer(model, optimizer, config)
    trainer.with_gen_model_input_fn(model_input).with_loss_fn(masked_loss(next_token, KEY))
    trainer.eval_loss_fn = next_token
    losses = Losses()
    trainer.with_training_hooks(losses)
    parts = np.split(TOKENS, accumulate or 1)
    batches = [{"input_tokens": part} for _ in range(steps) for part in parts]
    trainer.train(numbered(batches, microbatches=len(parts)), [{"input_tokens": TOKENS}])
    return losses


def llama():
    pytest.importorskip("tunix")
    return randomized(
        dl.inject(tunix_model("llama3"), dl.DropLoRA(rank=4, alpha=8, targets=TARGETS), key=KEY),
        size=0.1,
    )


def by_hand(model, step):
    view = dl.masked(model, jax.random.fold_in(KEY, step), rows=ROWS)
    return float(next_token(view, **inputs(TOKENS)))


@pytest.mark.parametrize("accumulate", [None, 2])
def test_tunix_trainer_draws_the_masks_of_every_step_and_evaluates_without(accumulate):
    """Nothing is learned, so losses differ by their masks alone."""
    model = llama()
    expected = [by_hand(model, step) for step in range(3)]
    losses = train(model, optax.sgd(0.0), accumulate=accumulate)
    assert losses.train == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 4) for loss in losses.train}) == 3
    assert len(set(losses.evaluation)) == 1
    assert losses.evaluation[0] == pytest.approx(
        float(next_token(model, **inputs(TOKENS))), rel=1e-5
    )


def test_tunix_trainer_trains_adapters_only_and_what_it_trained_is_merged():
    model = llama()
    before = {
        path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    losses = train(model, optax.adam(1e-2), steps=5)
    assert losses.evaluation[-1] < losses.evaluation[0]
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        changed = not np.array_equal(value[...], before[path])
        assert changed == (path[-1] in ("lora_a", "lora_b")), path
    merged = next_token(dl.merge(model), **inputs(TOKENS))
    assert losses.evaluation[-1] == pytest.approx(float(merged), rel=1e-4)


def test_a_run_that_tunix_resumes_is_one_that_was_not_interrupted(tmp_path):
    whole, first = llama(), llama()
    expected = train(whole, optax.adam(1e-2), steps=4).train
    train(first, optax.adam(1e-2), steps=2, folder=str(tmp_path))
    resumed = llama()
    rest = train(resumed, optax.adam(1e-2), steps=4, folder=str(tmp_path)).train
    assert rest == pytest.approx(expected[2:], rel=1e-5)
    for ours, theirs in zip(
        *(jax.tree.leaves(nnx.state(m, nnx.LoRAParam)) for m in (resumed, whole)), strict=True
    ):
        assert relative(ours, theirs) < 1e-5


# The examples.


def test_the_plain_loop(untied, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", str(untied.path), str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / "plain_loop.py"))
    losses = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert float(losses[-1]) < float(losses[0])
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_the_example_of_tunix_trainer(capsys):
    pytest.importorskip("tunix")
    runpy.run_path(str(EXAMPLES / "tunix_trainer.py"))
    losses = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert float(losses[-1]) < float(losses[0])
