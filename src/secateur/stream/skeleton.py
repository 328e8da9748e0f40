"""A model whose parameters have shapes and no values: they are read from the shards when they are needed, and dropped after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.masks.problem import finite
from secateur.stream.shards import Shards


@contextmanager
def without_values() -> Iterator[None]:
    """Parameters of modules made inside are on the meta device; buffers have their values."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        plain(module, name, value)
        if value is not None:
            module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


_PLAIN = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Skeleton:
    """
    Args:
        build: makes the model (in eval mode or not); called once.
        shards: where its values are. Names that differ by a prefix of the whole model ("model.") are found.

    Attributes:
        model: its parameters are on the meta device, but for the ones that are held at the moment.
        blocks: path of the list of blocks.
    """

    def __init__(self, build: Callable[[], nn.Module], shards: Shards):
        with without_values():
            self.model = build().eval()
        self.shards = shards
        self.prefix = self._prefix()
        self.blocks = _longest_list(self.model)

    def _prefix(self) -> str:
        own = [n for n, _ in self.model.named_parameters()]
        for prefix in ("", f"{getattr(self.model, 'base_model_prefix', '') or '?'}.", "model.", "transformer."):
            if sum(prefix + n in self.shards.files for n in own) > len(own) // 2:
                return prefix
        raise ModelError(
            f"{self.shards.folder}: its tensors are named like {next(iter(self.shards.files))!r}, those of the model like {own[0]!r}.\n"
            "  The weights do not belong to its config.json."
        )

    def stored(self, name: str) -> str:
        return self.prefix + name

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(f"{self.blocks}.{index}")

    @property
    def depth(self) -> int:
        return len(self.model.get_submodule(self.blocks))  # type: ignore[arg-type]

    def names(self, index: int) -> list[str]:
        """Stored names of the parameters of a block that the shards hold."""
        return [self.stored(f"{self.blocks}.{index}.{n}") for n, _ in self.block(index).named_parameters()]

    def fill(self, module: nn.Module, path: str, own: bool = False) -> dict[str, Tensor]:
        """Give a module its values in float32; `own`: only what it holds itself, and a table of embeddings as it is stored, which may
        need no memory at all. Returns the tensors as they are stored."""
        as_stored = own and type(module) is nn.Embedding
        for n, buffer in module.named_buffers(recurse=not own):
            key = self.stored(f"{path}.{n}" if path else n)
            if key in self.shards.files:  # what is not stored was made with the model
                value = self.shards.read([key])[key]
                if value.shape != buffer.shape:
                    raise ModelError(f"{key} is {tuple(value.shape)} in {self.shards.folder}, {tuple(buffer.shape)} by its config.\n  Copy it again.")
                buffer.copy_(value.to(buffer.dtype))
        names = [n for n, _ in module.named_parameters(recurse=not own)]
        read = self.shards.read([self.stored(f"{path}.{n}" if path else n) for n in names])
        for n, (key, value) in zip(names, read.items(), strict=True):
            have = module.get_parameter(n)
            if have.shape != value.shape:
                raise ModelError(f"{key} is {tuple(value.shape)} in {self.shards.folder}, {tuple(have.shape)} by its config.json.\n  Copy it again.")
            if value.dtype not in _PLAIN:
                raise ModelError(f"{key} is stored as {value.dtype}: a quantised model cannot be made sparse.\n  Give the weights it was made from.")
            if not finite(value):
                bad = int((~torch.isfinite(value)).sum())
                raise ModelError(f"{key} in {self.shards.folder} holds {bad} values that are NaN or infinite.\n  Load sound weights.")
            put(module, n, value if as_stored else value.float())
        return read

    def empty(self, module: nn.Module) -> None:
        """Drop the values of a module's parameters."""
        for n, p in list(module.named_parameters()):
            put(module, n, p.to("meta"))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While this holds, modules outside the blocks read their values when they are called, and keep them until the end."""
        inside = {id(m) for m in self.model.get_submodule(self.blocks).modules()}
        handles, filled = [], list[nn.Module]()

        def rows(_: nn.Module, __: tuple, found: Tensor) -> Tensor:
            return found.float()

        def load(module: nn.Module, path: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if module not in filled:
                    self.fill(module, path, own=True)
                    filled.append(module)

            return hook

        for path, module in self.model.named_modules():
            if id(module) not in inside and module._parameters:
                handles.append(module.register_forward_pre_hook(load(module, path)))
                if type(module) is nn.Embedding:
                    handles.append(module.register_forward_hook(rows))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in filled:
                for n, p in list(module.named_parameters(recurse=False)):
                    put(module, n, p.to("meta"))


def put(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _longest_list(model: nn.Module) -> str:
    """The list of modules, inside no other, that holds most parameters."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = [n for n in lists if not any(n != o and n.startswith(f"{o}.") for o in lists)]
    sizes = {n: sum(p.numel() for p in lists[n].parameters()) for n in outer}
    if not sizes or max(sizes.values()) == 0:
        raise ModelError(f"{type(model).__name__} has no list of blocks, so there is nothing to stream block by block.\n  Leave --stream out.")
    return max(sizes, key=lambda n: sizes[n])


class _Enough(Exception):
    """The last block was called: what is behind it need not run."""


BlockCall = tuple[tuple, dict[str, Any]]


def block_calls(skeleton: Skeleton, feed: Mapping[str, Tensor]) -> list[BlockCall]:
    """How each block is called for one sample: all positional and keyword arguments, whichever they are (masks may be absent, or
    differ from block to block). The blocks themselves do not run: each hands on what it is given, so that of the hidden states only
    those of the first are real.

    Raises:
        ModelError: the model cannot be run so.
    """
    said = ""
    for wrapped in (False, True):  # some models take a tuple from their blocks; a tensor they would take apart without a word
        try:
            calls = _calls(skeleton, feed, wrapped)
        except ModelError:
            raise
        except Exception as error:  # whatever the model's forward raises
            said = said or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        hidden = [args[0] if args else kwargs.get("hidden_states") for args, kwargs in calls]
        if all(h is hidden[0] for h in hidden):
            return calls
        said = said or "it changes what flows between its blocks, and streaming would leave that out"
    raise ModelError(f"{type(skeleton.model).__name__} cannot be run block by block: {said}.\n  Leave --stream out.")


def _calls(skeleton: Skeleton, feed: Mapping[str, Tensor], wrapped: bool) -> list[BlockCall]:
    seen: dict[int, BlockCall] = {}
    blocks = [skeleton.block(i) for i in range(skeleton.depth)]

    def caught(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen[i] = (args, dict(kwargs))
            if i == len(blocks) - 1:
                raise _Enough
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if wrapped else hidden

        return forward

    for i, block in enumerate(blocks):
        block.forward = caught(i)
    try:
        with skeleton.lent(), torch.no_grad():
            skeleton.model(**feed)
    except _Enough:
        pass
    finally:
        for block in blocks:
            del block.forward  # the class's own again
    if len(seen) != len(blocks):
        raise ModelError(f"{type(skeleton.model).__name__} calls {len(seen)} of its {len(blocks)} blocks.\n  Leave --stream out.")
    return [seen[i] for i in range(len(blocks))]
