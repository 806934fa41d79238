"""Tiny stand-ins of the papers' text models, laid out as their repositories are."""

from pathlib import Path
from typing import Any

import tiny_language
import tiny_vision_language
import torch
from hub_cache import cached
from safetensors.torch import load_file, save_file

TEXT = tiny_language.TEXT + " Is it good? Answere with 'yes' or 'no'. Given the context, premise?"
SKILLS = ("instruction", "math", "coding", "multilingual", "safety")
"""MergeBench's."""


def changed(model: Any, seed: int, share: float = 0.3) -> Any:
    """A model fine-tuned, as far as its weights go: each moved by a share of its size."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=draw)
            value.add_(share * value.std(correction=0).clamp(min=0.01) * noise)
    return model


def bpe(kind: str, **special: Any) -> Any:
    """A byte-level tokenizer of one of transformers' classes, as they build it of its files."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    tokens = [token for token in special.values() if isinstance(token, str)]
    made.train_from_iterator([TEXT], vocab_size=300, special_tokens=tokens)
    found = getattr(transformers, kind)(tokenizer_object=made._tokenizer, **special)
    found.model_max_length = 512
    return found


def roberta(cache: Path) -> None:
    """`FacebookAI/roberta-base`, and the folders of `vanillaOVO/roberta_base_glue_ckpts`.

    These are what transformers' Trainer wrote in its time: pickles, and one of its arguments.
    """
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    tokens = bpe(
        "RobertaTokenizerFast",
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=len(tokens),
        intermediate_size=32,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=2,
        **size,
    )
    base = cached(cache, "FacebookAI/roberta-base")
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(base)
    tokens.save_pretrained(base)
    repository = cached(cache, "vanillaOVO/roberta_base_glue_ckpts")
    outputs = {"mnli": 3, "stsb": 1}
    for seed, task in enumerate(("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")):
        rate = "5e-05" if task == "mrpc" else "1e-05"
        folder = repository / task / f"roberta-base_lr{rate}"
        model = RobertaForSequenceClassification.from_pretrained(
            base, num_labels=outputs.get(task, 2)
        )
        changed(model, seed).config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        tokens.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        torch.save({"learning_rate": float(rate)}, folder / "training_args.bin")


def gpt2(cache: Path) -> None:
    """`openai-community/gpt2`, whose tensors have no prefix, and `tanganke/gpt2_TASK`."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    end = "<|endoftext|>"
    tokens = bpe("GPT2TokenizerFast", bos_token=end, eos_token=end, unk_token=end)
    config = GPT2Config(
        vocab_size=len(tokens),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=512,
        initializer_range=0.4,
        bos_token_id=tokens.eos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    base = cached(cache, "openai-community/gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(base)
    tokens.save_pretrained(base)
    state = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in state.items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    for seed, task in enumerate(("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte")):
        own = GPT2ForSequenceClassification.from_pretrained(
            base, num_labels=3 if task == "mnli" else 2, pad_token_id=tokens.eos_token_id
        )
        changed(own, seed).save_pretrained(cached(cache, f"tanganke/gpt2_{task}"))


def t5(folder: Path) -> Path:
    """A T5 of the later kind, its tokenizer Unigram's, as Flan-T5 and T0 are."""
    from tokenizers import SentencePieceUnigramTokenizer
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5TokenizerFast

    made = SentencePieceUnigramTokenizer()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator([TEXT], vocab_size=80, special_tokens=special, unk_token="<unk>")
    tokens = T5TokenizerFast(tokenizer_object=made._tokenizer, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokens),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def flan_t5(cache: Path, lora: bool = False) -> None:
    """`google/flan-t5-base`, and `tanganke/flan-t5-base_glue-TASK` in shards, or its LoRAs."""
    from transformers import AutoModelForSeq2SeqLM

    base = t5(cached(cache, "google/flan-t5-base"))
    for seed, task in enumerate(("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")):
        name = f"tanganke/flan-t5-base_glue-{task}"
        own = AutoModelForSeq2SeqLM.from_pretrained(base)
        if lora:
            adapted(own, base, cached(cache, f"{name}_lora-16"), seed)
        else:
            folder = cached(cache, name)
            changed(own, seed).save_pretrained(folder, max_shard_size="8KB")
            assert (folder / "model.safetensors.index.json").exists()


def adapted(model: Any, base: Path, folder: Path, seed: int) -> None:
    """A LoRA of rank 16 on queries and values, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    own = LoraConfig(task_type="SEQ_2_SEQ_LM", r=16, lora_alpha=32, target_modules=["q", "v"])
    made: Any = get_peft_model(model, own)
    made.peft_config["default"].base_model_name_or_path = "google/flan-t5-base"
    torch.manual_seed(seed)
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.05)
    made.save_pretrained(folder)


def t0(cache: Path, own: Path) -> None:
    """`bigscience/T0_3B`, and (IA)³ vectors as TIES-Merging's code saves them.

    Args:
        cache: the cache's folder.
        own: folder of the vectors' files.
    """
    from transformers import AutoModelForSeq2SeqLM

    base = AutoModelForSeq2SeqLM.from_pretrained(t5(cached(cache, "bigscience/T0_3B")))
    sizes = {
        name: module.out_features
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in ("k", "v", "wi_1")
    }
    own.mkdir(parents=True)
    for seed, task in enumerate(("rte", "cb", "wic", "wsc", "anli-r1", "anli-r2", "anli-r3")):
        torch.manual_seed(seed)
        vectors = {f"{n}.ia3_vector": 1 + 0.3 * torch.randn(size) for n, size in sizes.items()}
        torch.save(vectors, own / f"{task}.pt")


def llama(cache: Path) -> None:
    """`meta-llama/Llama-3.2-3B` and MergeBench's five, in shards; some have rows added."""
    from transformers import AutoModelForCausalLM

    base = cached(cache, "meta-llama/Llama-3.2-3B")
    tiny_language.causal(base, layers=2, tie_word_embeddings=True, max_position_embeddings=256)
    for seed, skill in enumerate(SKILLS):
        own = AutoModelForCausalLM.from_pretrained(base)
        if skill in ("math", "safety"):
            own.resize_token_embeddings(own.config.vocab_size + 8)
        folder = cached(cache, f"MergeBench/Llama-3.2-3B_{skill}")
        changed(own, seed).save_pretrained(folder, max_shard_size="16KB")
        assert (folder / "model.safetensors.index.json").exists()


def smolvlm(cache: Path, own: Path) -> None:
    """`HuggingFaceTB/SmolVLM-256M-Instruct`, and two fine-tunes of one's own.

    Args:
        cache: the cache's folder.
        own: folder of the fine-tunes.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = tiny_vision_language.idefics3(cached(cache, "HuggingFaceTB/SmolVLM-256M-Instruct"))
    processor: Any = AutoProcessor.from_pretrained(base)
    processor.chat_template = tiny_vision_language.CHAT
    processor.save_pretrained(base)
    for seed, task in enumerate(("charts", "documents")):
        changed(AutoModelForImageTextToText.from_pretrained(base), seed).save_pretrained(own / task)
