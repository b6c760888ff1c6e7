"""Tasks: the prompts are the published ones, and right answers are told from wrong ones."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import textwrap
from pathlib import Path

import pytest
from data_fixtures import write_json, write_jsonl

from droplora_jax.core.errors import InputError
from droplora_jax.core.files import read_jsonl
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.sandbox.runner import Ending
from droplora_jax.inference.scoring import Result, ask, evaluate, wilson
from droplora_jax.inference.tasks import TASKS, code, humaneval, mbpp
from droplora_jax.inference.tasks.final_answer import boxed
from droplora_jax.inference.tasks.math import normalised
from droplora_jax.inference.tasks.mt_bench import answers

DATA = os.environ.get("DROPLORA_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="set DROPLORA_DATA to the folder of test sets")

HEAD = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
BOOLQ = {"instruction": "is ice cold?\n\nAnswer format: true/false", "answer": "true"}
GSM8K = {"question": "How much is 2 x 9?", "answer": "It is 2*9=<<2*9=18>>18.\n#### 18"}
SUM = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef two(x):\n    return 2 * x\n\n\ndef add(a, b):\n    """ a + b\n    >>> add(1, 2)\n    3\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 5) == 5\n",
}
SQUARE = {
    "task_id": 11,
    "text": "Write a function to square a number.",
    "code": "def square(x):\n  return x * x",
    "test_list": ["assert square(3) == 9", "assert square(-2) == 4"],
    "test_setup_code": "",
}
QUESTION = {"question_id": 81, "category": "writing", "turns": ["Name a city.", "Another."]}


def example(task: str, record: dict) -> dict:
    return {"id": "1", **TASKS[task].convert(record)}


def right(task: str, record: dict, completion: str) -> bool | None:
    return TASKS[task].score(example(task, record), completion).right


def extracted(task: str, record: dict, completion: str) -> str | None:
    return TASKS[task].score(example(task, record), completion).extracted


def test_every_task_goes_by_its_name():
    assert len(TASKS) == 13
    assert all(name == task.name for name, task in TASKS.items())


# --- prompts, as the authors of the paper feed them


def test_prompts_are_wrapped_as_published():
    prompt = TASKS["boolq"].prompt(example("boolq", BOOLQ), ())
    assert prompt == f"{HEAD}\n\n### Instruction:\n{BOOLQ['instruction']}\n\n### Response:\n"
    prompt = TASKS["gsm8k"].prompt(example("gsm8k", GSM8K), ())
    assert prompt == (
        f"{HEAD}\n\n### Instruction:\nHow much is 2 x 9?\n\n### Response: Let's think step by step."
    )
    prompt = TASKS["humaneval"].prompt(example("humaneval", SUM), ())
    assert prompt == (
        f"{HEAD}\n\n\n### Instruction:\nCreate a Python script for this problem:\n"
        'import math\n\n\ndef two(x):\n\treturn 2 * x\n\n\ndef add(a, b):\n\t""" a + b\n\t>>> add(1, 2)\n\t3\n\t"""\n'
        "\n\n### Response:"
    )
    assert "assert square(3) == 9" in TASKS["mbpp"].prompt(example("mbpp", SQUARE), ())


def test_a_wrapped_instruction_is_not_wrapped_twice():
    wrapped = TASKS["boolq"].prompt(example("boolq", BOOLQ), ())
    reference = {"instruction": wrapped, "input": "", "output": "true", "type": "boolq"}
    assert TASKS["boolq"].prompt(example("boolq", reference), ()) == wrapped
    assert right("boolq", reference, "true")
    steps = f"{HEAD}\n\n### Instruction:\n1 + 1?\n\n### Response: Let's think step by step."
    row = {"instruction": steps, "input": "", "output": "2", "type": "math"}
    assert TASKS["math"].prompt(example("math", row), ()) == steps
    assert TASKS["math"].prompt(example("math", {"problem": "1 + 1?", "answer": "2"}), ()) == steps


