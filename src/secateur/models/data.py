"""Data from a name or a path, as batches: for BatchNorm statistics, for measuring accuracy, for example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy import ascontiguousarray, ndarray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import DataError
from secateur.measure.run import batch_of
from secateur.models.names import import_function
from secateur.models.returned import parts_of

_IMAGE_KEYS = ("images", "image", "x", "inputs")
_LABEL_KEYS = ("labels", "label", "y", "targets")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}
FORMS = "digits, imagefolder:DIR, npz:FILE, safetensors:FILE, pkg.mod:function or file.py:function"


@dataclass(frozen=True)
class Batches:
    """Rows of inputs (and labels, one class number per row) in batches of `size`; can be gone through many times."""

    inputs: Tensor
    labels: Tensor | None = None
    size: int = 128

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.inputs), self.size):
            x = self.inputs[start : start + self.size]
            yield x if self.labels is None else (x, self.labels[start : start + self.size])


@dataclass(frozen=True)
class Data:
    """A data set in two parts. `train` re-estimates statistics and trains, `test` only measures."""

    name: str
    train: Iterable[Any]
    test: Iterable[Any]
    labelled: bool

    def example(self, rows: int = 2) -> tuple[tuple, dict[str, Any]]:
        """The first `rows` rows of the first training batch, as (args, kwargs) of a model, in memory of their own."""
        batch = next(iter(self.train))
        if isinstance(batch, dict):
            return (), {k: v[:rows].clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        return ((batch[0] if isinstance(batch, (tuple, list)) else batch)[:rows].clone(),), {}


def load_data(spec: str, *, batch_size: int = 128, test_share: float = 0.2, seed: int = 0) -> Data:
    """The data set `spec` names, split into training and test rows by `seed`: the same split every time.

    `spec` is one of: digits (scikit-learn's 1,797 real handwritten digits, 8x8); imagefolder:DIR (one folder per
    class, images of one size; or DIR/train and DIR/test); npz:FILE or safetensors:FILE (`images` N,H,W or N,H,W,C or
    N,C,H,W, and `labels`, whole bytes divided by 255); pkg.mod:function or file.py:function (returns inputs, (inputs, labels),
    ((inputs, labels), (inputs, labels)) for training and test, each as tensors or arrays; an iterable of batches, two of them, or a `Data`).

    Raises:
        DataError: nothing there, nothing in it, the wrong names or shapes, or numbers that are not finite.
    """
    kind, _, rest = spec.partition(":")
    labels: Tensor | None
    if spec == "digits":
        inputs, labels = _digits()
    elif kind == "imagefolder" and rest:
        return _image_folder(_existing(rest, spec), spec, batch_size, (test_share, seed))
    elif kind in ("npz", "safetensors") and rest:
        inputs, labels = _arrays(_existing(rest, spec), kind)
    elif rest and kind:
        made = _as_tensors(spec, _called(spec))
        if isinstance(made, Data):
            return made
        if isinstance(made, Tensor):
            made = (made, None)
        if isinstance(made, tuple) and len(made) == 2 and all(map(_is_pair, made)):
            return _of_pairs(spec, made, batch_size)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Tensor)):
            return Data(spec, *parts_of(spec, made))
        inputs, labels = made
    else:
        raise DataError(f"--data {spec!r} is no data set that secateur knows.\n  Write {FORMS}.")
    _check(spec, inputs, labels)
    train, test = _split(len(inputs), test_share, seed)
    parts = [Batches(inputs[p], None if labels is None else labels[p], batch_size) for p in (train, test)]
    return Data(spec, parts[0], parts[1], labels is not None)


def tensors_of(**parts: Iterable[Any]) -> dict[str, Tensor]:
    """Every tensor in every batch of some parts of a data set, by a name of its own: what decides what becomes of them."""
    return {f"{name} {n} {m}": leaf for name, part in parts.items() for n, batch in enumerate(part)
            for m, leaf in enumerate(tree_leaves(batch)) if isinstance(leaf, Tensor)}  # fmt: skip


def rows_of(items: Iterable[Any], first: int, count: int) -> Iterable[Any]:
    """The rows `first` to `first + count` of a part of a data set, as far as they are there, in batches again."""
    if isinstance(items, Batches):
        part = slice(first, first + count)
        return Batches(items.inputs[part], None if items.labels is None else items.labels[part], items.size)
    found, seen = [], 0
    for item in items:
        n = batch_of((item,))
        part = slice(max(0, first - seen), max(0, first + count - seen))
        if part.start < n and part.stop:

            def cut(t: Tensor, n: int = n, part: slice = part) -> Tensor:
                return t[part] if t.dim() and len(t) == n else t

            found.append(tree_map_only(Tensor, cut, item))
        seen += n
        if seen >= first + count:
            break
    return found


def _called(spec: str) -> Any:
    function = import_function(spec, DataError, "--data")
    try:
        made = function()
        return list(made) if isinstance(made, Iterator) else made  # a generator can be gone through only once
    except (Exception, SystemExit) as error:
        raise DataError(f"--data {spec}() failed: {type(error).__name__}: {error}.\n"
                        "  The function is called without arguments; give it defaults.") from error  # fmt: skip


def _as_tensors(spec: str, made: Any) -> Any:
    """Arrays of numpy as tensors."""
    try:
        return tree_map_only(ndarray, lambda a: torch.from_numpy(ascontiguousarray(a)), made)
    except TypeError as error:
        raise DataError(f"--data {spec} returned an array that is no tensor: {error}.\n  Return numbers.") from error


def _is_pair(part: Any) -> bool:
    """Inputs and labels, as many of each."""
    return isinstance(part, tuple) and len(part) == 2 and all(isinstance(t, Tensor) and t.dim() for t in part) and len(part[0]) == len(part[1])


def _of_pairs(spec: str, parts: Any, batch_size: int) -> Data:
    for inputs, labels in parts:
        _check(spec, inputs, labels)
    train, test = (Batches(inputs, labels, batch_size) for inputs, labels in parts)
    return Data(spec, train, test, True)


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("--data digits comes with scikit-learn, which is not installed.\n"
                        "  Install it: pip install scikit-learn") from error  # fmt: skip
    held = load_digits()
    return torch.tensor(held.images, dtype=torch.float32)[:, None] / 16, torch.tensor(held.target)


def _existing(path: str, spec: str) -> Path:
    found = Path(path)
    if not found.exists():
        raise DataError(f"--data {spec}: {found} does not exist (looked from {Path.cwd()}).\n  Check the path.")
    return found


# ---------------------------------------------------------------- arrays
def _arrays(path: Path, kind: str) -> tuple[Tensor, Tensor | None]:
    arrays = _read_npz(path) if kind == "npz" else _read_safetensors(path)
    images = next((arrays[k] for k in _IMAGE_KEYS if k in arrays), None)
    if images is None:
        raise DataError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, and no images.\n"
            f"  Name the inputs one of {', '.join(_IMAGE_KEYS)}, and the labels one of {', '.join(_LABEL_KEYS)}."
        )
    labels = next((arrays[k] for k in _LABEL_KEYS if k in arrays), None)
    if images.dtype == torch.uint8:
        images = _channels_first(images).float() / 255
    elif images.is_floating_point():
        images = _channels_first(images).float()
    if labels is not None and labels.is_floating_point() and not torch.equal(labels, labels.round()):
        raise DataError(f"{path}: the labels hold fractions, such as {float(labels[labels != labels.round()][0])}.\n"
                        "  A label is the whole number of its class.")  # fmt: skip
    return images, None if labels is None else labels.long().reshape(-1)


def _read_npz(path: Path) -> dict[str, Tensor]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: torch.from_numpy(np.ascontiguousarray(held[name])) for name in held.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}.\n  Write it with numpy.savez, arrays of numbers "
                        "only (no objects).") from error  # fmt: skip


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read as safetensors: {error}.\n  Check the file.") from error


def _channels_first(images: Tensor) -> Tensor:
    """N,H,W -> N,1,H,W and N,H,W,C -> N,C,H,W, where C is 1, 3 or 4; anything else is left as it is."""
    if images.dim() == 3:
        return images[:, None]
    if images.dim() == 4 and images.shape[3] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        return images.permute(0, 3, 1, 2).contiguous()
    return images


# ---------------------------------------------------------------- folders of images
def _image_folder(root: Path, spec: str, batch_size: int, split: tuple[float, int]) -> Data:
    if not root.is_dir():
        raise DataError(f"--data {spec}: {root} is not a folder.\n  Give the folder that holds one folder per class.")
    train, test = root / "train", next((root / n for n in ("test", "val", "valid", "validation") if (root / n).is_dir()), None)
    if train.is_dir() and test is not None:
        classes = _classes(train)
        if unknown := sorted(_classes(test).keys() - classes.keys()):
            raise DataError(f"--data {spec}: {test} has the class {unknown[0]!r}, and {train} has not.\n"
                            "  Both number their classes as the folders of train.")  # fmt: skip
        parts = [_read_images(half, spec, list(classes)) for half in (train, test)]
        batches = [Batches(x, y, batch_size) for x, y in parts]
        return Data(spec, batches[0], batches[1], True)
    inputs, labels = _read_images(root, spec, list(_classes(root)))
    batches = [Batches(inputs[rows], labels[rows], batch_size) for rows in _split(len(inputs), *split)]
    return Data(spec, batches[0], batches[1], True)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _classes(root: Path) -> dict[str, int]:
    """The numbers of the classes by name: of the folders that hold images, but for hidden ones."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".") and _images(path))
    return {name: number for number, name in enumerate(names)}


