"""The formats of records, one module each; `auto` takes the first that matches."""

from droplora_jax.data.formats.alpaca import ALPACA
from droplora_jax.data.formats.base import Format
from droplora_jax.data.formats.messages import MESSAGES
from droplora_jax.data.formats.prompt_completion import PROMPT_COMPLETION, PROMPT_MESSAGES
from droplora_jax.data.formats.question_answer import QUESTION_ANSWER
from droplora_jax.data.formats.sharegpt import SHAREGPT
from droplora_jax.data.formats.text import TEXT
from droplora_jax.data.formats.wrapped import WRAPPED

# In the order in which `auto` tries them. The more specific keys come first: many instruction data
# sets also have a `text`.
FORMATS: dict[str, Format] = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "wrapped": WRAPPED,
    "alpaca": ALPACA,
    "prompt_messages": PROMPT_MESSAGES,
    "prompt_completion": PROMPT_COMPLETION,
    "question_answer": QUESTION_ANSWER,
    "text": TEXT,
}
