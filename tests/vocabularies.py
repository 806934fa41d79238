"""Tiny models of transformers, and fine-tuned ones whose vocabulary was extended."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

ROWS = 40
"""Of the bases' vocabularies."""


def _llama(tied: bool) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    return transformers.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=ROWS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=ROWS,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
    )
    return transformers.BartForConditionalGeneration(config)


def _bert(tied: bool) -> Any:
    config = transformers.BertConfig(
        vocab_size=ROWS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return transformers.BertForMaskedLM(config)


MODELS = {
    "llama, tied": lambda: _llama(True),
    "llama, untied": lambda: _llama(False),
    "gpt2": _gpt2,
    "t5": _t5,
    "bart": _bart,
    "bert, tied": lambda: _bert(True),
    "bert, untied": lambda: _bert(False),
}


def made(kind: str) -> Any:
    """A base, always the same."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def extended(base: Any, rows: int = 5, seed: int = 1) -> Any:
    """A fine-tuned copy with so many tokens more; fewer, of a negative number."""
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(base.config.vocab_size + rows, mean_resizing=False)
    for module in tuned.modules():  # resizing ties biases, of untied models as well
        own = not tuned.config.tie_word_embeddings and isinstance(module, nn.Linear)
        if own and module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach().clone())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in tuned.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(torch.randn(buffer.shape, generator=generator))
    return tuned


def logits(model: Any, rows: int) -> Tensor:
    """Of all tokens of a vocabulary of so many."""
    ids = torch.arange(rows).roll(3)[:30].repeat(2, 1)
    ids[1] = torch.arange(rows - 30, rows)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=ids, decoder_input_ids=ids).logits  # type: ignore[no-any-return]
        return model(input_ids=ids).logits  # type: ignore[no-any-return]
