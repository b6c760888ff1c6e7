"""The options of every kind of adapter, and the branches that they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import optax
from flax import nnx

from droplora_jax.adapters import base, initializers
from droplora_jax.core import prng
from droplora_jax.core.errors import InputError
from droplora_jax.nn.layer_paths import Path, Patterns, layer_names
from droplora_jax.nn.linear_spec import LinearSpec, stack_of


@dataclass(frozen=True)
class LowRank:
    """What to adapt, and with what branch; the options of every kind.

    Attributes:
      rank: R, the width of the branch.
      alpha: the branch is scaled by alpha / rank.
      targets: `paper` (q, k, v, up, down), `all-linear`, or regular expressions searched in the
        names of the linear layers (`layers.q_proj`; `layers.3.q_proj` is one of a stack), of the
        embedding (`embed`) and of the head (`lm_head`); every one of them must match.
      exclude: patterns of layers that are left alone although they are targets.
      rank_stabilized: the branch is scaled by alpha / sqrt(rank) (arXiv 2312.03732).
      rank_pattern, alpha_pattern: other values by pattern; the first that matches counts.
      init: how the factors start: `kaiming`, `gaussian` or `orthogonal`, whose branch is nothing
        at first; or `pissa`, `milora` or `olora`, a part of the kernel, less which the branch is.
      input_dropout: the probability in [0, 1) that a number of the branch's input is dropped in
        training; what is kept is scaled by 1 / (1 - input_dropout).
      train_whole: patterns of parameters of the base that are trained too, such as `lm_head` or
        `bias$`, searched in their paths (`layers.q_proj.bias`).
    """

    # What says how it is trained, not what it is: an adapter may be trained on with other ones.
    of_training: ClassVar[tuple[str, ...]] = ("input_dropout",)

    kind: str
    rank: int = 32
    alpha: float = 64.0
    targets: str | tuple[str, ...] = "paper"
    exclude: tuple[str, ...] = ()
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init: initializers.Init = "kaiming"
    input_dropout: float = 0.0
    train_whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.patterns:
            object.__setattr__(self, name, Patterns(getattr(self, name)))
        for name, rank in {"": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise InputError(f"{option('rank', name)}={rank}: must be at least 1")
            if self.init == "orthogonal" and rank % 2:
                raise InputError(
                    f"{option('rank', name)}={rank}: adapter.init='orthogonal' needs an even rank, "
                    "half of it for A and half for B"
                )
        for name, alpha in {"": self.alpha, **self.alpha_pattern}.items():
            if not (alpha > 0 and math.isfinite(alpha)):
                raise InputError(f"{option('alpha', name)}={alpha}: must be a positive number")
        if not 0 <= self.input_dropout < 1:
            raise InputError(
                f"adapter.input_dropout={self.input_dropout}: must be at least 0 and below 1"
            )
        if not self.targets:
            raise InputError(
                f"adapter.targets={self.targets!r}: must name what to adapt, such as 'paper'"
            )

    @property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        names = [name for name in self.__dataclass_fields__ if name.endswith("_pattern")]
        return {name: tuple(getattr(self, name)) for name in names}

    def adapt(
        self,
        layer: nnx.Module,
        spec: LinearSpec,
        path: Path,
        key: base.InitKey,
        chosen: Sequence[bool] | None = None,
    ) -> base.Adapter:
        names = layer_names(path, stack_of(layer))
        branches = self.branches(names, chosen)
        own = prng.fold_path(key, path) if isinstance(key, jax.Array) else key
        return self.linear()(layer, spec, self, branches, own)

    def stored(self, branch: Branch) -> Branch:
        """A branch as files have it: less what it was at first, in one of twice the rank."""
        if self.init not in initializers.OF_KERNEL:
            return branch
        alpha = branch.alpha * (math.sqrt(2) if self.rank_stabilized else 2)
        return branch._replace(rank=2 * branch.rank, alpha=alpha)

    def share(self, steps: int) -> optax.Schedule | None:
        """What share of its drop rates each of a run's steps has, where that changes.

        Raises:
          InputError: a warm-up that is not over before the run is.
        """
        return None

    def linear(self) -> type[Any]:
        """The kind of layer that this configuration makes."""
        raise NotImplementedError

    def branches(
        self, names: Sequence[tuple[str, ...]], chosen: Sequence[bool] | None = None
    ) -> tuple[Branch, ...]:
        """The branch of every layer of a stack; rank 0 of one that is not chosen."""
        made = []
        for layer, there in zip(names, chosen or [True] * len(names), strict=True):
            alpha = float(Patterns(self.alpha_pattern).of(layer, self.alpha))
            rank = Patterns(self.rank_pattern).of(layer, self.rank) if there else 0
            made.append(Branch(rank, alpha, scale_of(rank, alpha, self.rank_stabilized)))
        return tuple(made)


def option(name: str, pattern: str) -> str:
    """The key of an option, or of its value for a pattern."""
    return f"adapter.{name}_pattern.{pattern}" if pattern else f"adapter.{name}"


class Branch(NamedTuple):
    """The branch beside one layer; none, of rank 0."""

    rank: int
    alpha: float
    scale: float
    drop_rate: float = 0.0


def scale_of(rank: int, alpha: float, stabilized: bool) -> float:
    """What a branch is multiplied by; nothing where there is none."""
    return alpha / (math.sqrt(rank) if stabilized else rank) if rank else 0.0
