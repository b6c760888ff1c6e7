"""How completions are drawn, as plain data: this module imports no JAX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from droplora_jax.core.errors import raise_all


@dataclass(frozen=True)
class Sampling:
    """How to go on from a prompt.

    Attributes:
      max_new_tokens: at most so many.
      temperature: 0 is greedy: always the most likely token.
      top_k: only the k most likely tokens are drawn from.
      top_p: of those, the fewest most likely ones that have this probability together
        (arXiv 1904.09751).
      stop: texts before which a completion ends.
      seed: with the row's index it determines what is drawn; the batch does not matter.

    >>> Sampling(max_new_tokens=32, stop=("###",)).temperature  # greedy
    0.0
    >>> Sampling(top_p=0.9)
    Traceback (most recent call last):
    droplora_jax.core.errors.InputError: top_k=None, top_p=0.9: nothing is drawn at temperature 0; \
    set a temperature, such as 1
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"max_new_tokens={self.max_new_tokens}: must be at least 1"
        if not 0 <= self.temperature < float("inf"):
            yield f"temperature={self.temperature}: must be 0 (greedy) or more"
        if self.top_k is not None and self.top_k < 1:
            yield f"top_k={self.top_k}: must be at least 1"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p}: must be above 0 and at most 1"
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            yield (
                f"top_k={self.top_k}, top_p={self.top_p}: nothing is drawn at temperature 0; "
                "set a temperature, such as 1"
            )
        if "" in self.stop:
            yield f"stop={self.stop!r}: must not hold an empty text"
        if not 0 <= self.seed < 2**32:
            yield f"seed={self.seed}: must be from 0 to {2**32 - 1}"

    @property
    def distribution(self) -> Sampling:
        """The same distribution of the next token, everything else at its default.

        Compiled programs depend on nothing else, so those of other seeds and lengths are shared.
        """
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
