"""The Alpaca prompt, as DropLoRA's published results use it (no chat template)."""

from __future__ import annotations

from collections.abc import Callable

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import Example
from droplora_jax.data.formats.wrapped import TASK, is_wrapped
from droplora_jax.data.templates.base import Document, Piece, Tokenizer, one_exchange

STEPS = " Let's think step by step."
WITHOUT_INPUT = (
    TASK + ". Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Response:\n"
)
WITH_INPUT = (
    TASK + ", paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n"
    "### Response:\n"
)


def prompt(instruction: str, input: str = "") -> str:
    """The text before the response."""
    template = WITH_INPUT if input else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def steps_prompt(instruction: str, input: str = "") -> str:
    """The prompt for mathematics, which asks at the start of the response to think step by step."""
    return prompt(instruction, input).rstrip("\n") + STEPS


def render(example: Example, tokenizer: Tokenizer) -> Document:
    """The wrapped instruction, not trained, and the response, trained.

    Raises:
      InputError: the example is not one exchange, or its instruction is wrapped already.
    """
    return _wrapped(example, prompt)


def render_steps(example: Example, tokenizer: Tokenizer) -> Document:
    """As `render`, with the prompt for mathematics."""
    return _wrapped(example, steps_prompt)


def _wrapped(example: Example, prompt: Callable[[str, str], str]) -> Document:
    instruction, response = one_exchange(example, "alpaca")
    if is_wrapped(instruction):
        raise InputError(
            f"the instruction starts with {TASK!r} already and would be wrapped twice; "
            "set data.template=none"
        )
    return Document((Piece(prompt(instruction, example.input), False), Piece(response, True)))
