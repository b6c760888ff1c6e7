"""The one error a user is meant to read.

A configuration dataclass checks all of its fields before it raises, and names them without the
section that they stand in, which only the reader of the file knows:

    def __post_init__(self) -> None:
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.rank < 1:
            yield f"rank={self.rank}: must be at least 1"

Every problem begins with the field's name, and `=` and the value where that helps. The reader of
a file catches the error and shows `error.within("adapter")`, whose problems begin `adapter.rank`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names the file, the key, the value, the rule and the fix.

    The command line prints it without a traceback and exits with code 2.

    Attributes:
      problems: the mistakes; the message has a line for each.

    >>> import droplora_jax as dl
    >>> dl.DropLoRA(rank=0)
    Traceback (most recent call last):
    droplora_jax.core.errors.InputError: rank=0: must be at least 1
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def within(self, section: str) -> InputError:
        """The same problems, which begin with a field, each with the section before the field.

        Args:
          section: dotted keys, such as `adapter`; empty at the top of a file.
        """
        prefix = f"{section}." if section else ""
        return InputError(*(prefix + problem for problem in self.problems))


def raise_all(problems: Iterable[str]) -> None:
    """Raise one InputError of all problems, if there are any."""
    if collected := tuple(problems):
        raise InputError(*collected)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip() if text else type(error).__name__


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`did you mean NAME?` with the most similar known name; empty if none is similar."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""
