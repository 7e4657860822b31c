"""The networks of `benchmarks.torch_trt` beside torchvision's classifiers, and how they are slimmed."""

from __future__ import annotations

from torch import Tensor, nn

from passdeploy import Plan, count, find_groups, slim


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Of as many modules of timm, the smallest network each.
TIMM = _words(
    """
    coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms crossvit_tiny_240 cs3darknet_focus_s
    deit_tiny_patch16_224 dla46x_c edgenext_xx_small efficientformer_l1 efficientvit_b0
    efficientvit_m0 fasternet_t0 fastvit_t8 ghostnet_050 hgnetv2_b0 inception_next_atto levit_128s
    mambaout_femto maxvit_pico_rw_256 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050
    mobilevit_xxs nest_tiny pit_ti_224 pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m1 resnest14d
    resnet10t rexnet_100 swinv2_cr_tiny_224 twins_svt_small vit_tiny_patch16_224
    xcit_nano_12_p8_224 volo_d1_224 cait_xxs24_224 mvitv2_tiny
    """
)

SLIM = frozenset(
    f"torchvision/{name}"
    for name in _words(
        """
        mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5
        shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1 resnet18 resnet34 resnet50 regnet_y_400mf
        regnet_x_400mf efficientnet_b0 densenet121 googlenet convnext_tiny swin_t vit_b_16
        """
    )
)

BUILT = frozenset(
    f"torchvision/{name}"
    for name in _words(
        """
        mobilenet_v2 mobilenet_v3_large shufflenet_v2_x1_0 squeezenet1_0 resnet18 resnet50 regnet_y_400mf
        efficientnet_b0 densenet121 googlenet convnext_tiny swin_t vit_b_16
        """
    )
)


def slim_half(network: nn.Module, images: Tensor) -> tuple[nn.Module, float]:
    """Cut the same share of every channel group until at most about half of the multiply-adds are left.

    Returns:
        The slim network, and its share of the multiply-adds.
    """
    groups = [group for group in find_groups(network, images) if group.is_prunable]
    dense = count(network, images).macs
    for kept_share in (0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4):
        kept = {group.name: tuple(range(max(1, round(group.width * kept_share)))) for group in groups}
        smaller = slim(network, groups, Plan(kept=kept)).eval()
        share = count(smaller, images).macs / dense
        if share <= 0.53:
            break
    return smaller, round(share, 3)
