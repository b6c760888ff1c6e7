"""The options of every kind of adapter, and the branches that they mean; imports no JAX."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeAlias

from droplora_jax.core.errors import raise_all
from droplora_jax.nn.layer_paths import Path, Patterns

if TYPE_CHECKING:
    from flax.nnx import Module
    from optax import Schedule as Share

    from droplora_jax.adapters.base import Adapter, InitKey
    from droplora_jax.nn.linear_spec import LinearSpec
else:
    Module: TypeAlias = object
    Share: TypeAlias = Callable
    Adapter: TypeAlias = object
    InitKey: TypeAlias = object
    LinearSpec: TypeAlias = object

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "milora", "olora"]
FROM_KERNEL = frozenset({"pissa", "milora", "olora"})  # their initial branch is subtracted


class Branch(NamedTuple):
    """The branch beside one layer; a layer without one has rank 0."""

    rank: int
    alpha: float
    scale: float
    drop_rate: float = 0.0


def scale_of(rank: int, alpha: float, stabilized: bool) -> float:
    """What a branch is multiplied by; 0 where there is none."""
    return alpha / (math.sqrt(rank) if stabilized else rank) if rank else 0.0


@dataclass(frozen=True)
class LowRank:
    """What to adapt, and with what branch: the options of every kind.

    Attributes:
      rank: R, the width of the branch.
      alpha: the branch is scaled by alpha / rank.
      targets: `paper` (q, k, v, up, down), `all-linear`, or regular expressions searched in the
        names of the linear layers (`layers.q_proj`; `layers.3.q_proj` is one of a stack), of the
        embedding (`embed`) and of the head (`lm_head`); every one of them must match.
      exclude: patterns of layers that are left alone although they are targets.
      rank_stabilized: the branch is scaled by alpha / sqrt(rank) (arXiv 2312.03732).
      rank_pattern, alpha_pattern: other values by pattern; the first that matches counts.
      init: how the factors start. `kaiming`, `gaussian` and `orthogonal` start with a branch that
        is zero. `pissa`, `milora` and `olora` start with a part of the kernel, which is subtracted
        again, so that the model starts unchanged.
      input_dropout: the probability in [0, 1) that a number of the branch's input is dropped in
        training; what is kept is scaled by 1 / (1 - input_dropout).
      train_whole: patterns of parameters of the base that are trained too, such as `lm_head` or
        `bias$`, searched in their paths (`layers.q_proj.bias`).

    Raises:
      InputError: all problems of the options, each beginning with the option's name (`rank=0: must
        be at least 1`). The reader of a file adds the section: `error.within("adapter")`.
    """

    # Options of training that do not change the adapter's function. Training may continue from a
    # saved adapter with other values of these only.
    of_training: ClassVar[tuple[str, ...]] = ("input_dropout",)
    # `module:class` of the layer that this kind makes. A name, as its module imports JAX.
    layer: ClassVar[str]

    kind: str
    rank: int = 32
    alpha: float = 64.0
    targets: str | tuple[str, ...] = "paper"
    exclude: tuple[str, ...] = ()
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init: Init = "kaiming"
    input_dropout: float = 0.0
    train_whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.patterns:
            object.__setattr__(self, name, Patterns(getattr(self, name)))
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        for key, rank in self._values("rank"):
            if rank < 1:
                yield f"{key}={rank}: must be at least 1"
            elif self.init == "orthogonal" and rank % 2:
                yield (
                    f"{key}={rank}: init='orthogonal' needs an even rank, half of it for A and "
                    "half for B"
                )
        for key, alpha in self._values("alpha"):
            if not (alpha > 0 and math.isfinite(alpha)):
                yield f"{key}={alpha}: must be a positive number"
        if not 0 <= self.input_dropout < 1:
            yield f"input_dropout={self.input_dropout}: must be at least 0 and below 1"
        if not self.targets:
            yield f"targets={self.targets!r}: must name what to adapt, such as 'paper'"

    def _values(self, name: str) -> Iterator[tuple[str, float]]:
        """An option and its values by pattern, each with its key."""
        yield name, getattr(self, name)
        for pattern, value in getattr(self, f"{name}_pattern").items():
            yield f"{name}_pattern.{pattern}", value

    @property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        """The patterns of every option that has values by pattern."""
        names = [name for name in self.__dataclass_fields__ if name.endswith("_pattern")]
        return {name: tuple(getattr(self, name)) for name in names}

    def adapt(
        self,
        layer: Module,
        spec: LinearSpec,
        path: Path,
        key: InitKey,
        chosen: Sequence[bool] | None = None,
    ) -> Adapter:
        """Wrap one layer, or one stack of layers; see `AdapterConfig.adapt`."""
        return pkgutil.resolve_name(self.layer).beside(layer, spec, self, path, key, chosen)

    def stored(self, branch: Branch) -> Branch:
        """A branch as files have it: with the subtracted initial branch, in twice the rank."""
        if self.init not in FROM_KERNEL:
            return branch
        alpha = branch.alpha * (math.sqrt(2) if self.rank_stabilized else 2)
        return branch._replace(rank=2 * branch.rank, alpha=alpha)

    def share(self, steps: int) -> Share | None:
        """The share of the drop rates at each step of a run; None if they are constant.

        Raises:
          InputError: a warm-up that is not over before the run is.
        """
        return None

    def branches(
        self, names: Sequence[tuple[str, ...]], chosen: Sequence[bool] | None = None
    ) -> tuple[Branch, ...]:
        """The branch of every layer of a stack; rank 0 for a layer that is not chosen.

        Args:
          names: the names of each layer, of which patterns match one or another.
          chosen: which layers have an adapter; all of them by default.
        """
        branches = []
        for layer, adapted in zip(names, chosen or [True] * len(names), strict=True):
            alpha = float(Patterns(self.alpha_pattern).of(layer, self.alpha))
            rank = Patterns(self.rank_pattern).of(layer, self.rank) if adapted else 0
            branches.append(Branch(rank, alpha, scale_of(rank, alpha, self.rank_stabilized)))
        return tuple(branches)
