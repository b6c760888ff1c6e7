"""Models and trainers of other libraries.

`linen.to_nnx` makes an nnx module of a flax.linen model, for `dl.inject`; `numbered` and
`masked_loss` bring the masks into a trainer that takes a loss and batches; `factors` are the
trained factors of any model, by the names of its layers.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from droplora_jax.adapters.interop import linen
    from droplora_jax.adapters.interop.trainers import masked_loss, numbered
    from droplora_jax.hf.peft.factors import factors

__all__ = ["factors", "linen", "masked_loss", "numbered"]
