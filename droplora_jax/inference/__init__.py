"""Completions of prompts, tasks and their scores.

`config` has `Sampling`, plain data; `generator` turns prompts into completions by the compiled
loops of `decode`, which draw tokens by `sampling`. A `task` says how examples are asked and judged,
`tasks/` has one file for each, `scoring` asks a model and counts, `sandbox/` runs code that a model
wrote, and `harness` is a model for lm-evaluation-harness.

Three names of it are public, as `dl.tasks`: `TASKS["gsm8k"]` reads its examples, asks and judges;
`evaluate` does all three with anything that completes prompts, such as a `Generator`;
`HarnessModel` (the extra `harness`) lets the tasks of lm-evaluation-harness run on a model.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from droplora_jax.inference.harness import HarnessModel
    from droplora_jax.inference.scoring import evaluate
    from droplora_jax.inference.tasks import TASKS

__all__ = ["TASKS", "HarnessModel", "evaluate"]
