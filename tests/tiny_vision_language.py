"""Tiny vision-language models with their processors, random but for their seed, as folders."""

from pathlib import Path
from typing import Any

import torch
from tiny_language import tokenizer

SIZE = 16
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}


def llava(folder: Path) -> Path:
    """A LLaVA of CLIP and Llama, whose processor has a chat template."""
    tokens = _tokens(folder, "<image>")
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)
    settings: Any = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    processor = LlavaProcessor(
        images, tokens, **settings, num_additional_image_tokens=1, chat_template=CHAT
    )
    processor.save_pretrained(folder)
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokens)},
        vision_config={**IMAGE, "model_type": "clip_vision_model"},
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def idefics3(folder: Path) -> Path:
    """An Idefics 3, SmolVLM's class but for the name, whose processor cuts images into parts."""
    tokens = _tokens(
        folder, "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"
    )
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    images = Idefics3ImageProcessor(
        size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE}
    )
    Idefics3Processor(images, tokens, image_seq_len=1).save_pretrained(folder)
    config = Idefics3Config(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokens) + 64},
        vision_config=IMAGE,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def _tokens(folder: Path, *special: str) -> Any:
    made = tokenizer(folder, length=256)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.save_pretrained(folder)
    return made
