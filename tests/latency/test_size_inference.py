from __future__ import annotations

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.latency.size_inference import SizeExplainer, infer_sizes
from passdeploy.profiling.kernel_times import NodeTime

A, B = np.array([64, 16, 48, 32, 24, 64]), np.array([32, 32, 16, 24, 8, 16])


def explainer() -> SizeExplainer:
    return SizeExplainer({"a": A, "b": B, "fixed": np.full(6, 10)}, 16)


def node(*dims: np.ndarray, kind: str = "Conv", inputs: int = 1) -> list[NodeTime]:
    """Make one node as timed in six networks; every argument is the channel dimension of one of its tensors."""
    return [NodeTime("n", kind, tuple((1, int(sizes[i]), 7, 7) for sizes in dims), inputs, 1.0) for i in range(6)]


def test_a_size_is_told_from_what_it_was():
    sizes_by_width = explainer()
    assert sizes_by_width.explain(A) == Factor(0, (("a", 1),))
    assert sizes_by_width.explain(49 * B) == Factor(0, (("b", 49),))  # a flattened map
    assert sizes_by_width.explain(3 * A + 5) == Factor(5, (("a", 3),))
    assert sizes_by_width.explain(A * B) is None


def test_a_size_that_a_kernel_rounds_up_is_told_all_the_same():
    assert explainer().explain(-(-B // 16) * 16) == Factor(0, (("b", 1),))


def test_a_concatenation_is_as_long_as_its_parts_and_so_is_what_reads_it():
    sizes_by_width = explainer()
    kind, sizes = infer_sizes(node(A, B, A + B, kind="Concat", inputs=2), sizes_by_width)
    assert sizes == (Factor(0, (("a", 1), ("b", 1))),)  # it costs what it writes
    assert kind.startswith("Concat")
    assert infer_sizes(node(A + B, B), sizes_by_width)[1] == (Factor(0, (("a", 1), ("b", 1))), Factor(0, (("b", 1),)))


def test_nodes_of_the_same_work_have_the_same_signature():
    sizes_by_width = explainer()
    assert infer_sizes(node(A, B), sizes_by_width)[0] == infer_sizes(node(B, A), sizes_by_width)[0]
    assert infer_sizes(node(A, A), sizes_by_width)[0] != infer_sizes(node(A, B), sizes_by_width)[0]


def test_what_nothing_explains_is_left_out():
    assert infer_sizes(node(A * B, A), explainer())[1] == (Factor(0, (("a", 1),)),)
