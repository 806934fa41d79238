"""Whether a fine-tune's configuration makes another function of the same weights."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fusionkit.checkpoints.architecture import Architecture

_NEUTRAL = re.compile(
    r"(^|\.)(_.*|name_or_path|architectures|transformers_version|torch_dtype|dtype|use_cache|"
    r"vocab_size|.*num_labels|id2label|label2id|problem_type|.*token_id|.*_token|bos|eos|pad|"
    r"tie_word_embeddings|.*dropout.*|.*_dropout|.*drop_rate|drop_path.*|initializer_.*|"
    r"gradient_checkpointing|output_.*|return_dict|is_decoder|add_cross_attention|chunk_size_.*|"
    r"task_specific_params|finetuning_task|tokenizer_class|.*attn_implementation|auto_map|"
    r"quantization_config|pruned_heads|use_return_dict|model_type|max_length|"
    r"router_aux_loss_coef|mask_(time|feature)_.*|apply_spec_augment|layerdrop|.*layerdrop)(\.|$)"
)
"""Keys of transformers' configurations that say how a model is trained, called or headed; what it
computes of its body's weights is the same."""


def differing(one: Architecture | None, other: Architecture | None) -> list[str]:
    """Settings in which two models of transformers differ, and which change what they compute.

    Args:
        one: a model's; None: nothing is known.
        other: another's.

    Returns:
        each as `key: value, not value`, the other's value first.
    """
    first, second = (_settings(each) for each in (one, other))
    if first is None or second is None or first.get("model_type") != second.get("model_type"):
        return []
    ours, theirs = dict(_flat(first)), dict(_flat(second))
    return [
        f"{key}: {theirs[key]!r}, not {value!r}"
        for key, value in ours.items()
        if key in theirs and not _alike(theirs[key], value) and not _NEUTRAL.search(key)
    ]


def _alike(one: object, other: object) -> bool:
    """Whether two values are one, but for what GGUF's float32 rounds off a number."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _settings(known: Architecture | None) -> Mapping[str, Any] | None:
    config: Any = getattr(known.skeleton, "config", None) if known else None
    return config.to_dict() if config is not None else None


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
