"""Adapters that are not read, each by its name, and what to do about it."""

import re
from collections.abc import Mapping
from typing import Any

from fusionkit.checkpoints.adapters.settings import check_settings
from fusionkit.errors import CheckpointError, listing

READ = {"LORA": "lora", "LINEARIZED_LORA": "lora", "IA3": "ia3"}
"""PEFT's types that are read → the kind of layout that they have."""

MERGE = "merge it into its base with PEFT (merge_and_unload()) and give the merged model"

_INPUTS = (
    "it is a prompt that goes in beside the inputs, no change of weights, so that there is nothing "
    "of it to keep here: keep its folder beside the base"
)
_ROUTED = (
    "what it adds depends on the inputs and can't be merged into weights, so that there is nothing "
    "of it to keep here: keep its folder beside the base"
)
_TYPES = {
    "ADALORA": ("an AdaLoRA adapter", MERGE),
    "ADAPTION_PROMPT": ("an adaption prompt (LLaMA-Adapter)", _INPUTS),
    "BOFT": ("a BOFT adapter", MERGE),
    "CARTRIDGE": ("a cartridge", _INPUTS),
    "CPT": ("a context-aware prompt", _INPUTS),
    "LOHA": ("a LoHa adapter", MERGE),
    "LOKR": ("a LoKr adapter", MERGE),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", _INPUTS),
    "OFT": ("an OFT adapter", MERGE),
    "POLY": ("a Polytropon adapter", _ROUTED),
    "PREFIX_TUNING": ("prefix tuning", _INPUTS),
    "PROMPT_TUNING": ("prompt tuning", _INPUTS),
    "P_TUNING": ("p-tuning", _INPUTS),
    "SHADOW": ("a Shadow adapter", _ROUTED),
    "TRAINABLE_TOKENS": ("trained rows of an embedding", MERGE),
    "VERA": ("a VeRA adapter", MERGE),
    "XLORA": ("an X-LoRA", _ROUTED),
}

# Settings that change nothing in how saved tensors are read, whatever their value; the configs of
# starts are of no effect but by `init_lora_weights`.
_NEUTRAL = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_dora",
    "use_rslora",
}
_SETTINGS = {
    "alora_invocation_tokens": f"aLoRA acts only after its invocation tokens: {_ROUTED}",
    "arrow_config": f"Arrow routes among LoRAs: {_ROUTED}",
    "layer_replication": (
        "its model has the base's layers several times, so that it is no fine-tune of this base, "
        "and has no delta to keep here: keep its folder beside the base"
    ),
    "use_qalora": (
        "QA-LoRA pools its inputs, and PEFT itself can't merge it: keep its folder beside the base"
    ),
}
_CHANGED = {
    "pissa_niter": "PiSSA by a random decomposition",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
    "mica": "MiCA",
}
"""Starts that change the base itself, by what can't be made again: the factors belong to it."""

_METHODS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid\.": "LoCon with a middle factor (CP decomposition)",
    r"\.dora_scale$": "DoRA as LyCORIS has it",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.(oft_|boft_)": "OFT",
    r"\.on_input$|\.ia3_l$": "(IA)³",
    r"\.diff(_b)?$|\.[wb]_norm$": "whole differences",
    r"\.vera_lambda_": "VeRA",
    r"trainable_tokens": "trained rows of an embedding",
    r"^bundle_emb|^emb_params": "trained embeddings",
    r"prompt_embeddings": "a prompt",
}


def refuse_config(config: Mapping[str, Any], label: str) -> None:
    """Refuse an adapter of a type, or with settings, that are not read.

    Args:
        config: PEFT's config.
        label: how messages call the adapter.

    Raises:
        CheckpointError: it is of such a type, or has such a setting, or one of another type.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READ:
        kind = str(kind)[:99]
        name, mend = _TYPES.get(kind, (f"an adapter of type {kind}", MERGE))
        raise CheckpointError(
            f"{label}: is {name} (PEFT's type {kind}), which is not read here (read: "
            f"{', '.join(READ)}); {mend}"
        )
    check_settings(config, label)
    for key, why in _SETTINGS.items():
        if config.get(key):
            said = str(config[key])[:99]
            raise CheckpointError(f"{label}: uses {key}: {said}, not read here; {why}")
    start = str(config.get("init_lora_weights", "")).lower()
    changed = next((name for key, name in _CHANGED.items() if start.startswith(key)), None)
    if changed:
        raise CheckpointError(
            f"{label}: its factors belong to a base that its start changed (init_lora_weights: "
            f"{start}, {changed}), and that can't be made again here; where its initial adapter "
            "was saved, save it once more with PEFT's save_pretrained(…, "
            "path_initial_model_for_weight_conversion=INITIAL), which makes a plain LoRA of it; "
            "else merge_and_unload() it over the base that it was trained on, and give the merged "
            "model"
        )
    used = [
        f"{key}: {value}"[:199] for key, value in config.items() if value and key not in _NEUTRAL
    ]
    if used:
        raise CheckpointError(f"{label}: uses what is not known here:{listing(used)}\n{MERGE}")


def method_of(name: str) -> str:
    """What an adapter is, by the name of one of its tensors."""
    found = (kind for pattern, kind in _METHODS.items() if re.search(pattern, name))
    return next(found, "LoRA")
