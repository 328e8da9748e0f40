"""CIFAR-10 and its reference networks from the data folder (`$SECATEUR_DATA`, default `../shared/data`).

The folder's own README describes the files; the network code is imported from its `reference_models.py`, not copied.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def folder() -> Path:
    """The data folder; FileNotFoundError with what to set when it is not there."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("SECATEUR_DATA", default))
    if not (path / "reference_models.py").exists():
        raise FileNotFoundError(f"no data in {path}: set SECATEUR_DATA to the folder that holds reference_models.py")
    return path


def reference_models() -> ModuleType:
    """The data folder's `reference_models.py` as a module."""
    spec = importlib.util.spec_from_file_location("reference_models", folder() / "reference_models.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import reference_models.py from {folder()}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resnet56() -> nn.Module:
    """A new CIFAR-10 ResNet-56 with zero-padding shortcuts, not yet filled with weights."""
    return reference_models().CifarResNet(56)


def trained_resnet56() -> nn.Module:
    """The published ResNet-56 (93.39 % on the 10,000 test images), in eval mode."""
    model = resnet56()
    reference_models().load(model, str(folder() / "cifar10_resnet56.safetensors"))
    return model.eval()


def pixels(file: str, first: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of `cifar10_{file}.npz`; only the `first` N."""
    with np.load(folder() / f"cifar10_{file}.npz") as archive:
        residual, label = archive["residual"][:, :first].copy(), archive["label"][:first].astype(np.int64)
    residual[:, :, :, 0] = np.cumsum(residual[:, :, :, 0], axis=2, dtype=np.uint8)
    raw = np.cumsum(residual, axis=3, dtype=np.uint8)
    raw[0] += raw[1]
    raw[2] += raw[1]
    return torch.from_numpy(raw.transpose(1, 0, 2, 3).copy()), torch.from_numpy(label)


def normalised(raw: Tensor) -> Tensor:
    """uint8 images (N, 3, 32, 32) as the published ResNets take them, float32."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return raw.float().div_(255).sub_(mean).div_(std)


def images(file: str, first: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 32, 32) float32 and labels (N,) int64 of `cifar10_{file}.npz`; only the `first` N."""
    raw, label = pixels(file, first)
    return normalised(raw), label


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 500) -> float:
    """Percentage of images whose largest output is the label; eval mode where the module has one."""
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch), y.split(batch), strict=True))
    return 100 * right / len(y)
