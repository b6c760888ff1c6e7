"""Completions of prompts, tasks and their scores.

`config` has `Sampling`, plain data; `generator` turns prompts into completions by the compiled
loops of `decode`, which draw tokens by `sampling`. A `task` says how examples are asked and judged,
`tasks/` has one file for each, `scoring` asks a model and counts, `sandbox/` runs code that a model
wrote, and `harness` is a model for lm-evaluation-harness.
"""