def test_the_second_turn_follows_the_first_and_its_answer():
    task, given = TASKS["mt_bench"], example("mt_bench", QUESTION)
    first = task.prompt(given, ())
    assert first == f"{HEAD}\n\n### Instruction:\nName a city.\n\n### Response:"
    assert task.prompt(given, (" Rome.\n\n",)) == (
        f"{first} Rome.\n\n### Instruction:\nAnother.\n\n### Response:"
    )


@needs_data
@pytest.mark.parametrize(
    ("task", "reference", "file"),
    [
        ("boolq", "commonsense", "commonsense_boolq_test.json"),
        ("humaneval", "python", "HumanEval.jsonl.gz"),
        ("mt_bench", "conversations", "mt_bench_question.jsonl"),
    ],
)
def test_prompts_are_those_of_the_authors_files(task, reference, file):
    rows = json.loads(Path(DATA, f"reference_format_{reference}.json").read_text())
    first = TASKS[task].read(f"{DATA}/{file}")[0]
    assert TASKS[task].prompt(first, ()) == rows[0]["instruction"]


# --- right and wrong answers


@pytest.mark.parametrize(
    ("task", "answer", "completion", "found"),
    [
        ("boolq", "true", "the correct answer is true", "true"),
        ("boolq", "true", "false, or rather true", "false"),
        ("boolq", "true", "True", None),
        ("boolq", "false", "", None),
        ("piqa", "solution2", "the correct answer is solution2", "solution2"),
        ("piqa", "solution2", "solution3 solution1", "solution1"),
        ("social_i_qa", "answer3", "answer3.", "answer3"),
        ("ARC-Easy", "answer5", "the correct answer is answer5", "answer5"),
        ("ARC-Challenge", "answer4", "answer6? answer 4", None),
        ("openbookqa", "answer1", "answer12", "answer1"),
        ("hellaswag", "ending4", "the correct answer is ending4", "ending4"),
        ("winogrande", "option1", "Option1: no. option2", "option2"),
    ],
)
def test_commonsense_takes_the_first_answer_that_is_named(task, answer, completion, found):
    row = {"instruction": "?", "answer": answer}
    outcome = TASKS[task].score(example(task, row), completion)
    assert (outcome.extracted, outcome.right) == (found, found == answer)


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("2 x 9 = 18. The answer is: 18", "18"),
        ("The answer is: 18.", "18"),
        ("The answer is: $18.00 a day", "18"),
        ("The answer is: **18**", "18"),
        ("**The answer is:** 18", "18"),
        ("The answer is: 17.6", "18"),
        ("The answer is: 36/2", "18"),
        ("The answer is: 3\nNo. The answer is: 18", "18"),
        ("The answer is: 18 ducks, not 20", "18"),
        ("The answer is: -18", "-18"),
        ("The answer is: 1,018", "1018"),
        ("The answer is: 1,234,567.2", "1234567"),
        ("The answer is: .7", "1"),
        ("The answer is: 19", "19"),
        ("The answer is: 4/0", None),
        ("The answer is: eighteen", None),
        ("The answer is 18.", "18"),
        ("So the final answer is $18. I hope it is correct.", "18"),
        ("It is 2*9=<<2*9=18>>18.\n#### 18", "18"),
        ("####18", "18"),
        ("#### $1,018", "1018"),
        ("#### Step 1: double it\nIt is 18", None),
        ("#### 1. Double it\nIt is 18", None),
        (r"So it is $\boxed{18}$.", "18"),
        (r"\[\boxed{1{,}018 \text{ ducks}}\]", "1018"),
        (r"\boxed{\frac{36}{2}}", "18"),
        ("18", None),
        ("", None),
    ],
)
def test_gsm8k_takes_the_first_number_behind_where_the_answer_is(completion, number):
    assert extracted("gsm8k", GSM8K, completion) == number
    assert right("gsm8k", GSM8K, completion) is (number == "18")


