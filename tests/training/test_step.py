"""One step: what is differentiated, and that the split, the mesh and the past do not matter."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import (
    RANDOM,
    Folder,
    model_folder,
    primitives,
    random_tokens,
    randomized,
    raw,
    relative,
)

import droplora_jax as dl
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh, put
from droplora_jax.lowrank import rank_mask
from droplora_jax.models import decoder
from droplora_jax.models import layer as models_layer
from droplora_jax.nn.attention.dispatch import Choice
from droplora_jax.nn.options import StepOptions
from droplora_jax.training.step import (
    compile_train_step,
    eval_step,
    init_state,
    loss_and_gradients,
    loss_sum,
)

ROOT = dl.root_key(11)
G, T = 8, 32
ONE = MeshConfig(fsdp=1)
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
EIGHT = MeshConfig(data=8, fsdp=1)
MESHES = {
    "2x2x2": CUBE,
    "8x1x1": EIGHT,
    "replica": MeshConfig(replica=2, data=2, fsdp=2),
    "context": MeshConfig(data=2, fsdp=1, context=4),
    "all but data": MeshConfig(fsdp=2, tensor=2, context=2),
    "no parts": MeshConfig(fsdp=1, context=8),  # 32 positions can't be dealt out in 64 parts
}
GRANULARITIES = ("token", "sequence", "step")


class Trainable:
    """A model with adapters that do something, split, and the step compiled for it."""

    def __init__(
        self,
        folder: Folder,
        mesh: MeshConfig = ONE,
        *,
        dtype=jnp.float32,
        remat="everything",
        size: float = 0.2,
        tx: optax.GradientTransformation | None = None,
        **options,
    ) -> None:
        self.mesh = make_mesh(mesh, jax.devices()[: int(np.prod(mesh.sizes))])
        model = dl.load(folder.path, mesh=self.mesh, dtype=dtype)
        options = {"rank": 6, "alpha": 6.0, "targets": ("q_proj$", "down_proj$"), **options}
        model = dl.inject(model, dl.DropLoRA(**options), key=dl.root_key(3))
        self.graphdef, self.adapters, self.mask_keys, self.frozen = dl.split(
            randomized(model, size=size)
        )
        # The trace keeps the gradient in the optimizer's state, where a test can see it.
        self.tx = tx or optax.chain(optax.trace(decay=0.0), optax.sgd(0.5))
        step_options = StepOptions(remat=remat)
        self.compiled = compile_train_step(
            self.graphdef, self.tx, self.adapters, options=step_options
        )

    def start(self, step: int = 0):
        """A state of its own, since a step takes it away."""
        state = init_state(jax.tree.map(jnp.copy, self.adapters), self.tx)
        return _at(state, step)

    def step(self, batch, k: int = 2, *, state=None):
        state = self.start() if state is None else state
        return self.compiled(state, self.mask_keys, self.frozen, micro(batch, k, self.mesh), ROOT)

    def gradients(self, batch, k: int = 2, *, step: int = 0):
        """Loss and gradients of one step, the gradients as one vector."""
        state, metrics = self.step(batch, k, state=self.start(step))
        return float(metrics["loss"]), flat(state.opt_state[0].trace)

    def loss(self, batch, **options) -> float:
        return self.gradients(batch, **options)[0]


def _at(state, step: int):
    return type(state)(
        jax.device_put(jnp.int32(step), state.step.sharding), state.adapters, state.opt_state
    )


@pytest.fixture(scope="module")
def token(untied) -> Trainable:
    return Trainable(untied)


@pytest.fixture(scope="module")
def sequence(untied) -> Trainable:
    return Trainable(untied, granularity="sequence")


@pytest.fixture(scope="module")
def step(untied) -> Trainable:
    return Trainable(untied, granularity="step")


@pytest.fixture(params=GRANULARITIES)
def each(request) -> Trainable:
    return request.getfixturevalue(request.param)


def ragged(seed: int = 0, documents: int = 1) -> dict[str, np.ndarray]:
    """Rows of G documents of various lengths, with responses of various lengths, then padding."""
    random = np.random.default_rng(seed)
    tokens = random_tokens(G, T, seed=seed)
    targets = np.full((G, T), -1, np.int32)
    segments = np.zeros((G, T), np.int32)
    for g in range(G):
        ends = np.sort(random.choice(np.arange(4, T + 1), documents, replace=False))
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            segments[g, start:end] = number
            response = int(random.integers(start, end - 1)) if end - start > 1 else start
            targets[g, response : end - 1] = tokens[g, response + 1 : end]
    return {
        "tokens": np.where(segments > 0, tokens, 0).astype(np.int32),
        "targets": targets,
        "segment_ids": segments,
    }


def micro(batch, k: int, mesh=None):
    """The batch as k microbatches."""
    split = {name: x.reshape(k, -1, x.shape[-1]) for name, x in batch.items()}
    return split if mesh is None else put(split, (None, "batch", "position"), mesh)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def key_of(step: int):
    return jax.random.fold_in(ROOT, step)


# --- accumulation ---------------------------------------------------------------------------------


def test_microbatches_make_one_batch(each):
    batch = ragged()
    counts = (batch["targets"] >= 0).sum(axis=1)
    assert len(set(counts.tolist())) > 3  # so that a mean of means would be another number

    def run(k):
        state, metrics = each.step(batch, k)
        moved = flat(state.adapters) - flat(each.adapters)
        return float(metrics["loss"]), flat(state.opt_state[0].trace), moved

    loss, gradients, moved = run(1)
    assert np.linalg.norm(moved) > 0.01
    for k in (2, 4):
        again = run(k)
        np.testing.assert_allclose(again[0], loss, rtol=1e-6)
        assert relative(again[1], gradients) < 5e-6
        assert relative(again[2], moved) < 5e-6


def test_the_loss_is_the_mean_over_all_targets_of_the_batch(untied):
    """Against transformers, every row by itself and without its padding."""
    batch = ragged()
    total, count = 0.0, 0
    for tokens, targets, segments in zip(*batch.values(), strict=True):
        length = int((segments > 0).sum())
        logits = untied.logits(tokens[None, :length])[0].astype(np.float64)
        for t in np.flatnonzero(targets >= 0):
            total += np.log(np.exp(logits[t]).sum()) - logits[t, targets[t]]
            count += 1
    # Adapters of zeros and no masks: the base alone.
    plain = Trainable(untied, size=0.0, drop_rate=0.0)
    np.testing.assert_allclose(plain.loss(batch), total / count, rtol=1e-5)


def test_a_microbatch_without_a_target_changes_nothing(token):
    half = {name: x[: G // 2] for name, x in ragged().items()}
    ignored = {
        "tokens": np.zeros((G // 2, T), np.int32),
        "targets": np.full((G // 2, T), -1, np.int32),
        "segment_ids": np.zeros((G // 2, T), np.int32),
    }
    filled = {name: np.concatenate([x, ignored[name]]) for name, x in half.items()}
    loss, gradients = token.gradients(half, 1)
    filled_loss, filled_gradients = token.gradients(filled, 2)
    np.testing.assert_allclose(filled_loss, loss, rtol=1e-6)
    assert relative(filled_gradients, gradients) < 5e-6


def test_a_batch_without_a_target_is_no_nan(token):
    batch = ragged()
    batch["targets"] = np.full_like(batch["targets"], -1)
    loss, gradients = token.gradients(batch)
    assert loss == 0
    np.testing.assert_array_equal(gradients, 0)


def test_tokens_behind_the_last_target_have_no_loss(token):
    batch = ragged()
    changed = {name: x.copy() for name, x in batch.items()}
    for tokens, targets in zip(changed["tokens"], changed["targets"], strict=True):
        tokens[np.flatnonzero(targets >= 0).max() + 1 :] = 5
    assert np.any(changed["tokens"] != batch["tokens"])
    np.testing.assert_allclose(token.loss(changed), token.loss(batch), rtol=1e-6)


def test_what_is_reported_beside_the_loss(token):
    batch = ragged()
    state, metrics = token.step(batch)
    assert int(metrics["tokens"]) == (batch["segment_ids"] > 0).sum()
    norm = np.linalg.norm(flat(state.opt_state[0].trace))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    assert norm > 0


# --- masks ----------------------------------------------------------------------------------------


def test_every_step_draws_other_masks_and_a_step_the_same_ones_again(each):
    batch = ragged()
    _, first = each.gradients(batch, step=0)
    _, second = each.gradients(batch, step=1)
    assert relative(second, first) > 0.1
    np.testing.assert_array_equal(each.gradients(batch, step=0)[1], first)


def test_the_step_counts_itself_on(token):
    """Only the masks differ from call to call, since the batch and the parameters are the same."""
    batch = ragged()
    losses = []
    for n in range(3):
        state, metrics = token.step(batch, state=token.start(n))
        assert int(state.step) == n + 1
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_the_same_step_twice_is_the_same_bit_for_bit(token):
    one, two = (jax.tree.leaves(token.step(ragged())) for _ in range(2))
    assert len(one) > 10
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_documents_in_one_row_have_masks_of_their_own(sequence):
    documents = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 2, 3]])
    keys = dl.draw(sequence.mask_keys, key_of(0), rows=jnp.arange(2), documents=documents)
    numbers = np.asarray(documents)
    for leaf in jax.tree.leaves(keys):
        for layer in raw(leaf):  # [rows, positions, words of a key]
            seen = {}
            for row, t in np.ndindex(2, 5):
                seen.setdefault((row, numbers[row, t]), set()).add(tuple(layer[row, t]))
            assert [len(found) for found in seen.values()] == [1] * 6
            assert len(set.union(*seen.values())) == 6


def test_a_packed_row_is_trained_with_the_masks_of_its_documents(sequence):
    """The same text twice in every row: only the mask of the document can make a difference."""
    half = random_tokens(G, T // 2)
    batch = {
        "tokens": np.concatenate([half, half], axis=1),
        "segment_ids": np.tile(np.repeat([1, 2], T // 2), (G, 1)).astype(np.int32),
    }

    def loss(document):
        targets = np.full((G, T), -1, np.int32)
        start = T // 2 * (document - 1)
        targets[:, start : start + T // 2 - 1] = half[:, 1:]
        return sequence.loss(batch | {"targets": targets})

    assert abs(loss(1) - loss(2)) > 1e-3


def test_a_packed_document_computes_what_it_does_alone_with_its_own_masks(sequence):
    """Alone it is another row with other positions; what counts is (row, number in the row)."""
    batch = ragged(documents=3)
    tokens, segments = batch["tokens"], batch["segment_ids"]
    rows = jnp.arange(G, dtype=jnp.int32)

    def logits(tokens, rows, documents):
        keys = dl.draw(sequence.mask_keys, key_of(5), rows=rows, documents=documents)
        model = nnx.merge(sequence.graphdef, sequence.adapters, keys, sequence.frozen)
        return np.asarray(model(jnp.asarray(tokens), segment_ids=documents))

    packed = logits(tokens, rows, jnp.asarray(segments))
    for g, number in [(0, 1), (0, 2), (3, 3), (G - 1, 2)]:
        (at,) = np.nonzero(segments[g] == number)
        mine = tokens[g, at][None], jnp.array([g], jnp.int32)
        alone = logits(*mine, jnp.full((1, len(at)), number, jnp.int32))
        np.testing.assert_allclose(packed[g, at], alone[0], rtol=1e-5, atol=1e-5)
        other = logits(*mine, jnp.full((1, len(at)), number + 1, jnp.int32))
        assert np.abs(other - alone).max() > 1e-2


def test_rows_of_one_document_are_the_same_without_segments_in_attention(token, monkeypatch):
    """Which are kept for `blockwise` alone: another kernel is said to be there."""
    batch = micro(ragged(), 2, token.mesh)
    arguments = (token.adapters, token.mask_keys, token.frozen, batch, ROOT)
    plain, given = models_layer.attention, []

    def watched(inputs, **options):
        given.append(inputs.segment_ids_BT is not None)
        return plain(inputs, **options)

    monkeypatch.setattr(models_layer, "attention", watched)

    def found(packed):
        given.clear()
        options = StepOptions(packed=packed)
        run = jax.jit(partial(loss_and_gradients, token.graphdef, options=options))
        loss, gradients = run(*arguments)
        assert set(given) == {packed}
        return float(loss), flat(gradients)

    loss, gradients = found(packed=True)
    monkeypatch.setattr(decoder, "choose", lambda *_, **__: Choice("cudnn", "for a test"))
    same, as_well = found(packed=False)
    assert same == pytest.approx(loss, rel=1e-6)
    assert np.linalg.norm(as_well - gradients) < 1e-5 * np.linalg.norm(gradients)


@pytest.mark.parametrize(
    ("granularity", "meshes"),
    [
        ("token", ("2x2x2", "context")),
        ("sequence", ("8x1x1", "all but data")),
        ("step", ("replica", "no parts")),
    ],
    ids=GRANULARITIES,
)
def test_masks_are_the_same_bits_on_every_mesh(untied, granularity, meshes):
    def drawn(config):
        model = Trainable(untied, config, granularity=granularity, targets="paper", rank=16)
        segments = micro(ragged(documents=3), 1, model.mesh)["segment_ids"][0]

        @jax.jit
        def masks(mask_keys, segments):
            rows = jnp.arange(G, dtype=jnp.int32)
            keys = dl.draw(mask_keys, key_of(4), rows=rows, documents=segments)
            return [
                rank_mask(
                    layer,
                    (G, T, 16),
                    drop_rate=0.5,
                    granularity=granularity,
                    sampler="bernoulli",
                    rescale=False,
                    dtype=jnp.float32,
                )
                for stacked in jax.tree.leaves(keys)
                for layer in stacked
            ]

        return [np.asarray(mask) for mask in masks(model.mask_keys, segments)]

    one = drawn(ONE)
    assert len(one) == 15  # five modules of three layers, no two of them alike
    assert len({mask.tobytes() for mask in one}) == 15
    for mesh in meshes:
        for mask, expected in zip(drawn(MESHES[mesh]), one, strict=True):
            np.testing.assert_array_equal(mask, expected)


def five_losses(folder, mesh: MeshConfig) -> list[float]:
    model = Trainable(folder, mesh, tx=optax.adamw(3e-3), targets="paper")
    state, losses = model.start(), []
    for n in range(5):
        state, metrics = model.step(ragged(seed=n, documents=3), 1, state=state)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def losses_on_one(untied) -> list[float]:
    return five_losses(untied, ONE)


@pytest.mark.parametrize("mesh", [m for m in MESHES.values() if m is not EIGHT], ids=str)
def test_five_steps_are_the_same_on_every_mesh(untied, losses_on_one, mesh):
    np.testing.assert_allclose(five_losses(untied, mesh), losses_on_one, rtol=1e-5)
    assert len(set(losses_on_one)) == 5


def test_evaluation_has_no_random_number_in_it(token):
    batch = ragged()
    parts = token.adapters, token.mask_keys, token.frozen
    evaluation = jax.make_jaxpr(partial(eval_step, token.graphdef))(*parts, batch)
    assert not primitives(evaluation) & RANDOM
    training = jax.make_jaxpr(partial(loss_and_gradients, token.graphdef))(
        *parts, micro(batch, 2), key_of(0)
    )
    assert primitives(training) & RANDOM  # the same look does find those of training


def test_evaluation_is_the_merged_model(token):
    batch = ragged()
    loss, count = jax.jit(partial(eval_step, token.graphdef))(
        token.adapters, token.mask_keys, token.frozen, batch
    )
    model = nnx.merge(token.graphdef, token.adapters, token.mask_keys, token.frozen)
    graphdef, state = nnx.split(dl.merge(model))
    expected, _ = jax.jit(lambda state, batch: loss_sum(nnx.merge(graphdef, state), batch))(
        state, batch
    )
    assert int(count) == (batch["targets"] >= 0).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# --- what is trained, and what it costs -----------------------------------------------------------


@pytest.mark.parametrize("mesh", [ONE, CUBE], ids=["1", "2x2x2"])
def test_only_adapters_have_moments_which_lie_as_they_do(untied, mesh):
    model = Trainable(untied, mesh, tx=optax.adamw(3e-3), targets="paper")
    paths = {path for path, _ in nnx.to_flat_state(model.adapters)}
    assert {path[-1] for path in paths} == {"lora_a", "lora_b"}
    assert len(paths) == 10
    new, _ = model.step(ragged(), 1)
    moments = new.opt_state[0]
    for tree in (moments.mu, moments.nu, new.adapters):
        assert {path for path, _ in nnx.to_flat_state(tree)} == paths
        for leaf, adapter in zip(*map(jax.tree.leaves, (tree, model.adapters)), strict=True):
            assert leaf.shape == adapter.shape
            assert leaf.sharding.is_equivalent_to(adapter.sharding, adapter.ndim)
    others = [leaf for leaf in jax.tree.leaves(new.opt_state) if leaf.ndim]
    assert len(others) == 2 * len(paths)


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_frozen_base_is_not_copied_and_the_state_is_reused(tmp_path):
    """A base far larger than the activations and the adapters: a copy of it would be seen."""
    folder = model_folder(tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    model = Trainable(folder, tx=optax.adamw(1e-3), rank=2, remat="nothing")
    batch = {name: x[:2, :8] for name, x in ragged().items()}
    state = model.start()
    lowered = model.compiled.lower(
        state, model.mask_keys, model.frozen, micro(batch, 2, model.mesh), ROOT
    )
    memory = lowered.compile().memory_analysis()
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(model.frozen))
    assert memory.argument_size_in_bytes >= base > 16 * nbytes(state)
    # One layer of four may be sliced out for the scan, in the forward and in the backward pass.
    assert memory.temp_size_in_bytes < 0.75 * base
    assert memory.output_size_in_bytes < 0.1 * base
    assert memory.alias_size_in_bytes >= nbytes(state)


def test_the_state_is_donated_and_the_base_stays_as_it_was(token):
    frozen = jax.tree.leaves(token.frozen)
    before = [np.array(leaf) for leaf in frozen]
    state = token.start()
    token.step(ragged(), state=state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    for leaf, value in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(leaf, value)


def shapes_of_loss_and_gradients(model: Trainable):
    return jax.eval_shape(
        partial(loss_and_gradients, model.graphdef),
        model.adapters,
        model.mask_keys,
        model.frozen,
        micro(ragged(), 2),
        key_of(0),
    )


def test_a_bfloat16_base_has_float32_adapters_gradients_and_moments(bfloat16):
    """Model and loss are traced without any implicit promotion, by the step itself."""
    model = Trainable(bfloat16, dtype=jnp.bfloat16, tx=optax.adamw(1e-2))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.frozen)} == {jnp.dtype(jnp.bfloat16)}
    new, metrics = model.step(ragged())
    floats = [leaf for leaf in jax.tree.leaves(new) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in [*floats, metrics["loss"]]} == {jnp.dtype(jnp.float32)}
    assert len(floats) == 3 * len(jax.tree.leaves(model.adapters))
    assert relative(flat(new.adapters), flat(model.adapters)) > 1e-4
    shapes = shapes_of_loss_and_gradients(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


@pytest.mark.usefixtures("strict")
def test_loss_and_gradients_promote_nothing(bfloat16):
    model = Trainable(bfloat16, dtype=jnp.bfloat16)
    shapes_of_loss_and_gradients(model)


def test_what_is_saved_for_the_backward_pass_changes_no_mask(untied, token):
    loss, gradients = Trainable(untied, remat="nothing").gradients(ragged())
    expected, expected_gradients = token.gradients(ragged())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert relative(gradients, expected_gradients) < 5e-6
