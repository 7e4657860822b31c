"""The list of planted faults fits the code, and `verify` finds three of them; benchmarks/mutations.py runs them all."""

from __future__ import annotations

import ast
import pickle
from collections import Counter
from pathlib import Path

import pytest

import passdeploy
from benchmarks.mutation_list import MUTATIONS
from benchmarks.mutation_networks import prepare
from benchmarks.mutations import ROOT, copy_project, verify_finding

PACKAGE = Path(passdeploy.__file__).parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_can_be_planted_in_one_place(mutation):
    text = (PACKAGE / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new))


def test_there_are_enough_faults_and_each_has_its_own_name():
    assert len(MUTATIONS) >= 40
    assert max(Counter(mutation.name for mutation in MUTATIONS).values()) == 1
    assert len({mutation.file for mutation in MUTATIONS}) >= 10


@pytest.mark.parametrize(
    ("fault", "network"),
    [
        ("the group count of a grouped convolution stays", "depthwise convolutions"),
        ("a softmax is masked with zero", "softmax over channels"),
        ("requires_grad is lost", "partly frozen"),
    ],
)
def test_verify_finds_a_planted_fault(fault: str, network: str, tmp_path: Path):
    project, cases = tmp_path / "project", tmp_path / "cases.pickle"
    copy_project(ROOT, project)
    cases.write_bytes(pickle.dumps(prepare([network])))
    next(mutation for mutation in MUTATIONS if mutation.name == fault).plant_(project / "passdeploy")
    finding = verify_finding(project, cases)
    assert finding is not None
    assert finding["network"] == network
