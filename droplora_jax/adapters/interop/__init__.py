"""Training loops and adapters that other libraries bring, with this project's masks in them.

Linear layers of other libraries are in `linear.py`, models of flax.linen in `linen.py`.
"""