@pytest.mark.parametrize("sign", ["-", "\u2212"])
@pytest.mark.parametrize("currency", ["$", r"\$", "\u20ac", "\u00a3", ""])
def test_gsm8k_reads_negative_amounts(sign, currency):
    row = {"question": "?", "answer": "#### -18"}
    for amount in (f"{sign}{currency}18", f"{currency}{sign}18"):
        assert right("gsm8k", row, f"The answer is: {amount}.")
        assert right("gsm8k", row, f"#### {amount}")


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_the_forms_of_an_answer_are_tried_in_order(task):
    row = {"gsm8k": GSM8K, "math": {"problem": "?", "answer": "18"}}[task]
    forms = ["the answer is 1", r"\boxed{2}", *(["#### 3"] if task == "gsm8k" else [])]
    said = []
    for form in [*forms, "The answer is: 4"]:
        said = [form, *said]  # the form that counts comes first in the text
        assert extracted(task, row, "\n".join(said)) == re.search(r"\d", form).group()


def test_gsm8k_answers_with_thousands():
    row = {"question": "?", "answer": "so\n#### 2,125"}
    assert right("gsm8k", row, "The answer is: 2125")
    assert not right("gsm8k", row, "The answer is: 2,126")


SAME = [
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\tfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", ".5"),
    (r"\frac{1}{72}", r"\frac1{72}"),
    (r"\frac{3}{\sqrt{2}}", r"\frac3{\sqrt2}"),
    (r"2\sqrt{3}", r"2\sqrt3"),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$18", "18"),
    (r"50\%", "50"),
    (r"5\text{ cm}", "5"),
    ("x = 5", "5"),
    ("k=-3", "-3"),
    ("1 000", "1000"),
    (r"10,\!000", "10,000"),
    (r"\begin{pmatrix} 4 & 2 \\ -1 & 1 \end{pmatrix}", "\\begin{pmatrix}4&2\\\\-1&1\\end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "\\begin{pmatrix} 1 \\ 2 \\end{pmatrix}"),
    ("[-.5, 1]", "[-.5,1]"),
    (r"\text{Evelyn}", r"\text{Evelyn}"),
]
DIFFERENT = [
    ("3", "4"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac{1}{23}", r"\frac12 3"),
    (r"\sqrt{3}", "3"),
    ("-5", "5"),
    ("(1,2)", "(2,1)"),
    ("x+1", "x-1"),
    ("12", "1/2"),
    ("x = 5", "x = 6"),
    ("3.14", r"\pi"),
    (r"\text{Evelyn}", r"\text{Briana}"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_answers_that_are_the_same(a, b):
    assert normalised(a) == normalised(b)
    assert right(
        "math", {"problem": "?", "solution": rf"So $\boxed{{{a}}}$."}, f"The answer is: {b}"
    )


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_answers_that_differ(a, b):
    assert normalised(a) != normalised(b)
    assert not right("math", {"problem": "?", "answer": a}, f"The answer is: {b}")


@pytest.mark.parametrize(("a", "b"), [*SAME, *DIFFERENT])
def test_answers_are_equal_as_lm_evaluation_harness_has_them(a, b):
    theirs = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils").is_equiv
    assert theirs(a, b) == (normalised(a) == normalised(b))


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so $x=2$. The answer is: 2", "2"),
        ("The answer is: 2.\nI hope it is.", "2"),
        ("The answer is: $2$.", "2"),
        (r"The answer is: $\boxed{2}$.", "2"),
        ("The answer is: 1\n\nThe answer is: 2", "2"),
        ("The answer is: 2.5", "2.5"),
        ("The answer is:", None),
        ("The answer is: **2**", "2"),
        ("The answer is: 2\n\nLet me know!", "2"),
        ("Final Answer: The final answer is $2$. I hope it is correct.", "2"),
        (r"Thus the answer is \(\frac{1}{2}\).", r"\frac{1}{2}"),
        ("The answer is:\n\\[\nx = 2.\n\\]\nDone.", "x = 2"),
        ("The answer is: $$\n2\n$$", "2"),
        (r"The answer is: \[\boxed{2}\]", "2"),
        (r"The answer is: $\$2$.", r"\$2"),
        (r"The answer is: $2 dollars", "2 dollars"),
        (r"So $x = \boxed{2}$ and we are done.", "2"),
        (
            "The answer is: \\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}.",
            "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}",
        ),
        ("2", None),
        (r"\boxed{2", None),
    ],
)
def test_math_takes_the_expression_of_the_answer(completion, answer):
    assert extracted("math", {"problem": "?", "answer": "2"}, completion) == answer


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"$\boxed 7$", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed{1", None),
        ("none", None),
    ],
)
def test_what_the_last_box_holds(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    "answer", ["$2$", r"\(2\)", r"\boxed{2}", "So 1 + 1 = 2. The answer is: 2"]
)
def test_the_answer_of_a_row_of_math_is_read_like_a_completion(answer):
    assert example("math", {"problem": "?", "answer": answer})["answer"] == "2"
    assert example("math", {"instruction": "?", "output": answer})["answer"] == "2"


ADD = "def add(a, b):\n    return a + b\n"
ADDS = {
    "the body": "    return a + b\n",
    "the body, then another function": "    return a + b\n\n\ndef add(a, b):\n    return 0\n"[:18],
    "the body in tabs": "\treturn a + b\n",
    "the whole": ADD,
    "a fenced block": f"Here you are:\n\n```python\n{ADD}```\nIt adds.",
    "a block that was cut short": f"```python\n{ADD}",
    "prose around": f"Sure, this adds.\n\n{ADD}\nThis works since it's addition.\n",
    "a test of its own that fails": f"{ADD}\nassert add(1, 1) == 3\nprint(1 / 0)\n",
    "a main block": f"{ADD}\nif __name__ == '__main__':\n    exit(3)\n",
    "a helper behind": "def add(a, b):\n    return plus(a, b)\n\n\ndef plus(a, b):\n    return a + b\n",
    "a helper of the prompt": "def add(a, b):\n    return two(a) - a + b\n",
    "an import before": "from __future__ import annotations\nimport operator\n\ndef add(a, b):\n    return operator.add(a, b)\n",
    "another block first": f"```bash\npip install x\n```\n\n```python\n{ADD}```",
    "tabs": ADD.replace("    ", "\t"),
    "an indented fence": "1. So:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
    "an indented whole": textwrap.indent(ADD, "    "),
    "a space before the whole": " " + ADD,
    "a body in an indented fence": "So:\n  ```\n  return a + b\n  ```\n",
}
FAILS = {
    "a wrong answer": "def add(a, b):\n    return a - b\n",
    "nothing": "",
    "prose": "I can't do that.",
    "an exit on the way": "import sys\nsys.exit(0)\n\ndef add(a, b):\n    return 0\n",
    "no function": "add = 3\n",
    "half of it": "def add(a, b):\n    return (a +",
}
CHEATS = {
    "an early exit": "def add(a, b):\n    raise SystemExit(0)\n",
    "the hard exit": "import os\n\ndef add(a, b):\n    os._exit(0)\n",
}


def run_here(source: str) -> Ending:
    """As `run_program`, in this process: for code that neither leaves it nor does harm."""
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "program"})
    except (Exception, SystemExit) as error:
        return Ending(False, repr(error), "")
    return Ending(True, "", "")


