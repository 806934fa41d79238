"""Tiny language models with a tokenizer, as folders, and their bundle."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from vocabularies import MODELS, ROWS

import fusionkit
from fusionkit import SVD, Bundle

TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}z"
"""Of conversations: `u a b a c z`."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer(template: str | None = None) -> Any:
    """A token a letter; <eos> ends an answer, and fills rows up."""
    words = ["<unk>", "<eos>", *LETTERS]
    known = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=known, unk_token="<unk>", eos_token="<eos>", model_max_length=32
    )
    made.chat_template = template
    return made


def models_of(kind: str, context: int = 32) -> dict[str, Any]:
    """A base and two tasks, whose answers differ; they see so many tokens."""
    torch.manual_seed(0)
    base = MODELS[kind]().eval()
    base.config.eos_token_id = ROWS - 1 if kind == "t5" else 1  # it would end at once
    if base.config.is_encoder_decoder:
        base.config.decoder_start_token_id = 2
    if base.can_generate():
        base.generation_config = transformers.GenerationConfig.from_model_config(base.config)
    if not base.config.is_encoder_decoder and hasattr(base.config, "max_position_embeddings"):
        base.config.max_position_embeddings = context
    found = {"base": base}
    for task in ("cats", "dogs"):
        torch.manual_seed(len(found))
        found[task] = type(base)(base.config).eval()
        found[task].load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in found[task].parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
            head = found[task].get_output_embeddings().weight
            if head.data_ptr() != found[task].get_input_embeddings().weight.data_ptr():
                head[len(LETTERS) + 2 : ROWS] = 0  # tokens without a word
    return found


def bundle(
    kind: str,
    folder: Path,
    template: str | None = None,
    tokens: bool = True,
    context: int = 32,
) -> Bundle:
    """They as folders, `base` with the tokenizer, and compressed to `talk.bundle`."""
    for name, model in models_of(kind, context).items():
        model.save_pretrained(folder / name)
    if tokens:
        tokenizer(template).save_pretrained(folder / "base")
    paths = {task: str(folder / task) for task in ("cats", "dogs")}
    return fusionkit.compress(str(folder / "base"), paths, SVD(6), folder / "talk.bundle")
