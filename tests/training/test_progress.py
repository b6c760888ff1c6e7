"""What a person sees, with a terminal and without."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from droplora_jax.core.console import example, say
from droplora_jax.training import progress

ROW = {"loss": 1.23456, "tokens_per_second": 12345.6, "seconds_left": 3725.4}


def console(terminal: bool, width: int = 40) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=width,
        color_system="standard" if terminal else None,
    )


@pytest.mark.parametrize("text", ["a[bold]b[/bold][/]", "x" * 100, "/a/path:3 [1, 2] :smile:"])
def test_text_is_printed_as_it_is_on_one_line(text):
    out = console(False)
    say(out, text)
    assert out.file.getvalue() == text + "\n"


def test_without_a_terminal_there_is_one_line_a_logged_step():
    out = console(False)
    with progress.progress(out, start=3, total=10) as show:
        show(4, None)
        show(5, ROW)
        show(5, {"eval_loss": 2.0})
    assert out.file.getvalue().splitlines() == [
        "step 5/10  loss 1.2346  12,346 tokens/s  1:02:05 left",
        "step 5/10  evaluation loss 2.0000",
    ]


@pytest.mark.parametrize(
    ("seconds", "clock"), [(0.4, "0:00"), (59.7, "1:00"), (61, "1:01"), (36000, "10:00:00")]
)
def test_the_time_that_is_left(seconds, clock):
    out = console(False)
    with progress.progress(out, start=0, total=1) as show:
        show(1, {"seconds_left": seconds})
    assert out.file.getvalue() == f"step 1/1  {clock} left\n"


def test_a_terminal_gets_a_bar_that_begins_where_the_run_does():
    out = console(True, width=120)
    with progress.progress(out, start=3, total=10) as show:
        show(3, None)
        show(5, ROW)
    text = out.file.getvalue()
    assert " 5/10" in text
    assert "loss 1.2346" in text
    assert "━" in text


def test_an_example_is_marked_where_there_is_no_colour():
    out = console(False)
    example(out, [("a prompt [b] ", False), ("the answer", True)])
    assert out.file.getvalue().endswith("\na prompt [b] [[the answer]]\n")


def test_an_example_is_coloured_where_there_is():
    out = console(True)
    example(out, [("a prompt ", False), ("the answer", True)])
    text = out.file.getvalue()
    assert "[[the answer]]" not in text
    assert "\x1b[1;32mthe answer" in text


def test_of_a_long_text_both_ends_are_shown():
    out = console(False)
    example(out, [("a" * 700 + "b" * 700, False), ("c" * 1200, True)])
    shown = out.file.getvalue().splitlines()[-1]
    assert shown == f"{'a' * 500} ... 400 characters ... {'b' * 500}[[{'c' * 1200}]]"


def test_a_terminal_obeys_nothing_that_an_example_says():
    for terminal in (False, True):
        out = console(terminal)
        example(out, [("a\x1b[31m\tb\r\n", True)])
        assert "a\\x1b[31m" in out.file.getvalue()
        assert "b\\x0d" in out.file.getvalue()
