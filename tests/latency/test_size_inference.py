from __future__ import annotations

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.latency.size_inference import Dictionary, sizes_of
from passdeploy.profiling.kernel_times import NodeTime

A, B = np.array([64, 16, 48, 32, 24, 64]), np.array([32, 32, 16, 24, 8, 16])


def words() -> Dictionary:
    return Dictionary({"a": A, "b": B, "fixed": np.full(6, 10)}, 16)


def node(*dims: np.ndarray, kind: str = "Conv", inputs: int = 1) -> list[NodeTime]:
    """The same node in six networks; every argument is the channel dimension of one of its tensors."""
    return [
        NodeTime("n", kind, tuple((1, int(values[look]), 7, 7) for values in dims), inputs, 1.0) for look in range(6)
    ]


def test_a_size_is_told_from_what_it_was():
    found = words()
    assert found.explain(A) == Factor(0, (("a", 1),))
    assert found.explain(49 * B) == Factor(0, (("b", 49),))  # a flattened map
    assert found.explain(3 * A + 5) == Factor(5, (("a", 3),))
    assert found.explain(A * B) is None


def test_a_size_that_a_kernel_rounds_up_is_told_all_the_same():
    assert words().explain(-(-B // 16) * 16) == Factor(0, (("b", 1),))


def test_a_concatenation_is_as_long_as_its_parts_and_so_is_what_reads_it():
    found = words()
    kind, sizes = sizes_of(node(A, B, A + B, kind="Concat", inputs=2), found)
    assert sizes == (Factor(0, (("a", 1), ("b", 1))),)  # it costs what it writes
    assert kind.startswith("Concat")
    assert sizes_of(node(A + B, B), found)[1] == (Factor(0, (("a", 1), ("b", 1))), Factor(0, (("b", 1),)))


def test_nodes_of_the_same_work_have_the_same_signature():
    found = words()
    assert sizes_of(node(A, B), found)[0] == sizes_of(node(B, A), found)[0]
    assert sizes_of(node(A, A), found)[0] != sizes_of(node(A, B), found)[0]


def test_what_nothing_explains_is_left_out():
    assert sizes_of(node(A * B, A), words())[1] == (Factor(0, (("a", 1),)),)
