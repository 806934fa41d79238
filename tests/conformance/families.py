"""All families of the sweep."""

from collections.abc import Mapping

from conformance import language, perception
from conformance.row import ModelFamily

FAMILIES: tuple[ModelFamily, ...] = (
    *language.DECODERS,
    *language.MIXTURES,
    *language.ENCODERS,
    *language.SEQ2SEQS,
    *language.STATE_SPACES,
    *perception.VISION,
    *perception.DUAL_ENCODERS,
    *perception.VISION_LANGUAGE,
    *perception.SPEECH,
    *perception.TIMM,
    *perception.DIFFUSERS,
)

_TIED = "the folder lacks the tied head, which the live model has"
_NAMES = "the folder has other names than the live model"
_FUSED = "the folder has experts one by one, the live model fused"
NOT_YET: Mapping[str, str] = {
    "decoder/Llama, tied head": _TIED,
    "decoder/Gemma 2": _TIED,
    "decoder/Gemma 3": _TIED,
    "decoder/GPT-2": _TIED,
    "decoder/GPT-NeoX": _NAMES,
    "decoder/OPT": _TIED,
    "decoder/BLOOM": _TIED,
    "decoder/Falcon": _TIED,
    "mixture of experts/Mixtral": _FUSED,
    "mixture of experts/Qwen2-MoE": _FUSED,
    "mixture of experts/Qwen3-MoE": _FUSED,
    "mixture of experts/OLMoE": _FUSED,
    "mixture of experts/DeepSeek-V3": _FUSED,
    "mixture of experts/Granite-MoE": _NAMES,
    "mixture of experts/gpt-oss": "SVD takes a stack of experts for one matrix",
    "mixture of experts/Llama 4, text": "SVD takes a stack of experts for one matrix",
    "encoder/BERT, masked LM": _TIED,
    "encoder/RoBERTa": _TIED,
    "encoder/DistilBERT": _TIED,
    "encoder/ALBERT": _TIED,
    "encoder/ModernBERT": _TIED,
    "encoder/ELECTRA": "exported as PEFT, `embeddings_project` is taken for an embedding",
    "encoder/DeBERTa-v2": "exported as PEFT, `rel_embeddings` does nothing: its weight is read",
    "encoder/MPNet": "exported as PEFT, `relative_attention_bias` is taken for a linear layer",
    "encoder-decoder/T5": _TIED,
    "encoder-decoder/mT5": _TIED,
    "encoder-decoder/BART": _TIED,
    "encoder-decoder/Marian": _TIED,
    "encoder-decoder/Pegasus": _TIED,
    "state space/Mamba": _TIED,
    "state space/FalconMamba": _TIED,
    "vision/ViT": _NAMES,
    "vision/DeiT": _NAMES,
    "vision/BEiT": _NAMES,
    "vision/Swin": _NAMES,
    "vision/DINOv2": _NAMES,
    "vision/SegFormer": _NAMES,
    "vision-language/LLaVA": _NAMES,
    "vision-language/Qwen2-VL": _NAMES,
    "vision-language/PaliGemma": _NAMES,
    "speech/Whisper": _TIED,
    "timm/MobileNet": "exported as PEFT, a convolution by channel is no LoRA",
    "diffusers/U-Net, Stable Diffusion": "a sharded folder of diffusers is not read",
    "diffusers/SD3 transformer": "a sharded folder of diffusers is not read",
    "diffusers/PixArt transformer": "a sharded folder of diffusers is not read",
}
"""Family → why it does not pass the sweep yet."""
