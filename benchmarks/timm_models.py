"""Names of timm networks to cut: one of every module of timm, and more CNNs that pruning libraries often fail on.

    python benchmarks/timm_models.py    # lists the smallest network of each module of the timm installed here

Of each module the network with the fewest parameters whose input is at most 256 pixels wide (or else any width),
without timm's own `test_` networks; as of timm 1.0.31.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SMALLEST = _words(
    """
    beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny
    convmixer_768_32 convnext_zepto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s
    cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mobilenetv2_035 efficientvim_m1
    efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0
    hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2
    inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto
    maxvit_pico_rw_256 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base
    mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small
    nf_regnet_b0 pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
    repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42
    legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224
    vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224
    volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
    """
)

EXTRA = _words(
    """
    cspresnet50 mixnet_s ecaresnet26t eca_nfnet_l0 densenet201 mambaout_femto convformer_s18
    nf_regnet_b0 resnetv2_50x1_bit convnext_atto convnextv2_atto convnext_zepto_rms ghostnet_100
    mobileone_s0 repvgg_a0 efficientnet_b0 mobilenetv2_100 mobilenetv3_large_100 regnety_004
    resnet50 seresnet50 lcnet_050 tinynet_e vit_tiny_patch16_224 maxvit_tiny_tf_224 gernet_s
    """
)


# Networks made for large images that take smaller ones too: pixels, and options of the factory that this needs.
SIZE = {
    "csatv2": 256,
    "deepseek_vit_412m": 112,
    "gemma4_vit_167m": 192,
    "inception_resnet_v2": 160,
    "inception_v4": 160,
    "legacy_xception": 160,
    "naflexvit_base_patch16_parfac_gap": 224,
    "nasnetalarge": 160,
    "pnasnet5large": 160,
    "qwen3_vit_88m": 128,
    "xception41p": 160,
}
OPTIONS = {name: {"img_size": SIZE[name]} for name in ("deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m")}


def smallest_of_each_module() -> dict[str, str]:
    """Find the smallest network of every module of timm, by building all of them on the meta device."""
    import timm
    import torch

    found: dict[str, str] = {}
    for module in timm.list_modules():
        sizes: list[tuple[bool, int, str]] = []
        for name in timm.list_models(module=module):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, pretrained=False)
            except Exception:  # not every network can be built without data
                continue
            if not name.startswith("test_"):
                is_large = max(timm.models.get_pretrained_cfg(name).input_size[1:]) > 256
                sizes.append((is_large, sum(tensor.numel() for tensor in model.parameters()), name))
        if sizes:
            found[module] = min(sizes)[2]
    return found


if __name__ == "__main__":
    for module, name in smallest_of_each_module().items():
        print(f"{module:28} {name}")
