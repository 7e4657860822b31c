"""Find the width that a norm without any tensor states, which is read off nothing after a cut."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.constraints import LabelledSize
from passdeploy.tracing.trace import Trace

_NORM = nn.modules.batchnorm._NormBase


def stated_norm_widths(model: nn.Module, trace: Trace) -> tuple[LabelledSize, ...]:
    """List `num_features` of the instance and batch norms that have neither scale nor running statistics.

    Torch compares it with the width of the input, and warns.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NORM) and not (module.affine or module.track_running_stats)
    }
    return tuple(_widths(norms, trace)) if norms else ()


def _widths(norms: dict[str, nn.modules.batchnorm._NormBase], trace: Trace) -> Iterator[LabelledSize]:
    left = dict(norms)
    for record in trace.op_log:
        if not record.modules or record.modules[-1] not in left or not record.inputs:
            continue
        norm, (shape, labels) = left.pop(record.modules[-1]), record.inputs[0]  # of a norm's first operation
        for dim in (1, 0):  # 0 without a batch dimension
            if dim in labels and shape[dim] == norm.num_features:
                yield LabelledSize(SizeAttribute(record.modules[-1], "num_features", None), labels[dim])
                break
