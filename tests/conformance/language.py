"""Families that read text: decoders, mixtures of experts, encoders, both, and state spaces."""

from conformance.inputs import pairs, tokens
from conformance.row import DECODER, TEXT, Config, ModelFamily

CLASSES: Config = {"num_labels": 5}
EXPERTS: Config = {
    **DECODER,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
SEQ2SEQ: Config = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: Config = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
QKV = ("q_proj", "v_proj", "o_proj")
HALVES = ("query", "value", "output.dense")

DECODERS = [
    ModelFamily("Llama", "decoder", "LlamaForCausalLM", DECODER, tokens, (*QKV, "down_proj")),
    ModelFamily(
        "Llama, tied head",
        "decoder",
        "LlamaForCausalLM",
        {**DECODER, "tie_word_embeddings": True},
        tokens,
        (*QKV, "down_proj"),
    ),
    ModelFamily("Mistral", "decoder", "MistralForCausalLM", DECODER, tokens, QKV),
    ModelFamily("Qwen2", "decoder", "Qwen2ForCausalLM", DECODER, tokens, QKV),
    ModelFamily("Qwen3", "decoder", "Qwen3ForCausalLM", {**DECODER, "head_dim": 8}, tokens, QKV),
    ModelFamily(
        "Gemma 2",
        "decoder",
        "Gemma2ForCausalLM",
        {**DECODER, "head_dim": 8, "tie_word_embeddings": True},
        tokens,
        QKV,
    ),
    ModelFamily(
        "Gemma 3",
        "decoder",
        "Gemma3ForCausalLM",
        {**DECODER, "head_dim": 8, "tie_word_embeddings": True},
        tokens,
        QKV,
    ),
    ModelFamily(
        "GPT-2",
        "decoder",
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | {"bos_token_id": 1, "eos_token_id": 2},
        tokens,
        ("c_attn", "c_fc"),
    ),
    ModelFamily(
        "GPT-NeoX",
        "decoder",
        "GPTNeoXForCausalLM",
        TEXT,
        tokens,
        ("query_key_value", "dense"),
    ),
    ModelFamily("Phi-3", "decoder", "Phi3ForCausalLM", DECODER, tokens, ("qkv_proj", "o_proj")),
    ModelFamily(
        "OPT",
        "decoder",
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
        tokens,
        ("q_proj", "v_proj", "fc1"),
    ),
    ModelFamily(
        "BLOOM",
        "decoder",
        "BloomForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        tokens,
        ("query_key_value",),
    ),
    ModelFamily("Falcon", "decoder", "FalconForCausalLM", TEXT, tokens, ("query_key_value",)),
    ModelFamily("Cohere", "decoder", "CohereForCausalLM", DECODER, tokens, QKV),
]

MIXTURES = [
    ModelFamily(
        "Mixtral",
        "mixture of experts",
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 4},
        tokens,
        QKV,
    ),
    ModelFamily(
        "Qwen2-MoE",
        "mixture of experts",
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "shared_expert_intermediate_size": 24},
        tokens,
        QKV,
    ),
    ModelFamily(
        "Qwen3-MoE",
        "mixture of experts",
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "head_dim": 8},
        tokens,
        QKV,
    ),
    ModelFamily("OLMoE", "mixture of experts", "OlmoeForCausalLM", EXPERTS, tokens, QKV),
    ModelFamily(
        "DeepSeek-V3",
        "mixture of experts",
        "DeepseekV3ForCausalLM",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        tokens,
        ("q_a_proj", "kv_b_proj", "o_proj"),
    ),
    ModelFamily(
        "gpt-oss",
        "mixture of experts",
        "GptOssForCausalLM",
        {**DECODER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        tokens,
        QKV,
    ),
    ModelFamily(
        "Granite-MoE",
        "mixture of experts",
        "GraniteMoeForCausalLM",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        tokens,
        QKV,
    ),
    ModelFamily(
        "Llama 4, text",
        "mixture of experts",
        "Llama4ForCausalLM",
        {
            **DECODER,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        tokens,
        QKV,
    ),
]

ENCODERS = [
    ModelFamily(
        "BERT",
        "encoder",
        "BertForSequenceClassification",
        {**TEXT, **CLASSES},
        tokens,
        HALVES,
    ),
    ModelFamily("BERT, masked LM", "encoder", "BertForMaskedLM", TEXT, tokens, HALVES),
    ModelFamily("RoBERTa", "encoder", "RobertaForMaskedLM", TEXT, tokens, HALVES),
    ModelFamily(
        "DistilBERT",
        "encoder",
        "DistilBertForMaskedLM",
        {"vocab_size": 64, "max_position_embeddings": 64, "dim": 32, "n_layers": 2, "n_heads": 4}
        | {"hidden_dim": 48},
        tokens,
        ("q_lin", "v_lin", "lin1"),
    ),
    ModelFamily(
        "ALBERT",
        "encoder",
        "AlbertForMaskedLM",
        {**TEXT, "embedding_size": 16},
        tokens,
        ("query", "value", "ffn"),
        remark="all layers share one layer's weights",
    ),
    ModelFamily(
        "ELECTRA",
        "encoder",
        "ElectraForSequenceClassification",
        {**TEXT, **CLASSES, "embedding_size": 16},
        tokens,
        HALVES,
    ),
    ModelFamily(
        "DeBERTa-v2",
        "encoder",
        "DebertaV2ForSequenceClassification",
        {
            **TEXT,
            **CLASSES,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
        tokens,
        ("query_proj", "value_proj", "output.dense"),
    ),
    ModelFamily(
        "MPNet",
        "encoder",
        "MPNetForSequenceClassification",
        {**TEXT, **CLASSES},
        tokens,
        ("attn.q", "attn.v", "output.dense"),
    ),
    ModelFamily(
        "ModernBERT",
        "encoder",
        "ModernBertForMaskedLM",
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
        tokens,
        ("Wqkv", "Wo"),
    ),
]

SEQ2SEQS = [
    ModelFamily("T5", "encoder-decoder", "T5ForConditionalGeneration", T5, pairs, ("q", "v", "wo")),
    ModelFamily(
        "mT5",
        "encoder-decoder",
        "MT5ForConditionalGeneration",
        {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        pairs,
        ("q", "v", "wo"),
    ),
    ModelFamily(
        "BART",
        "encoder-decoder",
        "BartForConditionalGeneration",
        SEQ2SEQ,
        pairs,
        ("q_proj", "v_proj", "fc1"),
    ),
    ModelFamily(
        "Marian",
        "encoder-decoder",
        "MarianMTModel",
        {**SEQ2SEQ, "decoder_start_token_id": 0},
        pairs,
        ("q_proj", "v_proj", "fc1"),
        remark="positions that folders don't hold",
    ),
    ModelFamily(
        "Pegasus",
        "encoder-decoder",
        "PegasusForConditionalGeneration",
        SEQ2SEQ,
        pairs,
        ("q_proj", "v_proj", "fc1"),
    ),
]

STATE_SPACES = [
    ModelFamily(
        "Mamba",
        "state space",
        "MambaForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        tokens,
        ("in_proj", "x_proj"),
    ),
    ModelFamily(
        "Mamba-2",
        "state space",
        "Mamba2ForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        tokens,
        ("in_proj",),
    ),
    ModelFamily(
        "FalconMamba",
        "state space",
        "FalconMambaForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        tokens,
        ("in_proj", "x_proj"),
    ),
    ModelFamily(
        "RWKV",
        "state space",
        "RwkvForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
        | {"attention_hidden_size": 32, "intermediate_size": 48},
        tokens,
        ("attention.key", "attention.value"),
    ),
]
