"""Folders of Hugging Face models: what they are built from, what they are calibrated with, and the whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.errors import DataError, InputError, ModelError
from secateur.masks import find
from secateur.models.hf import import_transformers
from secateur.models.text import LENGTH, SAMPLES, tokens_of, windows
from secateur.pattern import written
from secateur.sparsify import Sparse
from secateur.stream.block import Rule
from secateur.stream.run import Stream, Streamed
from secateur.stream.shards import Shards
from secateur.stream.skeleton import Skeleton
from secateur.trace.tracer import patterns

_KEYS = ("input_ids", "tokens", "ids")


def builder(folder: Path) -> Callable[[], nn.Module]:
    """Makes the model that config.json describes, with the attention that takes any mask.

    Raises:
        ModelError: transformers is not installed, or does not know the model.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"{folder}/config.json is no configuration transformers knows: {said}.\n  Check model_type in it.") from error
    config.use_cache = False
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None)

    def build() -> nn.Module:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            config.dtype = torch.float32
            return kind(config) if kind is not None else transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        finally:
            torch.set_default_dtype(dtype)

    return build


def calibration(spec: str, folder: Path, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Windows of tokens (samples, length), and what is to be said of them. `spec`: text:FILE, or safetensors:FILE with `input_ids`.

    Raises:
        DataError: nothing there, or fewer tokens than one window.
    """
    kind, _, path = spec.partition(":")
    notes: list[str] = []
    if kind == "text" and path:
        found = windows(tokens_of(path, folder), samples, length, seed)
    elif kind == "safetensors" and path:
        try:
            held = load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{spec} cannot be read: {error}.\n  Check the path.") from error
        ids = next((held[k] for k in _KEYS if k in held), None)
        if ids is None or ids.is_floating_point() or ids.dim() not in (1, 2):
            raise DataError(f"{spec} holds {', '.join(held) or 'nothing'}.\n  It needs input_ids: whole numbers, (rows, length) or (tokens,).")
        found = ids.long()[:samples] if ids.dim() == 2 else windows(ids.long(), samples, length, seed)
    else:
        raise DataError(f"--data {spec!r} is no text.\n  With --stream write text:FILE, or safetensors:FILE with input_ids.")
    if len(found) < samples:
        notes.append(f"{len(found)} windows of {found.shape[1]} tokens were used; {samples} were asked for, and there is no more text")
    return found, notes


def mask_folder(
    folder: str | Path, out: str | Path, how: Sparse, tokens: Tensor, *, at_once: bool = False, progress: Callable[[str], None] | None = None
) -> Streamed:  # fmt: skip
    """Make the linear layers in the blocks of a Hugging Face model sparse, from shards to shards, in the memory of about one block.

    Args:
        folder: with config.json and safetensors. out: a folder that is not there yet; it becomes an ordinary Hugging Face folder, its
            weights dense with zeros in them.
        how: budgets other than "uniform" and `corrected` need the whole model and are not for here.
        tokens: int64 (samples, length).
        at_once: one pass over the samples for each block instead of one for each of its inputs: quicker, a little less exact.
        progress: called with the name of each stage as it starts.

    A run that was killed goes on with the same call, and ends with the same bytes. Embeddings, norms, routers and the head stay dense.

    Raises:
        InputError, ModelError, DataError, FormatError: what was done so far is kept beside `out`.
    """
    folder, out = Path(folder), Path(out)
    say = progress or (lambda stage: None)
    keep = how.share()
    method = find("sparsegpt" if how.by == "auto" else how.by)
    if how.permute:
        raise InputError("permute=True moves units of many blocks at once, and a stream sees one block.\n  Leave it out, or leave streaming out.")
    if how.budget != "uniform":
        raise InputError(f"budget={how.budget!r} looks at all layers at once, and a stream sees one block.\n  Use 'uniform', or leave streaming out.")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel() or int(tokens.min()) < 0:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise DataError(f"tokens are {shape}.\n  Give whole numbers from 0 up, (samples, length), such as `calibration` makes of text.")
    skeleton = Skeleton(builder(folder), Shards.of(folder))
    rows = next((m.num_embeddings for m in skeleton.model.modules() if isinstance(m, nn.Embedding)), None)
    if rows is not None and int(tokens.max()) >= rows:
        raise DataError(f"the data has token {int(tokens.max())}, and the model of {folder} knows {rows}.\n"
                        "  It was made with another tokenizer: use the model's own.")  # fmt: skip
    rule = Rule(method, how.pattern, keep, how.refit, patterns(how.ignore))
    feeds = [{"input_ids": row[None]} for row in tokens]
    stream = Stream(skeleton, feeds, rule, out, at_once, {"pattern": written(how.pattern)})
    return stream.run(say)