BODY = "total = a\nfor _ in range(b):\n    total += 1\nreturn total\n"


def indented(first: int, others: int, unit: int = 4) -> str:
    """`BODY` with its first line, and the others, so far from the edge."""
    lines = BODY.replace("    ", " " * unit).split("\n")
    return " " * first + "\n".join([lines[0], *(" " * others + line for line in lines[1:])])


@pytest.mark.parametrize("prose", ["", "\nThis adds one, b times.\n"])
@pytest.mark.parametrize(
    ("first", "others", "unit"),
    [(4, 4, 4), (0, 4, 4), (1, 4, 4), (3, 4, 4), (0, 0, 4), (2, 2, 2), (8, 8, 4), (0, 2, 2)],
)
def test_a_body_whose_indentation_slipped_is_put_at_the_depth_of_its_function(
    first, others, unit, prose
):
    completion = indented(first, others, unit) + prose
    for head in (SUM["prompt"], "def add(a, b):\n"):
        written = ast.parse(head + code.body(completion, head))
        assert ast.dump(written) == ast.dump(ast.parse(head + textwrap.indent(BODY, "    ")))


@pytest.mark.parametrize("completion", ADDS.values(), ids=ADDS)
def test_code_that_is_right_however_it_is_presented(completion, monkeypatch):
    monkeypatch.setattr(humaneval, "run_program", run_here)
    outcome = TASKS["humaneval"].score(example("humaneval", SUM), completion)
    assert outcome.right, outcome


