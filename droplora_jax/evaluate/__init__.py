"""Tasks to score a model on, one file a family.

    examples = TASKS["gsm8k"].read("gsm8k_test.jsonl")             # base.py: what a task is
    result = evaluate(TASKS["gsm8k"], examples, Generator(...))    # scoring.py
    result.accuracy, result.interval, result.rows

`harness.py` lets the tasks of lm-evaluation-harness run on our models.
"""

from droplora_jax.evaluate.base import Example, Outcome, Task
from droplora_jax.evaluate.commonsense import COMMONSENSE
from droplora_jax.evaluate.gsm8k import GSM8K
from droplora_jax.evaluate.hendrycks_math import MATH
from droplora_jax.evaluate.humaneval import HUMANEVAL
from droplora_jax.evaluate.mbpp import MBPP
from droplora_jax.evaluate.mt_bench import MT_BENCH
from droplora_jax.evaluate.scoring import Result, Row, ask, collected, evaluate, wilson

TASKS: dict[str, Task] = {
    **{task.name: task for task in COMMONSENSE},
    "gsm8k": GSM8K,
    "math": MATH,
    "humaneval": HUMANEVAL,
    "mbpp": MBPP,
    "mt_bench": MT_BENCH,
}

__all__ = [
    "TASKS",
    "Example",
    "Outcome",
    "Result",
    "Row",
    "Task",
    "ask",
    "collected",
    "evaluate",
    "wilson",
]
