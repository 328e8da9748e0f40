"""Hugging Face models from a local folder, or built small from the type's own configuration class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.models.vision import import_torchvision

# What a small model of any type has, under every name the families use for it.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt")
_SMALL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "intermediate_size": 128,
    "hidden_dim": 128, "d_ff": 128, "ffn_dim": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers":
    2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "d_kv":
    16, "word_embed_proj_dim": 64, "image_size": 32, "patch_size": 8, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "moe_intermediate_size": 64, "max_position_embeddings": 64, "n_positions": 64,
    "max_source_positions": 20, "max_target_positions": 16, "num_mel_bins": 16, "rotary_dim": 8, "state_size": 8,
}  # fmt: skip
_TOKEN_LENGTH, _WAVE_LENGTH = 12, 2000


def import_transformers() -> Any:
    """transformers, ready for use.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError("hf/... needs transformers, which is not installed.\n"
                         "  Install it: pip install transformers") from error  # fmt: skip
    if transformers.utils.is_torchvision_available():
        import_torchvision()  # transformers imports it too, and fails where its compiled operators do
    return transformers


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """(model, keyword inputs) of a local folder with config.json, or of a model type such as `llama` or `vit`.

    A folder's safetensors are loaded where it has them; a type's weights are random. No network is used.

    Raises ModelError: transformers is not installed, or there is no such folder or type.
    """
    transformers, folder = import_transformers(), Path(name)
    if (folder / "config.json").is_file():
        config, model = _from_folder(transformers, folder)
    elif folder.is_dir() or "/" in name:
        raise ModelError(f"hf/{name}: there is no {folder / 'config.json'} (looked from {Path.cwd()}).\n"
                         "  Give a local folder with config.json; nothing is downloaded.")  # fmt: skip
    else:
        config, model = _from_type(transformers, name)
    return model.eval(), _inputs(model, config)


def _from_folder(transformers: Any, folder: Path) -> tuple[Any, nn.Module]:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder}/config.json is no configuration transformers knows: {_first(error)}.\n"
                         "  Check model_type in it.") from error  # fmt: skip
    _without_cache(config)
    chosen = getattr(transformers, (config.architectures or [""])[0], None) or _class_for(transformers, config)
    if not any(folder.glob("*.safetensors")):
        if other := sorted(p.name for form in _OTHER_WEIGHTS for p in folder.glob(form)):
            raise ModelError(f"{folder} holds its weights in {other[0]}, which is not read: such a file may run code when it is loaded.\n"
                             "  Save it as safetensors: model.save_pretrained(FOLDER) with a current version of transformers.")  # fmt: skip
        return config, chosen(config)
    try:
        model, found = chosen.from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False,
                                              output_loading_info=True)  # fmt: skip
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ModelError(f"The safetensors in {folder} do not fit its config.json: {_first(error)}.\n"
                         "  Copy the folder again.") from error  # fmt: skip
    if lacking := sorted(found["missing_keys"]) or [str(key[0]) for key in found["mismatched_keys"]]:
        raise ModelError(f"The safetensors in {folder} lack {len(lacking)} tensors of {type(model).__name__}, such as {lacking[0]!r}, which would be "
                         "random.\n  Copy the folder again, name the class they belong to as architectures in config.json, or build the model "
                         "yourself: file.py:function.")  # fmt: skip
    return model.config, model


def _from_type(transformers: Any, name: str) -> tuple[Any, nn.Module]:
    known = sorted(transformers.CONFIG_MAPPING.keys())
    if name not in known:
        from difflib import get_close_matches

        raise ModelError(f"hf/{name}: transformers {transformers.__version__} has no model type {name!r}, and there is "
                         f"no such folder.\n  Near it: {', '.join(get_close_matches(name, known, 3) or known[:3])}.")
    plain = transformers.AutoConfig.for_model(name)
    config = transformers.AutoConfig.for_model(name, **_smaller(plain))
    _without_cache(config)
    try:
        return config, _class_for(transformers, config)(config)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"hf/{name} cannot be built small: {_first(error)}.\n"
                         "  Write a config.json and give its folder: hf/FOLDER.") from error  # fmt: skip


def _without_cache(config: Any) -> None:
    """Past keys and values belong to generating text, not to the network: without them a forward is one graph."""
    for part in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        if part is not None and getattr(part, "use_cache", None):
            part.use_cache = False


def _smaller(config: Any) -> dict[str, Any]:
    """The options that make a configuration small, in the names it has itself; its parts likewise."""
    held = config.to_dict()
    out = {key: value for key, value in _SMALL.items() if isinstance(held.get(key), int)}
    if "num_key_value_heads" in out and held["num_key_value_heads"] == held.get("num_attention_heads"):
        out["num_key_value_heads"] = out["num_attention_heads"]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(held.get(key), int) and held[key] >= _SMALL["vocab_size"]:
            out[key] = 0
    for key in ("text_config", "vision_config"):
        part = getattr(config, key, None)
        if hasattr(part, "to_dict"):
            out[key] = _smaller(part)
    return out


def _class_for(transformers: Any, config: Any) -> Any:
    """The model class with a head for this configuration: a language model, a classifier, or the bare body."""
    auto = transformers.models.auto.modeling_auto
    for table in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "IMAGE_CLASSIFICATION", "CTC"):
        mapping = getattr(auto, f"MODEL_FOR_{table}_MAPPING", {})
        if type(config) in mapping and not (table == "CAUSAL_LM" and not _generates(config)):
            return mapping[type(config)]
    if type(config) in auto.MODEL_MAPPING:
        found = auto.MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, (tuple, list)) else found
    raise ModelError(f"transformers has no model for a {type(config).__name__}.\n  Give a folder whose config.json "
                     "names its architecture.")  # fmt: skip


def _generates(config: Any) -> bool:
    """Encoders also stand in the table of language models; as such they only run as decoders."""
    encoders = ("bert", "roberta", "electra", "xlm", "camembert", "bart", "whisper", "pegasus", "t5")
    return not any(word in config.model_type for word in encoders)


def _inputs(model: Any, config: Any) -> dict[str, Any]:
    kind = getattr(model, "main_input_name", "input_ids")
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    generator = torch.Generator().manual_seed(0)
    highest = max(4, int(getattr(text, "vocab_size", 256)) - 1)
    tokens = torch.randint(3, highest, (1, _TOKEN_LENGTH), generator=generator)
    side = getattr(vision, "image_size", 224)
    size = tuple(side) if isinstance(side, (tuple, list)) else (side, side)
    out: dict[str, Any] = {}
    if kind == "pixel_values" or hasattr(config, "vision_config"):
        out["pixel_values"] = _noise(generator, 1, getattr(vision, "num_channels", 3), *size)
    if kind == "input_features":
        out["input_features"] = _noise(generator, 1, config.num_mel_bins, 2 * config.max_source_positions)
    if kind == "input_values":
        out["input_values"] = _noise(generator, 1, _WAVE_LENGTH)
    if kind == "input_ids":
        out["input_ids"] = tokens
    if getattr(config, "is_encoder_decoder", False):
        out["decoder_input_ids"] = tokens[:, : _TOKEN_LENGTH // 2].clone()
    return out


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
