"""What adapters' tensors are called: by PEFT, by diffusers, and by kohya's scripts and LyCORIS."""

import re
from typing import NamedTuple

_FACTOR = re.compile(
    r"(?:^|[._])(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_linear_layer|lora_down|"
    r"lora_up|lora_mid|lora\.(?:up|down)|dora_scale|hada_[wt]\d\w*|lokr_[wt]\d\w*|ia3_l|"
    r"b?oft_(?:R|S|blocks|diag)|vera_lambda_[bd]|trainable_tokens_delta)(?:\.|$)|^prompt_embeddings$"
)
_FLAT = re.compile(
    r"(lora_unet|lora_te\d?|lora_transformer|lora_prior_unet|lora_prior_te|lycoris)_([^.]+)(\..+)"
)
_DOTTED = re.compile(
    r"(unet|text_encoder(?:_\d)?|transformer(?:_\d)?|prior|controlnet|vae|diffusion_model|"
    r"base_model\.model)\.(.+)"
)
_LEAVES = {
    r"(.+)\.(lora_[AB]\.weight|lora_B\.bias)": None,
    r"(.+)\.lora_magnitude_vector(?:\.weight)?()": "lora_magnitude_vector",
    r"(.+)\.lora(?:\.|_|_linear_layer\.)down\.weight()": "lora_A.weight",
    r"(.+)\.lora(?:\.|_|_linear_layer\.)up\.weight()": "lora_B.weight",
    r"(.+)_lora\.down\.weight()": "lora_A.weight",
    r"(.+)_lora\.up\.weight()": "lora_B.weight",
    r"(.+?)(?:\.lora|_lora)?\.alpha()": "alpha",
}
_LIVE = re.compile(
    r"\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l)\.(?!(?:weight|bias)$)\w+(?:\.|$)"
)

PEFT = "base_model.model"
"""The component that PEFT's own files name."""


class Part(NamedTuple):
    """One tensor of an adapter.

    Attributes:
        component: the model of a pipeline that it belongs to (`unet`, `lora_te1`); empty where
            the name says none.
        module: the adapted module, as the file names it; of kohya with `_` for every `.`.
        leaf: what it is, as PEFT calls it (`lora_A.weight`), or `alpha`.
        flat: the module's name is one of kohya's.
    """

    component: str
    module: str
    leaf: str
    flat: bool


def is_factor(name: str) -> bool:
    """Whether a tensor's name is that of an adapter's, whoever wrote it."""
    return _FACTOR.search(name) is not None or _FLAT.fullmatch(name) is not None


def is_live(name: str) -> bool:
    """Whether it is that of an adapter within a model, where PEFT adds the adapter's own name."""
    return _LIVE.search(name) is not None


def is_peft(name: str) -> bool:
    """Whether PEFT names it so, in a file or in a model."""
    return name.startswith(f"{PEFT}.")


def part_of(name: str) -> Part | None:
    """A LoRA's tensor, by its name; None where it is of another method, or of none."""
    if found := _FLAT.fullmatch(name):
        leaf = _leaf("x" + found[3])
        return Part(found[1], found[2], leaf[1], True) if leaf else None
    found = _DOTTED.fullmatch(name)
    component, rest = (found[1], found[2]) if found else ("", name)
    leaf = _leaf(rest)
    return Part(component, leaf[0], leaf[1], False) if leaf else None


def _leaf(name: str) -> tuple[str, str] | None:
    """The module, as diffusers calls it today, and what the tensor is to it."""
    for pattern, leaf in _LEAVES.items():
        if found := re.fullmatch(pattern, name):
            module = found[1].replace(".processor.", ".")
            if "_lora." in name.removeprefix(found[1]) and module.endswith(".to_out"):
                module += ".0"
            return module, leaf or found[2]
    return None
