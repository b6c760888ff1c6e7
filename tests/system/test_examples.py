"""Every function and class of the public API has an example in its docstring, and it runs."""

from __future__ import annotations

import doctest
import inspect

import pytest

import droplora_jax as dl

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

PUBLIC = {name: getattr(dl, name) for name in dl.__all__ if not name.startswith("_")}
PUBLIC = {name: value for name, value in PUBLIC.items() if not inspect.ismodule(value)}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder().find(PUBLIC[name], name, extraglobs={"dl": dl})
    examples = [test for test in found if test.examples]
    assert examples, f"{name} has no example (>>>) in its docstring"
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    said: list[str] = []
    for test in examples:
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
