"""Rows a second of the papers' models, of their real sizes, random weights: docs/papers.md.

One process, as many threads as OMP_NUM_THREADS says; float32. Run by hand, from the root:
    OMP_NUM_THREADS=1 python tests/benchmarks/papers.py
"""

import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers as hf
from torch import nn

ROWS, TOKENS = 8, 48
"""Of a batch; GLUE's rows are mostly shorter."""


def roberta() -> nn.Module:
    config = hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return hf.RobertaForSequenceClassification(config)


def gpt2() -> nn.Module:
    return hf.GPT2ForSequenceClassification(hf.GPT2Config(pad_token_id=0))


def flan_t5() -> nn.Module:
    size = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
    config = hf.T5Config(
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        **size,
    )
    return hf.T5ForConditionalGeneration(config)


def clip(**settings: Any) -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**settings))


def convnext() -> nn.Module:
    sizes = {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**sizes))


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "CLIP ViT-B/32": lambda: clip(patch_size=32),
    "CLIP ViT-B/16": lambda: clip(patch_size=16),
    "CLIP ViT-L/14": lambda: clip(patch_size=14, num_hidden_layers=24, **LARGE),
    "ConvNeXt-base": convnext,
    "ResNet-50": lambda: timm.create_model("resnet50"),
}


def rate(call: Callable[[], object]) -> float:
    """Rows a second, of the best of three batches after one."""
    call()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return ROWS / min(times)


@torch.inference_mode()
def main() -> None:
    """A line a model."""
    words = torch.randint(5, 5000, (ROWS, TOKENS))
    images = torch.randn(ROWS, 3, 224, 224)
    for name, made in {"RoBERTa-base": roberta, "GPT-2": gpt2}.items():
        model = made().eval()
        found = rate(lambda model=model: model(input_ids=words))  # type: ignore[misc]
        print(f"{name:14} {found:7.1f} rows of {TOKENS} tokens a second", flush=True)
    t5: Any = flan_t5().eval()
    settings = {"do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3}
    found = rate(lambda: t5.generate(input_ids=words, **settings))
    print(f"{'Flan-T5-base':14} {found:7.1f} rows, 3 tokens answered, a second", flush=True)
    for name, made in IMAGES.items():
        tower = made().eval()
        found = rate(lambda tower=tower: tower(images))  # type: ignore[misc]
        print(f"{name:14} {found:7.1f} images of 224 × 224 a second", flush=True)


if __name__ == "__main__":
    main()
