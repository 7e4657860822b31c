"""Candidates for protection where a trial stops: labels around the failed operation, the closest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from passdeploy.tracing.trace import OpRecord, Trace


def labels_around(failed: OpRecord, trace: Trace, model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield sets of label vectors, each vector once; protecting one of the sets may let the network run.

    Args:
        failed: the operation at which the cut network stopped.
        trace: of the whole network.
        model: the whole network.
    """
    # A module without weights that computes with a width, which nothing inside of it shows.
    yield [one.labels for one in trace.fixed_outputs if one.module in failed.modules]
    for records in _records_around(failed, trace.op_log, model):
        yield list(
            {
                id(vector): vector
                for record in records
                for _, labels in (*record.inputs, *record.results)
                for vector in labels.values()
            }.values()
        )


def _records_around(failed: OpRecord, op_log: Sequence[OpRecord], model: nn.Module) -> Iterator[list[OpRecord]]:
    """Yield operations from which the size that failed may come.

    First the same line of code with the same shapes, then whatever else this line does (`q @ k / width**0.5` divides
    what has no channels left), then all that the modules around these do, then the same line with any shapes, then all
    that modules of the same class do, then all that those of the enclosing classes do.
    """
    same_line = [record for record in op_log if (record.op, record.source) == (failed.op, failed.source)]
    same_shapes = [record for record in same_line if _shapes_of(record) == _shapes_of(failed)]
    owners = {record.modules[-1] for record in same_shapes if record.modules}
    yield same_shapes
    yield [record for record in op_log if record.source == failed.source and owners.intersection(record.modules[-1:])]
    yield [record for record in op_log if owners.intersection(record.modules)]
    yield same_line
    for depth in range(1, len(failed.modules) + 1):
        kind = type(model.get_submodule(failed.modules[-depth]))
        names = {name for name, module in model.named_modules() if type(module) is kind}
        yield [record for record in op_log if names.intersection(record.modules)]


def _shapes_of(record: OpRecord) -> list[tuple[int, ...]]:
    return [shape for shape, _ in (*record.inputs, *record.results)]
