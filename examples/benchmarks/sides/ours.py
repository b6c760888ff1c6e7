"""DropLoRA, and LoRA, which is DropLoRA at `drop_rate=0`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from weights import is_norm, scaled, seed, value_bits
from work import CLIP_NORM, LEARNING_RATE, WEIGHT_DECAY, Done, Row, Tally, Work, pad
from workers import Unavailable


@dataclass(frozen=True)
class Ours:
    """
    Attributes:
      document: tokens on average of the documents that a full row is made of; 0: it is one.
    """

    drop_rate: float = 0.5
    granularity: str = "token"
    sampler: str = "bernoulli"
    rank: int = 32
    remat: Any = "dots"
    attention: Any = "auto"
    document: int = 0

    @property
    def packages(self) -> tuple[str, ...]:
        own = ("droplora-jax", "jax", "flax")
        return (*own, "tokamax") if self.attention == "tokamax" else own

    @property
    def masked(self) -> bool:
        return self.drop_rate > 0

    def prepare(self, work: Work) -> Training:
        return Training(self, work)


class Training:
    def __init__(self, side: Ours, work: Work) -> None:
        jax = _jax_on(work.device)
        import optax

        import droplora_jax as dl
        from droplora_jax.nn.options import StepOptions
        from droplora_jax.training import optimizer, step
        from droplora_jax.training.config import OptimConfig

        self.side, self.work = side, work
        self.mesh = dl.make_mesh(devices=jax.devices()[:1])
        model = dl.load_adapter(
            _base(side, work, self.mesh),
            work.factors(side.rank),
            config=dl.DropLoRA(
                rank=side.rank,
                alpha=2 * side.rank,
                drop_rate=side.drop_rate,
                granularity=side.granularity,
                sampler=side.sampler,
            ),
        )
        self.graphdef, adapters, self.mask_keys, self.frozen = dl.split(model)
        settings = OptimConfig(weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
        tx = optimizer.optimizer(settings, optax.constant_schedule(LEARNING_RATE))
        packed = work.line > 0 or side.document > 0
        self.options = StepOptions(packed, side.remat, side.attention)
        self.step = step.compile_train_step(self.graphdef, tx, adapters, options=self.options)
        self.state = step.init_state(adapters, tx)
        self.key = dl.root_key(0)

    def plain_loss(self) -> float:
        """The mean loss of the first rows before the first step, without masks."""
        import jax

        from droplora_jax.training.step import eval_step

        with self._batches(self.work.rows[: self.work.first]) as batches:
            batch = {name: array[0] for name, array in next(batches).items()}
        arguments = (self.state.adapters, self.mask_keys, self.frozen, batch)
        run = jax.jit(partial(eval_step, self.graphdef, options=self.options))
        loss, count = run(*arguments)
        return float(loss) / float(count)

    def first(self) -> Done:
        with self._batches(self.work.rows[: self.work.first]) as batches:
            return self._train(batches)

    def run(self) -> Done:
        with self._batches(self.work.rows) as batches:
            return self._train(batches)

    def device_peak(self) -> int | None:
        stats = self.mesh.devices.flat[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else None

    def _train(self, batches: Iterable[dict[str, Any]]) -> Done:
        import jax

        steps, given = 0, Tally()
        for batch in batches:
            self.state, metrics = self.step(
                self.state, self.mask_keys, self.frozen, batch, self.key
            )
            steps, given = steps + 1, given + _tally(batch)
        jax.block_until_ready(self.state)
        return Done(float(metrics["loss"]), float(metrics["grad_norm"]), steps, given)

    @contextmanager
    def _batches(self, rows: tuple[Row, ...]) -> Iterator[Iterator[dict[str, Any]]]:
        """As one microbatch [1, G, T] each, on the device: packed, or as they are."""
        from droplora_jax.core.sharding import put

        if self.work.line:
            with closing(_packed(self.work, rows, self.mesh)) as batches:
                yield iter(batches)
            return
        padded = pad(rows)
        tokens, targets = (x.astype(np.int32)[None] for x in (padded.tokens, padded.targets))
        segment_ids = np.ones_like(tokens)
        if self.side.document:
            segment_ids[0] = _documents(*tokens.shape[1:], self.side.document)
        batch = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}
        yield iter([put(batch, (None, "batch"), self.mesh)])


def _jax_on(device: str) -> Any:
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    found = jax.devices()[0].platform
    if found != device:
        raise Unavailable(f"JAX sees no {device.upper()} (only {found}); install '.[cuda]'")
    return jax


def _base(side: Ours, work: Work, mesh: Any) -> Any:
    """The model with `weights.py`'s values, made on the device layer by layer."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from droplora_jax.core.errors import InputError
    from droplora_jax.hf.base import Base
    from droplora_jax.nn.layer_paths import dotted
    from droplora_jax.nn.options import StepOptions

    base = Base.open(work.folder)
    model = base.abstract(mesh, dtype=work.dtype)
    try:
        model.attention_kernel(StepOptions(attention=side.attention))
    except InputError as refused:  # no such kernel here
        raise Unavailable(str(refused)) from refused
    names = base.family.tensor_names(base.shape)

    def make(path: tuple[Any, ...], parameter: nnx.Variable) -> nnx.Variable:
        leaf, name = parameter.get_value(), names[dotted(path)]
        if is_norm(name.pattern):
            return parameter.replace(jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding))
        layers = range(leaf.shape[0]) if name.stacked else [0]
        seeds = jnp.asarray([seed(name.of_layer(i)) for i in layers], jnp.uint32)

        def values(seed):
            own = leaf.shape[1:] if name.stacked else leaf.shape
            row, column = (jax.lax.broadcasted_iota(jnp.uint32, own, axis) for axis in (0, 1))
            index = column * own[0] + row if name.transposed else row * own[1] + column
            return scaled(value_bits(index, seed).astype(jnp.float32)).astype(leaf.dtype)

        all_of = (lambda seeds: jax.lax.map(values, seeds)) if name.stacked else values
        made = jax.jit(all_of, out_shardings=leaf.sharding)
        return parameter.replace(made(seeds if name.stacked else seeds[0]))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.block_until_ready(nnx.map_state(make, state)))


def _documents(rows: int, length: int, mean: int) -> np.ndarray:
    """Segments [rows, length] of random lengths, without a gap."""
    starts = np.random.default_rng(0).random((rows, length)) < 1 / mean
    return 1 + np.cumsum(starts, axis=1, dtype=np.int32)


def _packed(work: Work, rows: tuple[Row, ...], mesh: Any) -> Any:
    """Every row once, through the pipeline that a run has."""
    from droplora_jax.data import device_feed
    from droplora_jax.data import rows as examples
    from droplora_jax.data.batches import Batches

    batches = Batches(
        [examples.Row(row.ids, row.trained) for row in rows],
        batch_size=work.lines,
        seed=0,
        shuffle=False,
        max_length=work.line,
        packing="best_fit",
    )
    return device_feed.feed(batches, device_feed.once(batches), mesh, microbatches=1)


def _tally(batch: dict[str, Any]) -> Tally:
    """Of the tokens that have a next one in their own segment, or a target."""
    names = ("tokens", "targets", "segment_ids")
    tokens, targets, segments = (np.asarray(batch[name]) for name in names)
    goes_on = segments[..., 1:] == segments[..., :-1]
    last = targets[..., -1:] >= 0
    there = (segments != 0) & np.concatenate([goes_on, last], axis=-1)
    return Tally.of(tokens, targets, there)