@pytest.mark.parametrize("completion", FAILS.values(), ids=FAILS)
def test_code_that_is_wrong(completion, monkeypatch):
    monkeypatch.setattr(humaneval, "run_program", run_here)
    assert right("humaneval", SUM, completion) is False


@pytest.mark.parametrize("completion", CHEATS.values(), ids=CHEATS)
def test_code_that_cheats(completion):
    assert right("humaneval", SUM, completion) is False


def test_code_runs_in_a_process_of_its_own():
    pid = f"def add(a, b):\n    import os\n    return a + b + (os.getpid() == {os.getpid()})\n"
    assert right("humaneval", SUM, pid)
    assert right("mbpp", SQUARE, pid.replace("add(a, b)", "square(x)").replace("a + b", "x * x"))


def test_mbpp_runs_its_assertions(monkeypatch):
    monkeypatch.setattr(mbpp, "run_program", run_here)
    assert right("mbpp", SQUARE, "```python\ndef square(x):\n    return x * x\n```")
    assert right("mbpp", SQUARE, "def square(x):\n  return x ** 2\nprint(square('a'))")
    assert right("mbpp", SQUARE, "def square(x): return abs(x) * 3") is False
    assert right("mbpp", SQUARE, "def cube(x): return x") is False
    sanitized = {"task_id": 12, "prompt": "Root.", "test_list": ["assert root(4) == math.sqrt(4)"]}
    sanitized["test_imports"] = ["import math"]
    assert right("mbpp", sanitized, "def root(x):\n    return x ** 0.5")


def test_mbpp_reads_its_test_set_alone(tmp_path):
    rows = [{**SQUARE, "task_id": number} for number in (10, 11, 510, 511)]
    file = write_jsonl(tmp_path / "mbpp.jsonl", rows)
    assert [row["id"] for row in TASKS["mbpp"].read(file)] == ["11", "510"]
    with pytest.raises(InputError, match="no row of mbpp's test set"):
        TASKS["mbpp"].read(write_jsonl(tmp_path / "train.jsonl", rows[:1]))


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("form", ["body", "whole", "fenced"])
def test_every_canonical_solution_of_humaneval_passes(form):
    file = f"{DATA}/HumanEval.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        rows = {row["task_id"]: row for row in map(json.loads, lines)}
    task = TASKS["humaneval"]
    examples = task.read(file)
    body = {e["id"]: rows[e["id"]]["canonical_solution"] for e in examples}
    whole = {e["id"]: e["prompt"] + body[e["id"]] for e in examples}
    fenced = {
        key: f"So:\n```python\n{text}\nprint(1 / 0)\n```\nDone." for key, text in whole.items()
    }
    said = {"body": body, "whole": whole, "fenced": fenced}[form]
    by_prompt = {task.prompt(e, ()): said[e["id"]] for e in examples}
    assert len(by_prompt) == 164
    result = evaluate(
        task, examples, lambda prompts, _: [by_prompt[p] for p in prompts], run_code=True
    )
    assert (result.right, len(result.rows)) == (164, 164)


