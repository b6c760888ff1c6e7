"""What a task is: examples from a file, the prompt of each, and a verdict on what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droplora_jax.core.errors import InputError
from droplora_jax.data.data_file import local

# A model that goes on to the next instruction has ended its response.
NEXT_INSTRUCTION = "### Instruction:"

Record = Mapping[str, Any]  # a row of a task's file
Example = Mapping[str, Any]  # what a task made of a row; its `id` says which it is


@dataclass(frozen=True)
class Outcome:
    """The verdict on one example.

    Attributes:
      extracted: what was read off the completion; None where there is nothing of the kind.
      right: whether that is the answer; None where only a judge can say.
      note: why not, where there is more to say than that.
    """

    extracted: str | None
    right: bool | None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One way to ask and to score: three pure functions, and the limits of a completion.

    A file is read row by row, and `convert` turns each into an example: a mapping of whatever
    `prompt` and `score` need, which goes into the scores as it is. An `id` that it sets has to be
    unique in the file; without one an example's id is the number of its row. `answer`, if there is
    one, is repeated in the scores. A row that is broken raises InputError that names the key and
    the fix, and `read` adds the file and the row; a row that does not belong to the test set (one
    of MBPP's prompts for few-shot examples, say) gives None and is left out.

    `prompt` and `score` are called with examples only, in any order, and from several threads if
    `runs_code`. Completions are greedy and come without the stop text. A task with several turns is
    asked again with the completions so far, in order; `score` sees the last one. A task must give
    every completion a verdict, so `score` raises nothing: what can't be read off is an `Outcome`
    whose `extracted` is None and which is not right.

    Attributes:
      name: as it is named on the command line and in scores.
      convert: a row of a file to an example, or None.
      prompt: an example, and the completions of the turns before, to the text of the next prompt.
      score: an example and the completion of its last turn to the verdict.
      max_new_tokens: of a completion, at most.
      stop: texts before which a completion ends.
      turns: how often the model is asked.
      runs_code: `score` runs what the model wrote (see `sandbox/runner.py`), which the user has to
        allow.
      judged: there are no right answers, and a judge has to score them: `Outcome.right` is None.
    """

    name: str
    convert: Callable[[Record], Example | None]
    prompt: Callable[[Example, Sequence[str]], str]
    score: Callable[[Example, str], Outcome]
    max_new_tokens: int
    stop: tuple[str, ...] = (NEXT_INSTRUCTION,)
    turns: int = 1
    runs_code: bool = False
    judged: bool = False

    def read(self, path: str) -> list[Example]:
        """The examples of a file of rows: .json, .jsonl, .parquet, ..., packed or not.

        Raises:
          InputError: names the file, the row and the key.
        """
        examples: list[Example] = []
        seen: dict[str, str] = {}
        for number, (where, record) in enumerate(local(path).records(), 1):
            try:
                example = self.convert(record)
            except InputError as error:
                raise InputError(f"{where}: {error} (a row of {self.name})") from error
            if example is None:
                continue
            example = {"id": str(number), **example}
            if example["id"] in seen:
                raise InputError(f"{where}: id {example['id']!r} is that of {seen[example['id']]}")
            seen[example["id"]] = where
            examples.append(example)
        if not examples:
            raise InputError(f"{path}: holds no row of {self.name}'s test set")
        return examples
