"""`droplora quickstart`: the whole path on a small model that ships with the package.

The base has read statements about made-up words and numbers and has never seen a question; a
fine-tuning run of about a minute teaches it to answer.
"""

from __future__ import annotations

import random


def random_word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))


def random_number(rng: random.Random) -> int:
    return rng.randint(10, 9999)
