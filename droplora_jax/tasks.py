"""Test sets and their scores: the tasks by name, `evaluate`, and lm-evaluation-harness's models.

`TASKS["gsm8k"]` reads its examples, asks and judges; `evaluate` does all three with anything that
completes prompts, such as a `Generator`. `HarnessModel` (the extra `harness`) is a model for
lm-evaluation-harness, whose own tasks then run on it.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from droplora_jax.inference.harness import HarnessModel
    from droplora_jax.inference.scoring import evaluate
    from droplora_jax.inference.tasks import TASKS

__all__ = ["TASKS", "HarnessModel", "evaluate"]
