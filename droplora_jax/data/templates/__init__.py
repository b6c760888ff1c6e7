"""Templates: how an example is written out for the model, one module each."""

from droplora_jax.data.templates import alpaca, chat, none
from droplora_jax.data.templates.base import Template

TEMPLATES: dict[str, Template] = {
    "alpaca": alpaca.render,
    "alpaca_steps": alpaca.render_steps,
    "chat": chat.render,
    "none": none.render,
}

# Templates that write a prompt otherwise than as what precedes the response of an example.
PROMPTS: dict[str, Template] = {"chat": chat.prompt}
