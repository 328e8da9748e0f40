"""Text as windows of tokens, by the tokenizer that lies beside a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.models.data import Data
from secateur.models.hf import import_transformers

SAMPLES, LENGTH = 128, 2048  # as in the papers
ROWS = 8  # of a batch


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
    try:
        known = json.loads((Path(folder) / "config.json").read_text()).get("max_position_embeddings")
    except ValueError:
        known = None  # who loads the model says what is wrong with it
    if isinstance(known, int) and known > 0:
        length = min(length, known)
    found = windows(tokens_of(spec.partition(":")[2], folder), samples, length, seed)
    return Data(spec, [{"input_ids": rows} for rows in found.split(ROWS)], [], labelled=False)


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
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
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
