"""The rule for reductions: sums, means, norms, softmax, maxima and sorts along dimensions."""

from __future__ import annotations

from passdeploy.tracing.op_call import OpCall, aten
from passdeploy.tracing.rules.elementwise import elementwise_rule
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.tracer import ChannelTracer

# Of these `masked` can take only the remaining channels, as a slim network does.
_RESTRICTABLE = {
    *(aten.mean, aten.sum, aten.amax, aten.amin, aten.aminmax, aten.max, aten.min, aten.linalg_vector_norm),
    *(aten._softmax, aten.logsumexp, aten.var, aten.std, aten.var_mean, aten.std_mean),
}


@rule("mean", "sum", "amax", "amin", "prod", "std", "var", "var_mean", "std_mean", "max", "min", "argmax", "argmin")
@rule("any", "all", "norm", "linalg_vector_norm", "logsumexp", "median", "cumsum", "sort", "topk", "aminmax")
@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax", "nansum", "count_nonzero", "cumprod")
def reduction_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Record a reduction over channels that `masked` can restrict to the remaining ones; protect those of any other."""
    source = call.tensors[0]
    labels = tracer.labels(source)
    if len(call.tensors) > 1:  # max(a, b) and min(a, b)
        return elementwise_rule(tracer, call)
    dims = call.arguments.get("dim")
    reduced = {d % source.ndim for d in ([dims] if isinstance(dims, int) else dims or range(source.ndim))}
    for dim in sorted(reduced & labels.keys()):
        if _is_unbiased(call):
            tracer.protect(labels[dim], "an unbiased variance, which a single channel has none of")
        elif call.packet not in _RESTRICTABLE or not tracer.record_reduction(dim - source.ndim, labels[dim]):
            tracer.protect(labels[dim], "a statistic over these channels depends on their number")
        elif call.packet in (aten.max, aten.min) and len(call.results) == 2:
            # The place of a maximum is the number of a channel; the slim network has other numbers.
            tracer.protect_where_used(call.results[1], [labels[dim]], "the place of a maximum or minimum is used")
    for result in call.results:
        if result.ndim == source.ndim:
            kept = {d: v for d, v in labels.items() if result.size(d) == len(v)}
        else:
            kept = {d - sum(other < d for other in reduced): v for d, v in labels.items() if d not in reduced}
        tracer.set_labels(result, kept)
    return None


def _is_unbiased(call: OpCall) -> bool:
    """True for a variance or deviation that is divided by less than the number of values."""
    if call.packet not in (aten.var, aten.std, aten.var_mean, aten.std_mean):
        return False
    correction = call.arguments.get("correction", int(call.arguments.get("unbiased", True)))
    return correction is None or correction != 0