@needs_data
@pytest.mark.parametrize(
    "task",
    [name for name in TASKS if name not in ("hellaswag", "math", "mbpp", "humaneval", "mt_bench")],
)
def test_the_answers_in_the_files_are_right_and_others_are_not(task):
    name = "gsm8k_test.jsonl" if task == "gsm8k" else f"commonsense_{task}_test.json"
    examples = TASKS[task].read(f"{DATA}/{name}")
    phrase = "The answer is: {}" if task == "gsm8k" else "the correct answer is {}"
    if task == "gsm8k":
        for given, row in zip(examples, read_jsonl(Path(DATA, name)), strict=True):
            assert TASKS[task].score(given, row["answer"]).right
    for given in examples:
        assert TASKS[task].score(given, phrase.format(given["answer"])).right
        assert TASKS[task].score(given, phrase.format("7x")).right is (given["answer"] == "7")


# --- files


@pytest.mark.parametrize(
    ("task", "record", "says"),
    [
        ("boolq", {"answer": "true"}, "instruction is missing"),
        ("boolq", {"instruction": "?"}, "answer is missing"),
        ("boolq", {"instruction": "?", "answer": "maybe"}, "'maybe' is none of true, false"),
        ("piqa", BOOLQ, "none of solution1, solution2"),
        ("gsm8k", {"question": "?"}, "answer is missing"),
        ("gsm8k", {"question": "?", "answer": "18"}, "no number behind ####"),
        ("math", {"question": "?"}, "problem is missing"),
        ("math", {"problem": "?", "solution": "two"}, "boxed"),
        ("humaneval", {"prompt": "def f():", "entry_point": "f"}, "task_id is missing"),
        ("humaneval", {**SUM, "entry_point": "sub"}, "does not define the entry_point 'sub'"),
        ("mbpp", {**SQUARE, "task_id": "a"}, "task_id must be a number"),
        ("mbpp", {**SQUARE, "test_list": []}, "test_list is empty"),
        ("mbpp", {**SQUARE, "test_list": ["assert ("]}, "is no Python"),
        ("mt_bench", {"turns": ["a", "b"]}, "question_id is missing"),
        ("mt_bench", {"question_id": 1, "turns": ["a"]}, "a list of 2 questions"),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path, task, record, says):
    good = {"boolq": BOOLQ, "gsm8k": GSM8K, "humaneval": SUM, "mbpp": SQUARE, "mt_bench": QUESTION}
    first = [good[task]] if task in good else []
    file = write_jsonl(tmp_path / "rows.jsonl", [*first, record])
    with pytest.raises(InputError) as error:
        TASKS[task].read(file)
    assert f"rows.jsonl:{len(first) + 1}" in str(error.value)
    assert says in str(error.value)


def test_an_id_twice_is_named(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [SUM, SUM])
    with pytest.raises(InputError, match=r"rows.jsonl:2: id 'HumanEval/0' is that of .*:1"):
        TASKS["humaneval"].read(file)


# --- asking and counting


def test_a_result_counts_and_keeps_the_order(tmp_path):
    rows = [{"instruction": "?" * (i + 1), "answer": "true"} for i in range(7)]
    examples = TASKS["boolq"].read(write_json(tmp_path / "rows.json", rows))
    asked: list[list[str]] = []

    def complete(prompts, sampling):
        assert sampling == Sampling(max_new_tokens=32, stop=("### Instruction:",))
        asked.append(list(prompts))
        return ["true" if "?" * 4 in prompt else "false" for prompt in prompts]

    result = evaluate(TASKS["boolq"], examples, complete, batch_size=3)
    assert [len(batch) for batch in asked] == [3, 3, 1]
    lengths = [len(prompt) for batch in asked for prompt in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [row["id"] for row in result.rows] == [str(i) for i in range(1, 8)]
    assert [row["right"] for row in result.rows] == [False] * 3 + [True] * 4
    assert (result.right, result.accuracy) == (4, 4 / 7)
    assert result.rows[6]["prompt"].endswith("???????\n\n### Response:\n")
    assert len(evaluate(TASKS["boolq"], examples, complete, limit=2).rows) == 2


def test_turns_see_what_was_said(tmp_path):
    task = TASKS["mt_bench"]
    examples = task.read(write_jsonl(tmp_path / "q.jsonl", [QUESTION]))

    def complete(prompts, sampling):
        return [" Oslo.\n" if "Rome" in prompt else " Rome." for prompt in prompts]

    result = evaluate(task, examples, complete)
    (row,) = result.rows
    assert row["turns"] == [" Rome.", " Oslo.\n"]
    assert (row["completion"], row["right"], result.accuracy) == (" Oslo.\n", None, None)
    (answer,) = answers(examples, result.rows, "tiny")
    assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert answer["question_id"] == 81
    assert answer["choices"] == [{"index": 0, "turns": ["Rome.", "Oslo."]}]


class Short:
    """A model with room for `positions` words, which answers with up to `length` of them."""

    def __init__(self, positions: int, length: int) -> None:
        self.positions, self.length = positions, length

    def room(self, prompts):
        return [self.positions - len(prompt.split()) for prompt in prompts]

    def __call__(self, prompts, sampling):
        assert all(room >= sampling.max_new_tokens for room in self.room(prompts))
        return [" so" * min(self.length, sampling.max_new_tokens) for _ in prompts]


@pytest.mark.parametrize(("length", "left"), [(1, None), (6, 3), (9, 0), (12, 0)])
def test_a_later_turn_gets_the_room_that_is_left(length, left):
    task, one = TASKS["mt_bench"], example("mt_bench", QUESTION)
    second_prompt = len(task.prompt(one, ("",)).split())
    model = Short(second_prompt + 9, length)
    (row,) = evaluate(task, [one], model, max_new_tokens=max(length, 6)).rows
    first, second = (len(turn.split()) for turn in row["turns"])
    assert (first, second) == (length, length if left is None else left)
    if left is None:
        assert "note" not in row
    else:
        assert row["note"].startswith(f"turn 2: room for {left} of {max(length, 6)} new tokens")


def test_completions_without_an_answer_are_counted():
    examples = [{**example("boolq", BOOLQ), "id": str(i)} for i in range(4)]
    said = iter(["true", "false", "perhaps", ""])
    result = evaluate(TASKS["boolq"], examples, lambda prompts, _: [next(said) for _ in prompts])
    assert (result.right, result.unread) == (1, 2)
    one = example("mt_bench", QUESTION)
    assert evaluate(TASKS["mt_bench"], [one], lambda prompts, _: ["" for _ in prompts]).unread == 0


def test_code_runs_only_when_that_is_allowed():
    def complete(prompts, sampling):
        raise AssertionError("nothing may be asked")

    with pytest.raises(InputError, match="--run-code"):
        list(ask(TASKS["humaneval"], [example("humaneval", SUM)], complete))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # From the formula's author's own kind of table, and worked by hand: z = 1.959964.
    [
        (0, 10, 0.0, 0.277533),
        (5, 10, 0.236593, 0.763407),
        (81, 263, 0.255289, 0.366211),
        (10, 10, 0.722467, 1.0),
    ],
)
def test_the_interval_is_wilsons(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=2e-5)


def test_no_rows_have_no_accuracy():
    empty = Result("boolq", ())
    assert (empty.accuracy, empty.interval) == (None, None)
