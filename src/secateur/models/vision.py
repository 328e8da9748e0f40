"""Models of torchvision and timm by name, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError


def import_torchvision() -> Any:
    """torchvision, also where its compiled operators do not fit this torch: the classification and segmentation
    models need none of them, but the import declares shapes for two, which then must exist."""
    try:
        import torchvision
    except ImportError as error:
        raise ModelError("torchvision/NAME needs torchvision, which is not installed.\n"
                         "  Install it: pip install torchvision") from error  # fmt: skip
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                signature = f"torchvision::{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(signature.split("(")[0], "(" + signature.split("(", 1)[1])
        import torchvision
    return torchvision


def torchvision_model(name: str, spec: str) -> tuple[nn.Module, tuple | None]:
    """(the builder's model with random weights, example inputs; None for detectors and optical flow)."""
    models = import_torchvision().models
    if name not in models.list_models():
        raise ModelError(_unknown(spec, name, models.list_models()))
    options: dict[str, Any] = {"weights": None}
    group = models.get_model_builder(name).__module__.split(".")[2]
    if group in ("segmentation", "detection"):
        options["weights_backbone"] = None
    model = models.get_model(name, **options)
    if hasattr(model, "aux_logits"):  # a second head that only training uses
        model.aux_logits = False
    if group == "video":
        return model, (torch.randn(1, 3, 16, *((224, 224) if "mvit" in name else (112, 112))),)
    if group in ("detection", "optical_flow"):
        return model, None
    side = {"inception_v3": 299, "vit_h_14": 224}.get(name, 224)
    return model, (torch.randn(1, 3, side, side),)


def timm_model(name: str, spec: str) -> tuple[nn.Module, tuple | None]:
    """(the model with random weights, one image of its configured size)."""
    try:
        import_torchvision()
        import timm
    except (ImportError, ModelError) as error:
        raise ModelError("timm/NAME needs timm and torchvision, which are not both installed.\n"
                         "  Install them: pip install timm torchvision") from error  # fmt: skip
    if name not in timm.list_models():
        raise ModelError(_unknown(spec, name, timm.list_models()))
    model = timm.create_model(name, pretrained=False)
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    return model, (torch.randn(1, *size),)


def _unknown(spec: str, name: str, names: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, names, 3) or names[:3]
    return f"{spec}: there is no {name!r} among {len(names)} models.\n  Near it: {', '.join(close)}."
