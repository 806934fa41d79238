"""Tiny language models with a tokenizer, random but for their seed, as folders of transformers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionkit.tasks.language_data import LanguageData

TEXT = "the cat sat on the mat. the dog sat on the log. a cat and a dog ate the hat."
QUESTION = {"prompt": "the cat", "choices": [" sat", " ate"], "answer": 1}
ANSWERED = {"prompt": "the cat", "completion": " sat"}
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def tokenizer(folder: Path, chat: str | None = None, length: int = 48) -> Any:
    """Byte-level BPE that puts `<s>` first."""
    transformers = pytest.importorskip("transformers", reason="pip install .[test]")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    found.model_max_length = length
    found.chat_template = chat
    found.save_pretrained(folder)
    return found


def causal(folder: Path, chat: str | None = None, layers: int = 1, **settings: Any) -> Path:
    """A Llama, and its tokenizer."""
    tokens = tokenizer(folder, chat)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": len(tokens),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 48,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.4,
            **settings,
        }
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path) -> Path:
    """A T5, and its tokenizer."""
    tokens = tokenizer(folder)
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(tokens),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def data(folder: Path, *paths: Path, chat: str | None = None, **settings: Any) -> LanguageData:
    """Tasks called as their files, with a tokenizer beside them."""
    tokenizer(folder / "tokens", chat)
    tasks = {path.name.partition(".")[0]: str(path) for path in paths}
    return LanguageData(tasks, str(folder / "tokens"), **settings)
