"""One small member of every timm family (more where members of one family differ in structure)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import torchvision_models

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

# Convolutional, any image size: 64 pixels.
CONVOLUTIONAL = """
convnext_atto convnextv2_atto cspresnet50 cs3darknet_s darknet53 cspnext_tiny densenet121 dla34 dla60_res2net dpn68
efficientnet_b0 tf_efficientnetv2_b0 mixnet_s mobilenetv2_050 mnasnet_050 fbnetc_100 efficientnet_es
ghostnet_050 ghostnetv2_100 hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small lcnet_050
mobilenetv3_small_050 mobilenetv4_conv_small_050 tinynet_e nasnetalarge pnasnet5large dm_nfnet_f0 eca_nfnet_l0
nf_regnet_b0 nf_resnet26 regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvgg_a0 mobileone_s0 gernet_s
res2net50_14w_8s resnest14d resnet10t resnet50 seresnet18 ecaresnet26t resnext50_32x4d resnetv2_50
resnetv2_50x1_bit rexnet_100 selecsls42 legacy_seresnet18 skresnet18 tresnet_m vgg11_bn ese_vovnet19b_slim_dw
legacy_xception xception41 rdnet_tiny fasternet_t0 starnet_s050 mambaout_femto convmixer_768_32 poolformer_s12
edgenext_xx_small repvit_m0_9 efficientvit_b0 resnet33ts gcresnet33ts sebotnet33ts_256 csatv2 cpubone_nano
""".split()
# Position tables, windows or token mixers of one size: the model's own input size.
NATIVE = """
beit_base_patch16_224 botnet26t_256 halonet26t lambda_resnet26t cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny
crossvit_9_240 davit_tiny deit_tiny_distilled_patch16_224 deit3_small_patch16_224 efficientformer_l1
efficientformerv2_s0 efficientvim_m1 efficientvit_m0 eva02_tiny_patch14_224 vit_small_patch16_rope_224 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny hiera_tiny_224 sam2_hiera_tiny iformer_t levit_128s lowformer_b0 maxvit_pico_rw_256
coatnet_pico_rw_224 maxxvit_rmlp_nano_rw_256 caformer_s18 convformer_s18 mixer_s32_224 gmlp_ti16_224 gmixer_12_224
resmlp_12_224 mobilenetv4_hybrid_medium mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small pit_ti_224
pvt_v2_b0 sequencer2d_s shvit_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 twins_svt_small twins_pcpvt_small visformer_tiny
vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224
volo_d1_224 xcit_nano_12_p16_224 flexivit_small beitv2_base_patch16_224
""".split()
SIZES = {
    "inception_v3": 96,
    "inception_v4": 96,
    "inception_resnet_v2": 96,
    "nasnetalarge": 96,
    "pnasnet5large": 96,
    "legacy_xception": 96,
    "csatv2": 128,
    "sebotnet33ts_256": 256,
}


def model(name: str, size: int | None) -> Built:
    """A timm model and a batch of two images of `size` pixels (the model's own size when None)."""
    torchvision_models.library()
    import timm

    net = timm.create_model(name, pretrained=False)
    side = size or net.default_cfg["input_size"][-1]
    return net, (torch.randn(2, 3, side, side),), {}


def rows() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    """(name, kind, builder) of every timm model of the suite."""
    for name in CONVOLUTIONAL:
        yield f"timm/{name}", "timm", partial(model, name, SIZES.get(name, 64))
    for name in NATIVE:
        yield f"timm/{name}", "timm", partial(model, name, SIZES.get(name))
