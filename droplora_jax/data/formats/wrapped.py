"""The files of DropLoRA's authors: `instruction` is the complete, already wrapped prompt."""

from __future__ import annotations

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import Example, Format, text_of
from droplora_jax.data.formats.dialogue import BEFORE, dialogue
from droplora_jax.data.record import Fields

TASK = "Below is an instruction that describes a task"


def is_wrapped(instruction: object) -> bool:
    return isinstance(instruction, str) and instruction.lstrip().startswith(TASK)


def convert(record: Fields) -> Example:
    prompt = text_of(record, "instruction")
    if not is_wrapped(prompt):
        raise InputError(f"instruction must start with {TASK!r}, as the rows before do")
    if record.get("input"):
        raise InputError("input must be empty, since the instruction is the whole prompt")
    return dialogue(record, prompt, text_of(record, "output"))


WRAPPED = Format(
    ("instruction", "output"),
    "none",
    convert,
    optional=("input", *BEFORE),
    telling=lambda record: is_wrapped(record["instruction"]),
)
