"""Torchvision builders below 150 million parameters: classification, segmentation, video, flow, parts of detectors.

A detector filters boxes by data-dependent shapes, which no capture can follow. Its traceable part is taken instead:
backbone, neck and every head. Region pooling is stood in for by adaptive pooling of the whole feature map (one box that
covers the image), so the heads stay tied to the neck's channels as they are in the full detector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

CLASSIFICATION = """
alexnet convnext_tiny convnext_small convnext_base densenet121 densenet161 densenet169 densenet201 efficientnet_b0
efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0
mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_x_800mf regnet_x_1_6gf
regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf
regnet_y_8gf regnet_y_16gf regnet_y_32gf resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d
resnext101_32x8d resnext101_64x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
squeezenet1_0 squeezenet1_1 swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b vgg11 vgg11_bn vgg13 vgg13_bn vgg16
vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 wide_resnet50_2 wide_resnet101_2
""".split()
SEGMENTATION = """
deeplabv3_mobilenet_v3_large deeplabv3_resnet50 deeplabv3_resnet101 fcn_resnet50 fcn_resnet101
lraspp_mobilenet_v3_large
""".split()
VIDEO = "mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_t swin3d_s swin3d_b".split()
DETECTION = """
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn
fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2
retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large
""".split()
FLOW = "raft_small raft_large".split()

# Pixels a side. Transformers with fixed position tables or windows keep their own 224; the others run at 64.
NATIVE = ("vit_", "maxvit", "swin_t", "swin_v2_t")
SIZES = {"inception_v3": 96, "alexnet": 96}


def library() -> ModuleType:
    """torchvision, also where its compiled operators are missing: no model of the list needs them to be captured."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        define = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            define.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.definition = define  # type: ignore[attr-defined]  # dropped definitions are undone
        import torchvision
    import torchvision.models

    return torchvision.models


def classifier(name: str) -> Built:
    """A classification builder with a batch of two images."""
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = SIZES.get(name, 224 if name.startswith(NATIVE) else 64)
    return library().get_model(name, weights=None, **options), (torch.randn(2, 3, size, size),), {}


def segmenter(name: str) -> Built:
    """A segmentation builder with a batch of two images of 64 pixels."""
    model = library().segmentation.__dict__[name](weights=None, weights_backbone=None)
    return model, (torch.randn(2, 3, 64, 64),), {}


def video(name: str) -> Built:
    """A video builder; clips of 8 frames of 64 pixels where the architecture allows."""
    batch, frames, size = 2, 8, 64
    if name == "s3d" or name.startswith("mvit"):  # a head that pools 2 x 7 x 7; position tables of one size
        batch, frames, size = 1, 16, 224
    model = library().video.__dict__[name](weights=None)
    return model, (torch.randn(batch, 3, frames, size, size),), {}


def flow(name: str) -> Built:
    """RAFT with two refinement steps, the smallest legal image."""
    model = library().optical_flow.__dict__[name](weights=None)
    return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)), {"num_flow_updates": 2}


class DetectorParts(nn.Module):
    """Backbone, neck and heads of a torchvision detector, without anchors, box filtering and region sampling."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.two_stage = hasattr(detector, "rpn")
        if not self.two_stage:
            self.head = detector.head
            return
        self.rpn_head = detector.rpn.head
        self.box_head = detector.roi_heads.box_head
        self.box_predictor = detector.roi_heads.box_predictor
        for part in ("mask_head", "mask_predictor", "keypoint_head", "keypoint_predictor"):
            setattr(self, part, getattr(detector.roi_heads, part, None))

    def forward(self, images: torch.Tensor) -> Any:
        features = self.backbone(images)
        maps = [features] if isinstance(features, torch.Tensor) else list(features.values())
        if not self.two_stage:
            return self.head(maps)
        out = [*maps, self.rpn_head(maps), self.box_predictor(self.box_head(F.adaptive_avg_pool2d(maps[0], 7)))]
        if self.mask_head is not None:
            out.append(self.mask_predictor(self.mask_head(F.adaptive_avg_pool2d(maps[0], 14))))
        if self.keypoint_head is not None:
            out.append(self.keypoint_predictor(self.keypoint_head(F.adaptive_avg_pool2d(maps[0], 14))))
        return out[len(maps) :]


def detector(name: str) -> Built:
    """The traceable part of a detector with one batch of two small images."""
    model = library().detection.__dict__[name](weights=None, weights_backbone=None)
    size = 300 if name.startswith("ssd300") else 128
    return DetectorParts(model), (torch.randn(2, 3, size, size),), {}


def rows() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    """(name, kind, builder) of every torchvision model of the suite."""
    families = (
        ("classification", CLASSIFICATION, classifier),
        ("segmentation", SEGMENTATION, segmenter),
        ("video", VIDEO, video),
        ("detection", DETECTION, detector),
        ("flow", FLOW, flow),
    )
    for kind, names, make in families:
        for name in names:
            yield f"torchvision/{name}", kind, partial(make, name)
