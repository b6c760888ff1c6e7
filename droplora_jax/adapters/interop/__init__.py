"""Models and trainers of other libraries.

`linen.to_nnx` makes an nnx module of a flax.linen model, for `dl.inject`; `numbered` and
`masked_loss` bring the masks into a trainer that takes a loss and batches; `factors` are the
trained factors of any model, by the names of its layers. Linear layers of other libraries are in
`nn/linear_spec.py`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from droplora_jax.adapters.interop import linen
    from droplora_jax.adapters.interop.stored_factors import factors
    from droplora_jax.adapters.interop.trainers import masked_loss, numbered

__all__ = ["factors", "linen", "masked_loss", "numbered"]
