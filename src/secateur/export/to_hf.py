"""A folder for `from_pretrained` of transformers: a plain config where every layer has the same widths, else a few lines of code beside it.

Whether a plain config will do is found out, not looked up: which numbers of the configuration set which dimension is seen by building the
model on the meta device with one number doubled; the numbers that give the pruned shapes are tried, and the outputs have to agree.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import ModelError
from secateur.export.runner import Call, File
from secateur.measure.run import at_rest, forward
from secateur.measure.runtimes.onnx_file import deviation, quietly
from secateur.models.hf import import_transformers

Shapes = dict[str, tuple[int, ...]]
_CLOSE = 1e-5  # relative: the same layers with the same weights, and perhaps another kernel of attention
_MOST_ZEROS = 1.05  # tensors of a plain config may be so much larger in all
_MOST_TOGETHER = 3  # numbers of a configuration that one dimension is a product of
_TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "spiece.model",
    "preprocessor_config.json",
)  # fmt: skip
_CODE = '''"""{base} with layers of different widths, as pruned by secateur.

`config.pruned` says which tensors have another shape than the configuration gives them, and which attributes go with that.
"""

from torch import nn
from transformers import {base}


class Pruned{base}({base}):
    def __init__(self, config):
        super().__init__(config)
        for name, shape in config.pruned["shapes"].items():
            path, _, leaf = name.rpartition(".")
            owner = self.get_submodule(path)
            old = getattr(owner, leaf)
            new = old.new_empty([int(size) for size in shape.split("x")])
            setattr(owner, leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
            if isinstance(owner, nn.Linear) and leaf == "weight":
                owner.out_features, owner.in_features = new.shape
        for path, attributes in config.pruned["attributes"].items():
            for name, value in attributes.items():
                setattr(self.get_submodule(path), name, tuple(value) if isinstance(value, list) else value)
        self.tie_weights()
'''


def write(model: nn.Module, call: Call, folder: Path) -> tuple[File, list[str]]:
    """The folder's files, and a note on how it is loaded.

    Raises ModelError: transformers is missing, it is no model of transformers, or its modules are others than its configuration builds.
    """
    with quietly():  # what it finds installed for another torch, it logs
        transformers = import_transformers()
        kind = transformers.PreTrainedModel
    if not isinstance(model, kind):
        raise ModelError(
            f"the model is a {type(model).__name__}, no model of transformers: a Hugging Face folder is made of its own class and configuration.\n"
            "  Of a saved folder give the dense model with it: --dense hf/FOLDER. Or choose another format."
        )
    wanted, stock = shapes(model), shapes(_built(type(model), model.config))
    if set(wanted) != set(stock):
        odd = sorted(set(wanted) ^ set(stock))
        raise ModelError(
            f"{odd[0]!r} and {len(odd) - 1} more tensors are in the model or in what its configuration builds, not in both.\n"
            "  A Hugging Face folder can hold other widths, not other modules: choose another format."
        )
    config = copy.deepcopy(model.config)
    source, config._name_or_path = Path(str(config._name_or_path or "")), ""
    if getattr(config, "use_cache", None) is False:  # switched off to capture the model; generating text wants it
        config.use_cache = getattr(type(config)(), "use_cache", False)
    auto, plain = auto_class(transformers, model), next(plain_models(model, config, (wanted, stock), call), None)
    if plain is not None:
        config, remote, notes = copy.deepcopy(plain.config), False, [_plain_note(model, plain, auto)]
    else:
        remote, how = True, f"{auto}.from_pretrained(FOLDER, trust_remote_code=True) loads it, by modeling_pruned.py in the folder"
        notes = [f"layers differ in width: {how}"]
        own_code(model, config, (wanted, stock), auto, folder)
    with _without_bars(transformers):
        kept: Any = model if plain is None else plain
        kept.save_pretrained(folder)
    config.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # safetensors writes for the owner alone
    if source.is_dir() and str(source) not in ("", "."):
        for path in sorted({p for pattern in _TOKENIZER for p in source.glob(pattern) if p.is_file()}):
            shutil.copyfile(path, folder / path.name)
    return File(folder, "hf", tuple(call[1]), auto, remote), notes


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _plain_note(model: Any, plain: Any, auto: str) -> str:
    before, after = model.config.to_dict(), plain.config.to_dict()
    differs = [key for key, value in after.items() if isinstance(value, int) and value != before.get(key) and key != "use_cache"]
    changed = ", ".join(f"{key}={after[key]}" for key in differs)
    more = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in model.parameters())
    padded = f"; {more:,} zeros fill layers up to the width of the widest" if more else ""
    return f"a plain config ({changed or 'unchanged'}{padded}): {auto}.from_pretrained(FOLDER) loads it, and so does any engine that knows the type"


def own_code(model: nn.Module, config: Any, known: tuple[Shapes, Shapes], auto: str, folder: Path) -> None:
    """`modeling_pruned.py` into the folder, and what it reads into the configuration."""
    (wanted, stock), base = known, type(model).__name__
    differs = {name: "x".join(map(str, shape)) for name, shape in wanted.items() if shape != stock[name]}
    config.pruned = {"shapes": differs, "attributes": attributes(model, _built(type(model), config))}
    config.auto_map = {auto: f"modeling_pruned.Pruned{base}"}
    config.architectures = [f"Pruned{base}"]
    (folder / "modeling_pruned.py").write_text(_CODE.format(base=base))


def shapes(model: nn.Module) -> Shapes:
    """Of everything that a state dict holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _built(kind: type, config: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def auto_class(transformers: Any, model: nn.Module) -> str:
    """The Auto class that this class is loaded by; the class itself where there is none."""
    for name in ("AutoModelForCausalLM", "AutoModel", *sorted(n for n in dir(transformers) if n.startswith("AutoModelFor"))):
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
        if mapping is not None and type(model.config) in mapping:
            held = mapping[type(model.config)]
            if type(model) in (held if isinstance(held, (tuple, list)) else (held,)):
                return name
    return type(model).__name__


def attributes(model: nn.Module, stock: nn.Module) -> dict[str, dict[str, Any]]:
    """Numbers and words that modules of the model have otherwise than those that its configuration builds, by the module's name."""
    known, out = dict(stock.named_modules()), {}
    for path, module in model.named_modules():
        theirs = vars(known[path]) if path in known else {}
        skipped = ("training", "in_features", "out_features") if isinstance(module, nn.Linear) else ("training",)
        own = {k: v for k, v in vars(module).items() if k not in skipped and k[0] != "_" and _simple(v) and k in theirs and v != theirs[k]}
        if own:
            out[path] = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
    return out


def _simple(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and all(isinstance(v, int) for v in value))


# ---------------------------------------------------------------- a plain config
def plain_models(model: nn.Module, config: Any, known: tuple[Shapes, Shapes], call: Call) -> Iterator[nn.Module]:
    """Stock models that take the weights and give these outputs; few numbers of the configuration changed first.

    Layers whose widths differ by a little are filled up with zeros to the widest.
    """
    wanted, stock = known
    scales = influence(type(model), config, stock)
    each: dict[frozenset[str], tuple[int, int]] = {}
    for name, shape in wanted.items():
        for dim, (new, old) in enumerate(zip(shape, stock[name], strict=True)):
            names, ratio = frozenset(scales.get((name, dim), ())), _lowest(new, old)
            if not names and new != old:
                return
            before = each.get(names, ratio)
            each[names] = max(before, ratio, key=lambda pair: pair[0] / pair[1])
    for changes in solutions(each):
        found = stock_model(model, config, {key: getattr(config, key) * new // old for key, (new, old) in changes.items()}, call)
        if found is not None:
            yield found


def influence(kind: type, config: Any, stock: Shapes) -> dict[tuple[str, int], set[str]]:
    """(tensor, dimension) -> the numbers of the configuration that it is proportional to."""
    out: dict[tuple[str, int], set[str]] = {}
    for key, value in config.to_dict().items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or key.endswith("_id"):
            continue
        trial = copy.deepcopy(config)
        try:
            setattr(trial, key, 2 * value)
            found = shapes(_built(kind, trial))
        except Exception:  # a number that cannot be doubled alone sets nothing alone
            continue
        for name in found.keys() & stock.keys():
            for dim, (new, old) in enumerate(zip(found[name], stock[name], strict=False)):
                if new == 2 * old:
                    out.setdefault((name, dim), set()).add(key)
    return out


def solutions(ratios: Mapping[frozenset[str], tuple[int, int]]) -> Iterator[dict[str, tuple[int, int]]]:
    """Ratios of single numbers whose products are those wanted, few numbers first."""
    names = sorted({name for group in ratios for name in group})
    must = {next(iter(group)) for group, ratio in ratios.items() if len(group) == 1 and ratio != (1, 1)}
    free = [name for name in names if frozenset([name]) not in ratios]
    for count in range(min(len(free), _MOST_TOGETHER) + 1):
        for chosen in combinations(free, count):
            found = _solved(ratios, must | set(chosen))
            if found is not None:
                yield found


def _solved(ratios: Mapping[frozenset[str], tuple[int, int]], changing: Iterable[str]) -> dict[str, tuple[int, int]] | None:
    """The one choice of ratios for the numbers that change; None where there is none, or more than one."""
    unknown, known = set(changing), dict[str, tuple[int, int]]()
    progress = True
    while progress:
        progress = False
        for group, ratio in ratios.items():
            open_ = group & unknown
            if len(open_) == 1:
                rest = _product(known[name] for name in group & known.keys())
                known[next(iter(open_))] = _lowest(ratio[0] * rest[1], ratio[1] * rest[0])
                unknown -= known.keys()
                progress = True
    whole = all(_product(known[name] for name in group & known.keys()) == ratio for group, ratio in ratios.items())
    return known if whole and not unknown else None


def _product(ratios: Iterable[tuple[int, int]]) -> tuple[int, int]:
    new, old = 1, 1
    for a, b in ratios:
        new, old = new * a, old * b
    return _lowest(new, old)


def _lowest(new: int, old: int) -> tuple[int, int]:
    divisor = math.gcd(new, old) or 1
    return new // divisor, old // divisor


def stock_model(model: nn.Module, config: Any, changes: Mapping[str, int], call: Call) -> nn.Module | None:
    """The stock model of a configuration with `changes` and the model's weights in it; None if it has no room for them, far too much, or
    other outputs."""
    wanted = shapes(model)
    try:
        config = copy.deepcopy(config)
        for key, value in changes.items():
            setattr(config, key, value)
        if hasattr(config, "validate"):
            config.validate()  # as from_pretrained will
        room = shapes(_built(type(model), config))
        if any(a < b for name, shape in wanted.items() for a, b in zip(room[name], shape, strict=True)):
            return None
        if sum(map(math.prod, room.values())) > _MOST_ZEROS * sum(map(math.prod, wanted.values())):
            return None
        quiet = copy.deepcopy(config)
        if hasattr(quiet, "use_cache"):
            quiet.use_cache = False  # as the model runs here
        found = type(model)(quiet).to(next(model.parameters()).dtype).eval()
        found.load_state_dict({name: _padded(tensor, room[name]) for name, tensor in model.state_dict().items()})
        with at_rest(model):
            pairs = list(zip(_tensors(forward(model, *call)), _tensors(forward(found, *call)), strict=True))
        if not all(a.shape == b.shape and deviation(a, b)[1] <= _CLOSE for a, b in pairs):
            return None
        found.config = config
        return found
    except Exception:  # numbers that no model can be built or run with
        return None


def _padded(tensor: Tensor, room: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == room:
        return tensor
    out = tensor.new_zeros(room)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
