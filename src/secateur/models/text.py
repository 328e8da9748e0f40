"""Text as windows of tokens, by the tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.models.data import Data
from secateur.models.hf import import_transformers

SAMPLES, LENGTH = 128, 2048  # as in the papers
ROWS = 8  # of a batch
# Types whose positions are counted from behind the number of the padding token.
BEHIND_PADDING = frozenset("roberta xlm-roberta xlm-roberta-xl camembert mpnet longformer data2vec-text roberta-prelayernorm".split())


def is_text(spec: str | None) -> bool:
    return spec is not None and spec.startswith("text:")


def text_data(spec: str, model: str, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0) -> Data:
    """Windows of tokens to calibrate a model with: batches of {"input_ids": int64 (8, length)}, none to test on.

    Args:
        spec: text:FILE. model: hf/FOLDER, with its tokenizer; windows are no longer than the positions that it knows.
        samples: windows at most, chosen by `seed`.

    Raises:
        DataError: the model is no such folder, or as `tokens_of` and `windows`. ModelError: transformers is not installed.
    """
    kind, _, folder = model.partition("/")
    if kind != "hf" or not (Path(folder) / "config.json").is_file():
        raise DataError(f"--data {spec} needs the tokenizer of a model folder, and {model} is none.\n  Give hf/FOLDER, or tokens: safetensors:FILE.")
    tokens = tokens_of(spec.partition(":")[2], folder)
    positions, words = _limits(folder)
    if words is not None and int(tokens.max()) >= words:
        raise DataError(f"{spec} has token {int(tokens.max())}, and the model of {folder} knows {words}.\n"
                        "  It was made with another tokenizer: use the model's own.")  # fmt: skip
    found = windows(tokens, samples, min(length, positions or length), seed)
    return Data(spec, [{"input_ids": rows} for rows in found.split(ROWS)], [], labelled=False)


def _limits(folder: str | Path) -> tuple[int | None, int | None]:
    """How many positions and how many tokens a model knows; None where its configuration does not say."""
    try:
        config = import_transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # who loads the model says what is wrong with it
        return None, None
    positions, words = (getattr(config, n, None) for n in ("max_position_embeddings", "vocab_size"))
    if isinstance(positions, int) and config.model_type in BEHIND_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    known = [n if isinstance(n, int) and n > 0 else None for n in (positions, words)]
    return known[0], known[1]


def tokens_of(path: str | Path, folder: str | Path) -> Tensor:
    """The tokens of a text file, int64 (tokens,), without special ones.

    Args:
        path: UTF-8 text. folder: of a Hugging Face model with its tokenizer.

    Raises:
        DataError: no file, no text in it, or no tokenizer in the folder.
        ModelError: transformers is not installed.
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file():
        raise DataError(f"text:{path} does not exist (looked from {Path.cwd()}).\n  Check the path.")
    try:
        text = path.read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}.\n  Convert it first.") from error
    transformers = import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raise whatever they like
        raise DataError(
            f"{folder} holds no tokenizer that can be loaded: {(str(error).splitlines() or [type(error).__name__])[0][:160]}.\n"
            "  Copy tokenizer.json beside its config.json, or give tokens: safetensors:FILE with input_ids."
        ) from error
    if not found:
        raise DataError(f"{path} gives no token.\n  Give a longer text.")
    return torch.tensor(found)


def windows(tokens: Tensor, rows: int, length: int, seed: int = 0) -> Tensor:
    """At most `rows` windows of `length` tokens that do not overlap, chosen by `seed`: (rows, length).

    Raises:
        DataError: not one window is there.
    """
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    if not len(whole):
        raise DataError(f"there are {len(tokens)} tokens, and one window has {length}.\n  Give more text, or a smaller --length.")
    picked = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:rows]
    return whole[picked.sort().values]
