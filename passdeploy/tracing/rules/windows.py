"""Rules for pooling, resizing, reflection padding and region sampling: channels keep their labels."""

from __future__ import annotations

from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.tracer import ChannelTracer

_SPATIAL_DIMS = {  # number of spatial dimensions, which are a tensor's last ones
    name: dims
    for dims, names in {
        1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices "
        "reflection_pad1d replication_pad1d upsample_nearest1d upsample_linear1d "
        "_upsample_nearest_exact1d ",
        2: "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d max_pool2d "
        "fractional_max_pool2d reflection_pad2d replication_pad2d upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "adaptive_avg_pool2d mkldnn_max_pool2d grid_sampler_2d ",
        3: "upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d max_pool3d_with_indices "
        "avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d reflection_pad3d replication_pad3d ",
    }.items()
    for name in names.split()
}


@rule(*_SPATIAL_DIMS)
def window_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Keep the labels in front of the spatial dimensions of pooling, resizing, mirrored padding, sampling by a grid."""
    source = call.tensors[0]
    tracer.protect_all(call.tensors[1:], "coordinates at which others are sampled")
    space = source.ndim - _SPATIAL_DIMS[call.name.removeprefix("aten.")]
    for dim, vector in tracer.labels(source).items():
        if dim >= space:
            tracer.protect(vector, "a window slides along these channels")
    for result in call.results:
        tracer.set_labels(result, {d: v for d, v in tracer.labels(source).items() if d < space})


def regions_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Keep the channel labels of a feature map of which regions are resampled (RoI align, RoI pool)."""
    labels = tracer.labels(call["input"])
    tracer.protect_all(call.tensors[1:], "coordinates at which others are sampled")
    for dim, vector in labels.items():
        if dim != 1:
            tracer.protect(vector, "regions are taken along these channels")
    tracer.set_labels(call.results[0], {1: labels[1]} if 1 in labels else {})
