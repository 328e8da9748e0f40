"""Hugging Face architectures, built small from their config classes: two layers, 64 wide, random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import torchvision_models

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

TOKENS = 12
VOCABULARY = 128
# Widths under the names the families use for them.
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
MOE = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
}
NO_HEAD_DIM = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
}

# (name, model class, config class, options, inputs)
TABLE: tuple[tuple[str, str, str, dict[str, Any], str], ...] = (
    ("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA, "tokens"),
    ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", LLAMA, "tokens"),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 16}, "tokens"),
    ("mistral", "MistralForCausalLM", "MistralConfig", {**LLAMA, "head_dim": 8}, "tokens"),
    ("gemma", "GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 16}, "tokens"),
    ("gemma2", "Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 16}, "tokens"),
    ("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 16}, "tokens"),
    ("phi", "PhiForCausalLM", "PhiConfig", LLAMA, "tokens"),
    ("phi3", "Phi3ForCausalLM", "Phi3Config", LLAMA, "tokens"),
    ("olmo2", "Olmo2ForCausalLM", "Olmo2Config", LLAMA, "tokens"),
    ("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", LLAMA, "tokens"),
    ("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", LLAMA, "tokens"),
    ("stablelm", "StableLmForCausalLM", "StableLmConfig", LLAMA, "tokens"),
    ("cohere", "CohereForCausalLM", "CohereConfig", LLAMA, "tokens"),
    ("granite", "GraniteForCausalLM", "GraniteConfig", LLAMA, "tokens"),
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT, "tokens"),
    ("gptj", "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8}, "tokens"),
    ("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", NO_HEAD_DIM, "tokens"),
    ("opt", "OPTForCausalLM", "OPTConfig", OPT, "tokens"),
    ("bloom", "BloomForCausalLM", "BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "tokens"),
    ("falcon", "FalconForCausalLM", "FalconConfig", {**{k: v for k, v in NO_HEAD_DIM.items() if k != "intermediate_size"}, "ffn_hidden_size": 128}, "tokens"),
    ("mixtral", "MixtralForCausalLM", "MixtralConfig", MOE, "tokens"),
    ("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**LLAMA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, "tokens"),
    ("mamba", "MambaForCausalLM", "MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}, "tokens"),
    ("bert", "BertForMaskedLM", "BertConfig", BERT, "tokens"),
    ("roberta", "RobertaForMaskedLM", "RobertaConfig", BERT, "tokens"),
    ("distilbert", "DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}, "tokens"),
    ("albert", "AlbertForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 32}, "tokens"),
    ("electra", "ElectraForPreTraining", "ElectraConfig", {**BERT, "embedding_size": 32}, "tokens"),
    ("mpnet", "MPNetForMaskedLM", "MPNetConfig", BERT, "tokens"),
    ("deberta_v2", "DebertaV2ForMaskedLM", "DebertaV2Config", {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "tokens"),
    ("modernbert", "ModernBertForMaskedLM", "ModernBertConfig", {**BERT, "pad_token_id": 0}, "tokens"),
    ("t5_encoder", "T5EncoderModel", "T5Config", T5, "tokens"),
    ("t5", "T5ForConditionalGeneration", "T5Config", {**T5, "num_decoder_layers": 2}, "pair"),
    ("mt5", "MT5ForConditionalGeneration", "MT5Config", {**T5, "num_decoder_layers": 2}, "pair"),
    ("bart", "BartForConditionalGeneration", "BartConfig", BART, "pair"),
    ("whisper", "WhisperForConditionalGeneration", "WhisperConfig", {**{k: v for k, v in BART.items() if k != "max_position_embeddings"}, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16, "pad_token_id": 0}, "speech"),
    ("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}, "wave"),
    ("vit", "ViTForImageClassification", "ViTConfig", VISION, "image"),
    ("deit", "DeiTForImageClassification", "DeiTConfig", VISION, "image"),
    ("dinov2", "Dinov2ForImageClassification", "Dinov2Config", {**{k: v for k, v in VISION.items() if k != "intermediate_size"}, "mlp_ratio": 2}, "image"),
    ("siglip", "SiglipVisionModel", "SiglipVisionConfig", VISION, "image"),
    ("swin", "SwinForImageClassification", "SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, "image"),
    ("convnext", "ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [32, 48, 64, 80], "depths": [1, 1, 2, 1]}, "image"),
    ("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 64}, "image64"),
    ("clip", "CLIPModel", "CLIPConfig", {"text_config": BERT, "vision_config": VISION, "projection_dim": 48}, "clip"),
)


def inputs(kind: str) -> dict[str, Any]:
    """Keyword inputs by kind: batches of two."""
    tokens = torch.randint(3, VOCABULARY - 1, (2, TOKENS))
    if kind == "tokens":
        return {"input_ids": tokens}
    if kind == "pair":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :7].clone()}
    if kind == "speech":
        return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens[:, :7].clone()}
    if kind == "wave":
        return {"input_values": torch.randn(2, 2000)}
    if kind == "clip":
        return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 32, 32)}
    side = 64 if kind == "image64" else 32
    return {"pixel_values": torch.randn(2, 3, side, side)}


def model(row: tuple[str, str, str, dict[str, Any], str]) -> Built:
    """The model of one row of the table with its inputs; nothing is cached between calls."""
    torchvision_models.library()  # transformers imports it
    import transformers

    _, model_class, config_class, options, kind = row
    config = getattr(transformers, config_class)(**options)
    net = getattr(transformers, model_class)(config)
    kwargs = inputs(kind)
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "use_cache", None) is not None:
            part.use_cache = False
            if part is config:
                kwargs["use_cache"] = False
    return net, (), kwargs


def rows() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    """(name, kind, builder) of every Hugging Face model of the suite."""
    for row in TABLE:
        yield f"hf/{row[0]}", "huggingface", partial(model, row)
