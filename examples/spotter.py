"""The network and the recordings of `keyword_spotter.py`: MLPerf Tiny's, from the folder SECATEUR_DATA; random where there is none."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from show import settled
from torch import nn

from secateur.models.data import Batches, Data


class Spotter(nn.Module):
    """Depthwise-separable convolutions over (B, 1, 49, 10) features, after Zhang et al. 2017 (Hello Edge). (B, 12) class scores."""

    def __init__(self, classes=12, c=64):
        super().__init__()
        norm = nn.BatchNorm2d(c, eps=1e-3)
        stem = {"pad": nn.ZeroPad2d((1, 1, 4, 5)), "0": nn.Conv2d(1, c, (10, 4), 2), "1": norm, "2": nn.ReLU()}
        self.stem, self.body = nn.Sequential(OrderedDict(stem)), nn.Sequential(*[self.pair(c) for _ in range(4)])
        self.fc = nn.Linear(c, classes)

    @staticmethod
    def pair(c):
        first = [nn.Conv2d(c, c, 3, padding=1, groups=c), nn.BatchNorm2d(c, eps=1e-3), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(c, c, 1), nn.BatchNorm2d(c, eps=1e-3), nn.ReLU())

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def trained():
    """The network and its data: every second recording calibrates, the others measure."""
    folder, model = os.environ.get("SECATEUR_DATA"), Spotter()
    if folder is None:
        x, y = torch.randn(120, 1, 49, 10), torch.randint(0, 12, (120,))
        model = settled(model, x)
    else:
        model.load_state_dict(load_file(Path(folder) / "tiny_kws_dscnn.safetensors"))
        held = np.load(Path(folder) / "speech_commands_mfcc_1000.npz")
        x = (torch.from_numpy(held["mfcc"])[:, None].float() - float(held["zero_point"])) * float(held["scale"])
        y = torch.from_numpy(held["label"]).long()
    return model.eval(), Data("keywords", Batches(x[::2]), Batches(x[1::2], y[1::2]), labelled=True)