def _read_images(root: Path, spec: str, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """All images below `root`, and of each the place of its folder in `classes`."""
    try:
        import numpy as np
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError("--data imagefolder reads images with pillow, which is not installed.\n"
                        "  Install it: pip install pillow") from error  # fmt: skip
    files = [(path, index) for index, name in enumerate(classes) for path in _images(root / name)]
    if not files:
        raise DataError(f"--data {spec}: {sum(p.is_dir() for p in root.iterdir())} class folders in {root}, and no image in them.\n"
                        "  One folder per class, each with its images.")  # fmt: skip
    images: list[Tensor] = []
    for path, _ in files:
        try:
            with Image.open(path) as picture:
                mode = picture.mode if picture.mode in ("L", "RGB") else "RGB"
                pixels = np.asarray(picture.convert(mode))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}.\n  Remove or replace it.") from error
        images.append(torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1))
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"{path} is {tuple(images[-1].shape)} (height, width, channels), {files[0][0].name} is "
                f"{tuple(images[0].shape)}: one batch needs one size.\n  Resize the images to one size first."
            )
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255, torch.tensor([index for _, index in files])


# ---------------------------------------------------------------- checks and split
def _check(spec: str, inputs: Tensor, labels: Tensor | None) -> None:
    if not len(inputs):
        raise DataError(f"--data {spec} is empty: its inputs have shape {tuple(inputs.shape)}.\n  At least two rows.")
    if len(inputs) < 2:
        raise DataError(f"--data {spec} has one row, which cannot be split into train and test.\n  At least two rows.")
    if labels is not None and len(labels) != len(inputs):
        raise DataError(f"--data {spec} has {len(inputs)} inputs and {len(labels)} labels.\n  One label per row.")
    if inputs.is_floating_point() and not inputs.isfinite().all():
        bad = (~inputs.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise DataError(f"--data {spec}: {len(bad)} of {len(inputs)} rows hold NaN or infinity, row {int(bad[0])} is "
                        "the first.\n  Clean the data first.")  # fmt: skip


def _split(rows: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(train rows, test rows), both non-empty, shuffled by `seed`."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    tests = min(max(1, round(rows * share)), rows - 1)
    return order[tests:], order[:tests]
