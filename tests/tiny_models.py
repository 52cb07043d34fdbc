"""Tiny random models of many architectures, built from configs alone: no download, a few milliseconds each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCAB = 97
HIDDEN = 32
LAYERS = 3
HEADS = 4
IMAGE_TOKEN = 96
"""The placeholder id of the vision-language model; never used as a text token."""


def _more(**options: Any) -> dict[str, Any]:
    """Options that configs take through their keyword arguments, which a type checker does not see."""
    return options


_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    **_IDS,
}
_BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **_IDS,
}
_VIT_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 4,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _build(model_class: type[PreTrainedModel], config: tf.PretrainedConfig) -> PreTrainedModel:
    """A seeded float32 model in evaluation mode; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # from_config (not the constructor) applies dtype and attention implementation as from_pretrained would.
        model = model_class._from_config(config, dtype=torch.float32)
        # The usual small initialisation makes attention uniform, biases zero and norms one, so that a wrong column, a
        # swapped query and key or a forgotten term would hardly show.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name.lower() or "ln_" in name else 0.0, 0.1)
            else:
                torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model.eval()


def _falcon(**kwargs: Any) -> PreTrainedModel:
    config = tf.FalconConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        ffn_hidden_size=48, max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0, **_IDS, **kwargs,
    )  # fmt: skip
    return _build(tf.FalconForCausalLM, config)


def _llama() -> PreTrainedModel:
    return _build(tf.LlamaForCausalLM, tf.LlamaConfig(**_LLAMA_LIKE))


def _qwen3() -> PreTrainedModel:
    # A head_dim that is not hidden / heads, as in the published models.
    return _build(tf.Qwen3ForCausalLM, tf.Qwen3Config(**_LLAMA_LIKE, head_dim=12))


def _gemma2() -> PreTrainedModel:
    config = tf.Gemma2Config(**_LLAMA_LIKE, head_dim=16, query_pre_attn_scalar=16, sliding_window=4)
    return _build(tf.Gemma2ForCausalLM, config)


def _gemma3() -> PreTrainedModel:
    config = tf.Gemma3TextConfig(**_LLAMA_LIKE, head_dim=16, query_pre_attn_scalar=16, sliding_window=4)
    return _build(tf.Gemma3ForCausalLM, config)


def _gpt2() -> PreTrainedModel:
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=48, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_IDS,
    )  # fmt: skip
    return _build(tf.GPT2LMHeadModel, config)


def _gpt_neox() -> PreTrainedModel:
    kwargs = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
    return _build(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**kwargs))


def _gptj() -> PreTrainedModel:
    config = tf.GPTJConfig(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=48, n_positions=64, rotary_dim=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_IDS,
    )  # fmt: skip
    return _build(tf.GPTJForCausalLM, config)


def _opt() -> PreTrainedModel:
    config = tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=HIDDEN, dropout=0.0, attention_dropout=0.0, **_IDS,
    )  # fmt: skip
    return _build(tf.OPTForCausalLM, config)


def _bloom() -> PreTrainedModel:
    config = tf.BloomConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, hidden_dropout=0.0,
        attention_dropout=0.0, **_IDS,
    )  # fmt: skip
    return _build(tf.BloomForCausalLM, config)


def _mpt() -> PreTrainedModel:
    config = tf.MptConfig(
        vocab_size=VOCAB, d_model=HIDDEN, n_layers=LAYERS, n_heads=HEADS, expansion_ratio=2, max_seq_len=64, **_IDS
    )
    return _build(tf.MptForCausalLM, config)


def _starcoder2() -> PreTrainedModel:
    config = tf.Starcoder2Config(**_LLAMA_LIKE, residual_dropout=0.0, embedding_dropout=0.0)
    return _build(tf.Starcoder2ForCausalLM, config)


def _mixtral() -> PreTrainedModel:
    return _build(tf.MixtralForCausalLM, tf.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2))


def _qwen3_moe() -> PreTrainedModel:
    return _build(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**_LLAMA_LIKE, **_MOE, **_more(head_dim=12)))


