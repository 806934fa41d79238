"""Families that see, hear or draw: of transformers, timm and diffusers."""

from functools import partial

from conformance.inputs import captioned, images, latents, pixels, prompted, spectrogram, waves
from conformance.row import BARE, DECODER, SIZES, TEXT, Config, ModelFamily

IMAGE: Config = {**SIZES, "image_size": 16, "patch_size": 8}
CLASSES: Config = {"num_labels": 5}
STAGES: Config = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2, **CLASSES}
TOWER: Config = {**TEXT, "projection_dim": 24}
SOUND: Config = {
    **SIZES,
    "vocab_size": 20,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
QKV = ("q_proj", "v_proj")

VISION = [
    ModelFamily(
        "ViT",
        "vision",
        "ViTForImageClassification",
        {**IMAGE, **CLASSES},
        pixels,
        ("q_proj", "v_proj", "fc1"),
    ),
    ModelFamily(
        "DeiT",
        "vision",
        "DeiTForImageClassificationWithTeacher",
        {**IMAGE, **CLASSES},
        pixels,
        ("q_proj", "v_proj", "fc1"),
    ),
    ModelFamily(
        "BEiT",
        "vision",
        "BeitForImageClassification",
        {**IMAGE, **CLASSES, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        pixels,
        ("q_proj", "v_proj", "fc1"),
    ),
    ModelFamily(
        "Swin",
        "vision",
        "SwinForImageClassification",
        {**CLASSES, "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1]}
        | {"num_heads": [2, 4], "window_size": 4},
        pixels,
        QKV,
    ),
    ModelFamily(
        "DINOv2",
        "vision",
        "Dinov2ForImageClassification",
        {**IMAGE, **CLASSES, "mlp_ratio": 2},
        pixels,
        ("q_proj", "v_proj", "fc1"),
    ),
    ModelFamily(
        "ConvNeXt",
        "vision",
        "ConvNextForImageClassification",
        STAGES,
        partial(pixels, 32),
        ("pwconv1",),
        refused=BARE,
    ),
    ModelFamily(
        "SegFormer",
        "vision",
        "SegformerForSemanticSegmentation",
        {
            **CLASSES,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        partial(pixels, 32),
        QKV,
    ),
    ModelFamily(
        "ResNet",
        "vision",
        "ResNetForImageClassification",
        {**STAGES, "embedding_size": 8, "layer_type": "basic"},
        partial(pixels, 32),
        ("convolution",),
        remark="with BatchNorm",
    ),
]

DUAL_ENCODERS = [
    ModelFamily(
        "CLIP",
        "dual encoder",
        "CLIPModel",
        {"text_config": TOWER, "vision_config": {**IMAGE, "projection_dim": 24}}
        | {"projection_dim": 24},
        captioned,
        QKV,
        refused=BARE,
    ),
    ModelFamily(
        "SigLIP",
        "dual encoder",
        "SiglipModel",
        {"text_config": TEXT, "vision_config": IMAGE},
        captioned,
        QKV,
        refused=BARE,
    ),
]

VISION_LANGUAGE = [
    ModelFamily(
        "LLaVA",
        "vision-language",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
            "image_token_index": 60,
        },
        partial(prompted, (2, 3, 16, 16)),
        QKV,
    ),
    ModelFamily(
        "Qwen2-VL",
        "vision-language",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **DECODER,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
            | {"patch_size": 4},
            "image_token_id": 60,
            "video_token_id": 61,
            "vision_start_token_id": 62,
        },
        partial(prompted, (32, 96), grid=(1, 4, 4)),
        QKV,
    ),
    ModelFamily(
        "PaliGemma",
        "vision-language",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "gemma", "head_dim": 8},
            "vision_config": {**IMAGE, "model_type": "siglip_vision_model", "projection_dim": 32},
            "image_token_index": 60,
            "projection_dim": 32,
        },
        partial(prompted, (2, 3, 16, 16)),
        QKV,
    ),
    ModelFamily(
        "Idefics 3",
        "vision-language",
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**IMAGE, "image_size": 32},
            "image_token_id": 60,
        },
        partial(prompted, (2, 1, 3, 32, 32)),
        QKV,
    ),
]

SPEECH = [
    ModelFamily(
        "Whisper",
        "speech",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "begin_suppress_tokens": None,
        },
        spectrogram,
        ("q_proj", "v_proj", "fc1"),
    ),
    ModelFamily(
        "Wav2Vec2",
        "speech",
        "Wav2Vec2ForCTC",
        SOUND,
        waves,
        QKV,
        remark="a convolution with weight normalization",
        refused=BARE,
    ),
    ModelFamily(
        "HuBERT",
        "speech",
        "HubertForCTC",
        SOUND,
        waves,
        QKV,
        remark="a convolution with weight normalization",
        refused=BARE,
    ),
]

TIMM = [
    ModelFamily(
        "ViT",
        "timm",
        "vit_tiny_patch16_224",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "num_classes": 5,
        },
        images,
        ("qkv", "fc1"),
        "timm",
        refused=BARE,
    ),
    ModelFamily(
        "Swin",
        "timm",
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
        | {"num_classes": 5},
        images,
        ("qkv", "fc1"),
        "timm",
    ),
    ModelFamily(
        "ConvNeXt",
        "timm",
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 5},
        images,
        ("fc1",),
        "timm",
    ),
    ModelFamily(
        "ResNet",
        "timm",
        "resnet10t",
        {"channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 5},
        images,
        ("layer2.0.conv1", "layer3.0.conv2"),
        "timm",
        remark="with BatchNorm",
    ),
    ModelFamily(
        "MobileNet",
        "timm",
        "mobilenetv3_small_050",
        {"num_classes": 5},
        images,
        ("conv_pw",),
        "timm",
        remark="with BatchNorm, convolutions by channel",
    ),
    ModelFamily(
        "MLP-Mixer",
        "timm",
        "mixer_s16_224",
        {"img_size": 32, "in_chans": 1, "mlp_ratio": (0.03, 0.02), "num_classes": 5},
        partial(images, channels=1),
        ("fc1",),
        "timm",
    ),
]

DIFFUSERS = [
    ModelFamily(
        "U-Net, Stable Diffusion",
        "diffusers",
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        latents,
        ("to_q", "to_v", "to_out.0"),
        "diffusers",
    ),
    ModelFamily(
        "SD3 transformer",
        "diffusers",
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        partial(latents, pooled=True),
        ("to_q", "to_v", "to_out.0"),
        "diffusers",
    ),
    ModelFamily(
        "PixArt transformer",
        "diffusers",
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        partial(latents, name="hidden_states"),
        ("to_q", "to_v", "to_out.0"),
        "diffusers",
        refused=BARE,
    ),
]
