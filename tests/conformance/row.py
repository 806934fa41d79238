"""A row of the sweep's table: one model family, built tiny from its config, nothing downloaded.

Where FusionKit can't do a part of the crossing for a family, its row says in `refused` with which
message it declines; the sweep checks that it does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Library = Literal["transformers", "timm", "diffusers"]
Config = Mapping[str, Any]
Inputs = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class ModelFamily:
    """One row: how a tiny model is built and called, and what is adapted in it.

    Attributes:
        name: as its authors write it.
        kind: the table's heading that it stands under.
        built: the class of transformers or diffusers, or the name of timm's model.
        config: what makes it tiny: the config's arguments, or those of timm's `create_model`.
        inputs: makes the arguments of one call.
        lora: ends of the names of the modules that a LoRA adapts.
        library: where the class is from.
        refused: crossing, as a pattern (`* → peft`) → what the message of the refusal holds.
        remark: what a reader of the table should know.
    """

    name: str
    kind: str
    built: str
    config: Config
    inputs: Inputs
    lora: tuple[str, ...]
    library: Library = "transformers"
    refused: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""

    def __str__(self) -> str:
        """What tells it from all others."""
        return f"{self.kind}/{self.name}"


BARE = {"* × live → * → peft": "has no place for tensors outside a module of their own"}
"""What is `refused` where parameters stand beside modules (`cls_token`, `A_log`): what PEFT saves
whole are modules, so that a full fine-tune is no adapter."""


SIZES: Config = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT: Config = {
    **SIZES,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER: Config = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}
