"""Mutants: what the operators make of a file, which tests run a line, and what they say of a mutant."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from benchmarks.reliability.__main__ import markdown
from benchmarks.reliability.mutant_forks import Forks, Verdict, require_clean
from benchmarks.reliability.mutant_operators import mutants_of, mutated
from benchmarks.reliability.mutant_tests import record_tests
from benchmarks.reliability.mutants import all_mutants, drawn, tally_of

CHANGES = {  # statement of a function -> what becomes of it
    "if a < b: return None": {"if a <= b: return None", "if not a < b: return None"},
    "if a is b: return None": {"if a is not b: return None"},
    "if not a: return None": {"if a: return None"},
    "x = [y for y in a if y]": {"x = [y for y in a if not y]"},
    "x = a and b": {"x = a or b"},
    "x = a + b": {"x = a - b"},
    "x += a": {"x -= a", "pass"},
    "x = -a": {"x = a"},
    "x = 3": {"x = 4", "x = 2"},
    "x = True": {"x = False"},
    "x = min(a)": {"x = max(a)"},
    "x = a.any()": {"x = a.all()"},
    "x = a[b:c]": {"x = a[:c]", "x = a[b:]"},
    "return a": {"return None"},
    "a[b] = c": {"pass"},
    "a(b)": {"pass"},
    "for x in a: break": {"for x in a: continue"},
    "def g(c='d'): pass": {"def g(c='dx'): pass"},
    # What computes nothing stays.
    "raise a(1 + 2)": set(),
    "assert a < b": set(),
    "x = f'{a + 1}'": set(),
    "x: a + b = c": set(),
    "'text'": set(),
    "return None": set(),
}


@pytest.mark.parametrize("statement", CHANGES)
def test_operators(statement: str):
    source = f"def f(a, b, c):\n    {statement}\n"
    mutants = mutants_of(source, "f.py")
    found = [ast.unparse(mutated(source, mutant.place, mutant.choice).body[0].body[0]) for mutant in mutants]
    assert sorted(found) == sorted(ast.unparse(ast.parse(changed)) for changed in CHANGES[statement])


def test_lines_of_a_mutant_are_those_of_its_statement():
    source = "a = 1\ndef f(b=2):\n    c = (\n        3\n    )\n    return c\nclass D:\n    e = 4\n"
    lines = {mutant.old: mutant.lines for mutant in mutants_of(source, "f.py")}
    assert lines["1"] == lines["4"] == range(0)  # at import
    assert lines["2"] == range(3, 7)
    assert lines["3"] == range(3, 6)
    assert lines["return c"] == range(6, 7)


def test_mutants_are_drawn_of_each_file_in_proportion():
    mutants = {"one.py": mutants_of("x = 1\n" * 30, "one.py"), "two.py": mutants_of("x = 1\n" * 10, "two.py")}
    chosen = drawn(mutants, 21, seed=0)
    assert sorted(mutant.file for mutant in chosen) == ["one.py"] * 16 + ["two.py"] * 5
    assert len(set(chosen)) == 21
    assert drawn(mutants, 21, seed=0) == chosen != drawn(mutants, 21, seed=1)
    assert len(drawn(mutants, 1000, seed=0)) == 80


@pytest.mark.parametrize(("found", "is_good"), [(8, True), (7, False)])
def test_the_row_is_good_with_four_of_five_mutants(found: int, is_good: bool):
    mutants = mutants_of("x = 1\n" * 5, "passdeploy/channels/one.py")
    verdicts = [Verdict(mutant, "found" if number < found else "survived") for number, mutant in enumerate(mutants)]
    tally = tally_of(verdicts, total=10, began_s=0.0)
    assert (tally.good, tally.trials, tally.is_good) == (found, 10, is_good)
    assert len(tally.to_json()["survivors"]) == 10 - found
    row = {**tally.to_json(), "goal": 300, "versions": {"python": "3", "torch": "2", "onnx": "1"}}
    text = markdown({"rows": {"mutants": row}})
    assert f"| {found} ({found}0.0 %) | 10 | 300 | {found} found, {10 - found} survived |" in text
    assert ("Failures:" in text) == (not is_good)


SOURCE = """
LIMIT = 5
STEP = len('x')

def is_large(x, times=1):
    return x * times > LIMIT

def count(limit):
    number = 0
    while number < limit:
        number += STEP
    return number

def unused():
    return 7
"""
TESTS = """
import pytest
from project.code import count, is_large

@pytest.fixture(scope="module")
def counted():
    return count(4)

def test_large():
    assert is_large(6)

def test_small():
    assert not is_large(3)

def test_count(counted):
    assert counted is not None

def test_count_exactly(counted):
    assert counted == 4
"""

OUTCOMES = {
    "5 -> 6": "found",
    "x * times > LIMIT -> x * times >= LIMIT": "survived",
    "1 -> 2": "found",  # the default of an argument
    "number += STEP -> number -= STEP": "no end",
    "return number -> return None": "found",
    "return 7 -> return None": "not run",
}


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_mutants_of_a_small_project(tmp_path: Path):
    for name, text in {"project/__init__.py": "", "project/code.py": SOURCE, "checks/test_code.py": TESTS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tests = record_tests(tmp_path, ["project"], ["checks"])
    code = "project/code.py"
    assert {test.partition("::")[2] for test in tests.of(code, [9])} == {"test_count", "test_count_exactly"}
    assert len(tests.of(code, range(0))) == 4
    mutants = all_mutants(tmp_path, ["project"])[code]
    with Forks(tmp_path, ["checks"], grace_s=2) as forks:
        require_clean(forks, tests)
        verdicts = [forks.examine(mutant, tests) for mutant in mutants if f"{mutant.old} -> {mutant.new}" in OUTCOMES]
    assert {f"{one.mutant.old} -> {one.mutant.new}": one.outcome for one in verdicts} == OUTCOMES