def _gpt_oss() -> PreTrainedModel:
    config = tf.GptOssConfig(
        **_LLAMA_LIKE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return _build(tf.GptOssForCausalLM, config)


def _distilbert() -> PreTrainedModel:
    config = tf.DistilBertConfig(
        vocab_size=VOCAB, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, **_more(num_labels=3), pad_token_id=0,
    )  # fmt: skip
    return _build(tf.DistilBertForSequenceClassification, config)


def _modernbert() -> PreTrainedModel:
    config = tf.ModernBertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=64, local_attention=4,
        **_more(num_labels=3, global_attn_every_n_layers=2), cls_token_id=1, sep_token_id=2, **_IDS,
    )  # fmt: skip
    return _build(tf.ModernBertForSequenceClassification, config)


def _deberta_v2() -> PreTrainedModel:
    config = tf.DebertaV2Config(
        **_BERT_LIKE,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        **_more(num_labels=3, position_buckets=8, norm_rel_ebd="layer_norm"),
    )
    return _build(tf.DebertaV2ForSequenceClassification, config)


def _t5() -> PreTrainedModel:
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=HEADS,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=2,
        **_more(decoder_start_token_id=0),
    )  # fmt: skip
    return _build(tf.T5ForConditionalGeneration, config)


def _bart() -> PreTrainedModel:
    config = tf.BartConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, decoder_start_token_id=2, **_IDS,
    )  # fmt: skip
    return _build(tf.BartForConditionalGeneration, config)


def _vit() -> PreTrainedModel:
    config = tf.ViTConfig(**_VIT_LIKE, **_more(num_labels=3), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return _build(tf.ViTForImageClassification, config)


def _llava() -> PreTrainedModel:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_VIT_LIKE, projection_dim=HIDDEN),
        text_config=tf.LlamaConfig(**_LLAMA_LIKE),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
    )
    return _build(tf.LlavaForConditionalGeneration, config)


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mistral": lambda: _build(tf.MistralForCausalLM, tf.MistralConfig(**_LLAMA_LIKE, sliding_window=4)),
    "qwen2": lambda: _build(tf.Qwen2ForCausalLM, tf.Qwen2Config(**_LLAMA_LIKE)),
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": lambda: _build(tf.Phi3ForCausalLM, tf.Phi3Config(**_LLAMA_LIKE)),
    "olmo2": lambda: _build(tf.Olmo2ForCausalLM, tf.Olmo2Config(**_LLAMA_LIKE)),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "opt": _opt,
    "falcon": lambda: _falcon(multi_query=True, parallel_attn=True, bias=False),
    "falcon_new": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2, bias=False),
    "falcon_rw": lambda: _falcon(multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "bloom": _bloom,
    "mpt": _mpt,
    "starcoder2": _starcoder2,
    "cohere": lambda: _build(tf.CohereForCausalLM, tf.CohereConfig(**_LLAMA_LIKE)),
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: _build(tf.BertForSequenceClassification, tf.BertConfig(**_BERT_LIKE, **_more(num_labels=3))),
    "roberta": lambda: _build(
        tf.RobertaForSequenceClassification, tf.RobertaConfig(**_BERT_LIKE, **_more(num_labels=3))
    ),
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "deberta_v2": _deberta_v2,
}
ENCODER_DECODERS: dict[str, Callable[[], Any]] = {"t5": _t5, "bart": _bart}
VISION: dict[str, Callable[[], Any]] = {"vit": _vit}
VISION_LANGUAGE: dict[str, Callable[[], Any]] = {"llava": _llava}

TINY: dict[str, Callable[[], Any]] = {
    **CAUSAL, **ENCODERS, **ENCODER_DECODERS, **VISION, **VISION_LANGUAGE
}  # fmt: skip


def tiny_inputs(name: str, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward of `TINY[name]`: random token ids without special tokens, nothing padded.

    The vision-language model gets `length` ids of which the first four stand for its image's patches.
    """
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    pixels = torch.randn(batch, 3, 8, 8, generator=generator)
    if name in VISION:
        return {"pixel_values": pixels}
    ids = torch.randint(3, IMAGE_TOKEN, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in VISION_LANGUAGE:
        if length < 5:
            raise ValueError(f"length={length}: {name} needs at least 5, four image tokens and one of text")
        ids[:, :4] = IMAGE_TOKEN
        inputs["pixel_values"] = pixels
    if name in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = torch.randint(3, IMAGE_TOKEN, (batch, length - 2), generator=generator)
    return inputs
