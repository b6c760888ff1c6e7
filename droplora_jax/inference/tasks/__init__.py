"""Tasks to score a model on by name: a new one is one file and one line here."""

from droplora_jax.inference.task import Task
from droplora_jax.inference.tasks.commonsense import COMMONSENSE
from droplora_jax.inference.tasks.gsm8k import GSM8K
from droplora_jax.inference.tasks.humaneval import HUMANEVAL
from droplora_jax.inference.tasks.math import MATH
from droplora_jax.inference.tasks.mbpp import MBPP
from droplora_jax.inference.tasks.mt_bench import MT_BENCH

TASKS: dict[str, Task] = {
    **{task.name: task for task in COMMONSENSE},
    "gsm8k": GSM8K,
    "math": MATH,
    "humaneval": HUMANEVAL,
    "mbpp": MBPP,
    "mt_bench": MT_BENCH,
}
