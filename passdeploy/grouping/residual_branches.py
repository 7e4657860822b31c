"""Find residual branches in the data flow of a network: additions of a value and what is computed from it.

A branch can be left out where the rest of the network uses nothing of it but the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from passdeploy.tracing.dataflow import DataFlow, FlowOp
from passdeploy.tracing.op_call import aten

_PROJECTED = "both summands are computed from its input, as where the shape changes"
_CONCATENATED = "its output is concatenated with its input, not added to it"


@dataclass(frozen=True)
class Branch:
    """A branch and the value that it is added to."""

    joining: int  # index of the operation that adds the branch to its input
    input: int  # value; the branch is computed from it, or from what it is a product of
    output: int  # value: what is added
    side: int  # which summand it is, 0 or 1
    region: frozenset[int]  # indices of the operations that nothing but the branch needs
    path: frozenset[int]  # those of them that compute from its input; the others make constants
    reason: str = ""  # why it cannot be left out


class BranchFinder:
    """Finder of the residual branches of one forward pass.

    Args:
        flow: the data flow.
    """

    def __init__(self, flow: DataFlow) -> None:
        self._flow = flow
        self._depends_on_input = _computed_from(flow.inputs, flow.ops)
        self._readers: dict[int, list[int]] = {}  # value -> operations that read it, of those that have an effect
        self.is_live = [False] * len(flow.ops)  # the operation has an effect on what the network returns
        for index in range(len(flow.ops) - 1, -1, -1):
            op = flow.ops[index]
            if any(value in flow.outputs or value in self._readers for value in op.outputs):
                self.is_live[index] = True
                for value in dict.fromkeys(op.inputs):
                    self._readers.setdefault(value, []).append(index)

    def branches(self) -> Iterator[Branch]:
        """Find all branches in the order of the forward pass, and sums and concatenations that look like one."""
        for index, op in enumerate(self._flow.ops):
            if not self.is_live[index] or len(op.inputs) < 2 or not self._mixes_inputs(op):
                continue
            if op.packet is aten.add:
                yield self._branch_at(index, op)
            elif op.packet is aten.cat:
                first, last = op.inputs[0], op.inputs[-1]
                if self._between(first, last) or self._between(last, first):
                    yield Branch(index, first, last, 1, frozenset(), frozenset(), _CONCATENATED)

    def _mixes_inputs(self, op: FlowOp) -> bool:
        return all(value in self._depends_on_input for value in op.inputs) and len(set(op.inputs)) > 1

    def _branch_at(self, index: int, op: FlowOp) -> Branch:
        for side in (1, 0):
            x, output = op.inputs[1 - side], op.inputs[side]
            start = x if self._between(x, output) else self._before_scale(x)
            if path := self._between(start, output):
                region = self._exclusive(start, output, index)
                return Branch(index, x, output, side, region, path, self._obstacle(index, x, side, path - region))
        return Branch(index, op.inputs[0], op.inputs[1], 1, frozenset(), frozenset(), _PROJECTED)

    def _before_scale(self, x: int) -> int:
        """Return the value of which `x` is a product with a constant, such as a parameter; `x` itself if it is none."""
        made = self._flow.producers.get(x, -1)
        op = self._flow.ops[made] if made >= 0 else None
        scaled = [value for value in op.inputs if value in self._depends_on_input] if op else []
        return scaled[0] if op and op.packet is aten.mul and len(scaled) == 1 else x

    def _obstacle(self, index: int, x: int, side: int, shared: frozenset[int]) -> str:
        """Return why a branch cannot be left out, or "".

        Args:
            index: of the addition.
            x: what the branch is added to.
            side: which summand the branch is.
            shared: operations of the branch that something else needs as well.
        """
        flow, op = self._flow, self._flow.ops[index]
        if flow.kinds[x] != flow.kinds[op.outputs[0]]:
            return "the sum has another shape or type than its input"
        if op.addition is None:
            return "the addition is not a call of torch.add in the model's own code"
        if side == 0 and op.scalars[:1] not in ((), (1,)):
            return "its input is multiplied by a number where it is added"
        if x in flow.inputs:
            return "its input is that of the network"
        if shared:
            first = flow.ops[min(shared)]
            return f"something else uses what {first.name} at {first.source} computes inside of it"
        return ""

    def _between(self, x: int, value: int) -> frozenset[int]:
        """Return the operations on any way from `x` to `value`; none if the second does not depend on the first."""
        behind = self._behind(x, value)
        found, on_the_way = {x}, set[int]()
        for index in sorted(behind):
            if found.intersection(self._flow.ops[index].inputs):
                found.update(self._flow.ops[index].outputs)
                on_the_way.add(index)
        return frozenset(on_the_way) if value in found else frozenset()

    def _behind(self, x: int, value: int) -> set[int]:
        """Return the operations that `value` needs, of those that run after the one that made `x`."""
        producers, earliest = self._flow.producers, self._flow.producers.get(x, -1)
        found, waiting = set[int](), [value]
        while waiting:
            index = producers.get(waiting.pop(), -1)
            if index > earliest and index not in found:
                found.add(index)
                waiting += self._flow.ops[index].inputs
        return found

    def _exclusive(self, x: int, output: int, joining: int) -> frozenset[int]:
        """Return the operations behind `output` whose results nothing else uses."""
        found: set[int] = set()
        for index in sorted(self._behind(x, output), reverse=True):
            values = self._flow.ops[index].outputs
            readers = {reader for value in values for reader in self._readers.get(value, ())}
            if readers <= found | {joining} and not self._flow.outputs.intersection(values) and x not in values:
                found.add(index)
        return frozenset(found)


def _computed_from(values: Iterable[int], ops: Iterable[FlowOp]) -> set[int]:
    """Return `values` and all that is computed from them."""
    found = set(values)
    for op in ops:
        if found.intersection(op.inputs):
            found.update(op.outputs)
    return found
