"""Completions, tasks and their scores, the sandbox."""
