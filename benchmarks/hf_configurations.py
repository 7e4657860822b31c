"""Small configurations of Hugging Face vision models, by class: what `guest_networks.py` builds.

An option that is a pair (name of a configuration class, its options) becomes a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_IMAGE = (1, 3, 64, 64)


@dataclass(frozen=True)
class HfNetwork:
    """A model of transformers: the options of its configuration, the shape of its input, and the outputs that count."""

    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = _IMAGE
    outputs: tuple[str, ...] = ("logits",)


_WIDTHS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VIT = {**_WIDTHS, "intermediate_size": 80, "image_size": 64, "patch_size": 16}
_DINO = {**_WIDTHS, "mlp_ratio": 2, "image_size": 64, "patch_size": 16}
_SWIN = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 4, 4]}
_FOUR = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
_RESNET = {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]}
_LEVELS = ["stage2", "stage3", "stage4"]
_BACKBONE = ("ResNetConfig", {**_RESNET, "layer_type": "basic", "out_features": ["stage4"]})
_THREE_LEVELS = ("ResNetConfig", {**_RESNET, "layer_type": "basic", "out_features": _LEVELS})
_RT_BACKBONE = ("RTDetrResNetConfig", {**_RESNET, "out_features": _LEVELS})
_HGNET = {
    "embedding_size": 16,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [32, 48, 64, 96],
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 32, 48, 64],
    "stage_mid_channels": [12, 16, 24, 32],
    "stage_out_channels": [32, 48, 64, 96],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [3, 3, 3, 3],
}
_DETR = {
    "d_model": 48,
    "num_queries": 10,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "backbone_config": _BACKBONE,
}
_RT_DETR = {
    "encoder_hidden_dim": 48,
    "d_model": 48,
    "num_queries": 10,
    "decoder_layers": 2,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_denoising": 0,
    "encoder_in_channels": [48, 64, 96],
    "decoder_in_channels": [48, 48, 48],
}
_BOXES = ("logits", "pred_boxes")
_MASKS = ("class_queries_logits", "masks_queries_logits")
_DPT = {
    **_VIT,
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [16, 24, 32, 48],
    "fusion_hidden_size": 32,
}
_SWIN_LEVELS = ("SwinConfig", {**_SWIN, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4], "out_indices": [1, 2, 3, 4]})
_MASK_SWIN = (
    "SwinConfig",
    {
        **_SWIN,
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 4, 4],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
)
_DEPTH_BACKBONE = (
    "Dinov2Config",
    {**_DINO, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
)
_DEPTH = {
    "backbone_config": _DEPTH_BACKBONE,
    "patch_size": 16,
    "reassemble_hidden_size": 48,
    "neck_hidden_sizes": [16, 24, 32, 48],
    "fusion_hidden_size": 32,
}
_PERCEIVER = {
    "num_latents": 8,
    "d_latents": 48,
    "num_blocks": 1,
    "num_self_attends_per_block": 2,
    "image_size": 32,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "d_model": 48,
}
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_VIDEO = {**_VIT, "num_frames": 4, "image_size": 32}

HF_NETWORKS: dict[str, HfNetwork] = {
    # Image classification
    "BeitForImageClassification": HfNetwork({**_VIT, "use_relative_position_bias": True}),
    "BitForImageClassification": HfNetwork({**_RESNET, "num_groups": 8}),
    "CLIPForImageClassification": HfNetwork({"vision_config": {**_VIT}, "text_config": {**_TEXT}}),
    "ConvNextForImageClassification": HfNetwork(_FOUR),
    "ConvNextV2ForImageClassification": HfNetwork(_FOUR),
    "CvtForImageClassification": HfNetwork({"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}),
    "Data2VecVisionForImageClassification": HfNetwork({**_VIT, "use_relative_position_bias": True}),
    "DeiTForImageClassification": HfNetwork(_VIT),
    "DeiTForImageClassificationWithTeacher": HfNetwork(_VIT),
    "Dinov2ForImageClassification": HfNetwork(_DINO),
    "Dinov2WithRegistersForImageClassification": HfNetwork(_DINO),
    "DonutSwinForImageClassification": HfNetwork(_SWIN),
    "EfficientNetForImageClassification": HfNetwork(
        {
            "width_coefficient": 0.5,
            "depth_coefficient": 0.5,
            "image_size": 64,
            "hidden_dim": 640,
            "num_hidden_layers": 16,
        }
    ),
    "FocalNetForImageClassification": HfNetwork(
        {"image_size": 64, "embed_dim": 24, "depths": [1, 1, 1, 1], "hidden_sizes": [24, 48, 48, 48]}
    ),
    "HGNetV2ForImageClassification": HfNetwork(_HGNET),
    "HieraForImageClassification": HfNetwork(
        {"embed_dim": 24, "image_size": [224, 224], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}, (1, 3, 224, 224)
    ),
    "IJepaForImageClassification": HfNetwork(_VIT),
    "LevitForImageClassification": HfNetwork(
        {
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "image_size": 64,
            "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
        }
    ),
    "LevitForImageClassificationWithTeacher": HfNetwork({"image_size": 224}, (1, 3, 224, 224)),  # as published
    "MetaClip2ForImageClassification": HfNetwork({"vision_config": {**_VIT}, "text_config": {**_TEXT}}),
    "MobileNetV1ForImageClassification": HfNetwork({"depth_multiplier": 0.25}),
    "MobileNetV2ForImageClassification": HfNetwork({"depth_multiplier": 0.35}),
    "MobileViTForImageClassification": HfNetwork(
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
            "output_stride": 16,
        }
    ),
    "MobileViTV2ForImageClassification": HfNetwork(
        {"image_size": 64, "base_attn_unit_dims": [32, 48, 64], "n_attn_blocks": [1, 1, 1], "width_multiplier": 0.25}
    ),
    "PerceiverForImageClassificationConvProcessing": HfNetwork(_PERCEIVER),
    "PerceiverForImageClassificationFourier": HfNetwork({**_PERCEIVER}, (1, 3, 224, 224)),
    "PerceiverForImageClassificationLearned": HfNetwork({**_PERCEIVER}, (1, 3, 32, 32)),
    "PoolFormerForImageClassification": HfNetwork(_FOUR),
    "PPLCNetForImageClassification": HfNetwork({"scale": 0.5}, outputs=("last_hidden_state",)),
    "PvtForImageClassification": HfNetwork({**_PYRAMID, "image_size": 64}),
    "PvtV2ForImageClassification": HfNetwork({**_PYRAMID, "image_size": 64}),
    "RegNetForImageClassification": HfNetwork(
        {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 2, 1], "groups_width": 16}
    ),
    "ResNetForImageClassification": HfNetwork(_RESNET),
    "SegformerForImageClassification": HfNetwork(_PYRAMID),
    "SiglipForImageClassification": HfNetwork({"vision_config": {**_VIT}, "text_config": {**_TEXT}}),
    "SwiftFormerForImageClassification": HfNetwork({"depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]}),
    "SwinForImageClassification": HfNetwork(_SWIN),
    "Swinv2ForImageClassification": HfNetwork(_SWIN),
    "TextNetForImageClassification": HfNetwork({"hidden_sizes": [16, 16, 32, 48, 64], "stem_out_channels": 16}),
    "ViTForImageClassification": HfNetwork(_VIT),
    "ViTMSNForImageClassification": HfNetwork(_VIT),
    # Segmentation
    "BeitForSemanticSegmentation": HfNetwork(
        {**_VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 16}
    ),
    "Data2VecVisionForSemanticSegmentation": HfNetwork(
        {**_VIT, "num_hidden_layers": 4, "out_indices": [0, 1, 2, 3], "auxiliary_channels": 16}
    ),
    "DPTForSemanticSegmentation": HfNetwork(_DPT),
    "EomtForUniversalSegmentation": HfNetwork({**_DINO, "num_blocks": 1, "num_queries": 8}, outputs=_MASKS),
    "Mask2FormerForUniversalSegmentation": HfNetwork(
        {
            "backbone_config": _MASK_SWIN,
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 48,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_attention_heads": 4,
            "dim_feedforward": 48,
            "num_queries": 10,
        },
        outputs=_MASKS,
    ),
    "MaskFormerForInstanceSegmentation": HfNetwork(
        {
            "backbone_config": _MASK_SWIN,
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "decoder_config": ("DetrConfig", {**_DETR, "d_model": 32}),
        },
        outputs=_MASKS,
    ),
    "MobileNetV2ForSemanticSegmentation": HfNetwork({"depth_multiplier": 0.35, "output_stride": 16}),
    "MobileViTForSemanticSegmentation": HfNetwork(
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
            "output_stride": 16,
            "aspp_out_channels": 32,
        }
    ),
    "MobileViTV2ForSemanticSegmentation": HfNetwork(
        {
            "image_size": 64,
            "base_attn_unit_dims": [32, 48, 64],
            "n_attn_blocks": [1, 1, 1],
            "width_multiplier": 0.25,
            "aspp_out_channels": 32,
            "output_stride": 16,
        }
    ),
    "SegformerForSemanticSegmentation": HfNetwork({**_PYRAMID, "decoder_hidden_size": 48}),
    "UperNetForSemanticSegmentation": HfNetwork(
        {
            "backbone_config": (
                "ConvNextConfig",
                {**_FOUR, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            ),
            "hidden_size": 32,
            "auxiliary_channels": 16,
            "auxiliary_in_channels": 48,
        }
    ),
    # Detection
    "ConditionalDetrForObjectDetection": HfNetwork(_DETR, outputs=_BOXES),
    "DabDetrForObjectDetection": HfNetwork({**_DETR, "hidden_size": 48}, outputs=_BOXES),
    "DeformableDetrForObjectDetection": HfNetwork(
        {**_DETR, "d_model": 64, "backbone_config": _THREE_LEVELS, "num_feature_levels": 4}, outputs=_BOXES
    ),
    "DetrForObjectDetection": HfNetwork(_DETR, outputs=_BOXES),
    "DetrForSegmentation": HfNetwork(
        {
            **_DETR,
            "d_model": 64,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "backbone_config": ("ResNetConfig", {**_RESNET, "out_features": ["stage1", *_LEVELS]}),
        },
        outputs=("logits", "pred_boxes", "pred_masks"),
    ),
    "DFineForObjectDetection": HfNetwork(
        {**_RT_DETR, "backbone_config": ("HGNetV2Config", {**_HGNET, "out_features": _LEVELS})}, outputs=_BOXES
    ),
    "Deimv2ForObjectDetection": HfNetwork(
        {**_RT_DETR, "backbone_config": ("HGNetV2Config", {**_HGNET, "out_features": _LEVELS})}, outputs=_BOXES
    ),
    "LwDetrForObjectDetection": HfNetwork(
        {
            "backbone_config": (
                "LwDetrViTConfig",
                {**_WIDTHS, "num_hidden_layers": 4, "image_size": 64, "pretrain_image_size": 64, "out_indices": [2, 4]}
                | {"window_block_indices": [0, 2], "num_windows": 4},
            ),
            "projector_scale_factors": [1.0],
            "d_model": 48,
            "decoder_ffn_dim": 80,
            "num_queries": 10,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
            "decoder_layers": 2,
            "group_detr": 1,
        },
        outputs=_BOXES,
    ),
    "RfDetrForObjectDetection": HfNetwork(
        {
            "backbone_config": (
                "RfDetrDinov2Config",
                {**_DINO, "num_hidden_layers": 4, "out_indices": [2, 4], "num_windows": 2},
            ),
            "d_model": 48,
            "decoder_ffn_dim": 80,
            "num_queries": 10,
            "decoder_layers": 2,
            "group_detr": 1,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
        },
        outputs=_BOXES,
    ),
    "RTDetrForObjectDetection": HfNetwork({**_RT_DETR, "backbone_config": _RT_BACKBONE}, outputs=_BOXES),
    "RTDetrV2ForObjectDetection": HfNetwork({**_RT_DETR, "backbone_config": _RT_BACKBONE}, outputs=_BOXES),
    "TableTransformerForObjectDetection": HfNetwork(_DETR, outputs=_BOXES),
    "YolosForObjectDetection": HfNetwork({**_VIT, "image_size": [64, 64], "num_detection_tokens": 8}, outputs=_BOXES),
    # Depth, pose, matting, super-resolution, key points, video
    "DepthAnythingForDepthEstimation": HfNetwork(_DEPTH, outputs=("predicted_depth",)),
    "DPTForDepthEstimation": HfNetwork(_DPT, outputs=("predicted_depth",)),
    "GLPNForDepthEstimation": HfNetwork({**_PYRAMID, "decoder_hidden_size": 32}, outputs=("predicted_depth",)),
    "ZoeDepthForDepthEstimation": HfNetwork(
        {
            "backbone_config": (
                "BeitConfig",
                {**_VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
                | {"use_relative_position_bias": True},
            ),
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 32,
            "bottleneck_features": 32,
            "bin_embedding_dim": 16,
            "num_attractors": [4, 2, 2, 1],
        },
        outputs=("predicted_depth",),
    ),
    "VitPoseForPoseEstimation": HfNetwork(
        {"backbone_config": ("VitPoseBackboneConfig", {**_WIDTHS, "image_size": [64, 64], "patch_size": [16, 16]})},
        outputs=("heatmaps",),
    ),
    "VitMatteForImageMatting": HfNetwork(
        {
            "backbone_config": ("VitDetConfig", {**_WIDTHS, "num_channels": 4, "image_size": 64, "patch_size": 16}),
            "hidden_size": 48,
            "convstream_hidden_sizes": [8, 16, 24],
            "fusion_hidden_sizes": [32, 24, 16, 8],
        },
        (1, 4, 64, 64),
        outputs=("alphas",),
    ),
    "Swin2SRForImageSuperResolution": HfNetwork(
        {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        (1, 3, 32, 32),
        outputs=("reconstruction",),
    ),
    "SuperPointForKeypointDetection": HfNetwork(
        {"encoder_hidden_sizes": [16, 16, 24, 32], "decoder_hidden_size": 32, "descriptor_decoder_dim": 32},
        outputs=("keypoints", "scores", "descriptors"),
    ),
    "TimesformerForVideoClassification": HfNetwork(_VIDEO, (1, 4, 3, 32, 32)),
    "VideoMAEForVideoClassification": HfNetwork(_VIDEO, (1, 4, 3, 32, 32)),
    "VivitForVideoClassification": HfNetwork({**_VIDEO, "tubelet_size": [2, 16, 16]}, (1, 4, 3, 32, 32)),
}
