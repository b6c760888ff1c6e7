"""No template: the prompt as it is, or plain text."""

from __future__ import annotations

from droplora_jax.data.formats.base import Example
from droplora_jax.data.templates.base import Document, Piece, Tokenizer, one_exchange


def render(example: Example, tokenizer: Tokenizer) -> Document:
    """The prompt, not trained, and the response; or plain text, all of it trained, to be split."""
    if example.text:
        return Document((Piece(example.text, True),), split=True)
    prompt, response = one_exchange(example, "none")
    if example.input:
        prompt = f"{prompt}\n{example.input}"
    return Document((Piece(prompt, False), Piece(response, True)))
