"""A small YOLO-type detector, written from the papers, for `detector.py` to prune.

Cross-stage blocks (CSPNet, Wang et al. 2020) that keep the result of every step, pooling in a row (SPP, He et al. 2015), a neck that goes
down and up again (PANet, Liu et al. 2018), boxes and classes apart (YOLOX, Ge et al. 2021), box sides as distributions (GFL, Li et al. 2020).
"""

import torch
import torch.nn.functional as F
from torch import nn


def conv(i, o, k=1, s=1):
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Cross(nn.Module):
    """One half passes, the other goes step by step; all are joined. The steps are residual in the backbone."""

    def __init__(self, i, o, n=1, residual=True):
        super().__init__()
        self.residual, self.open, self.close = residual, conv(i, o), conv((2 + n) * (o // 2), o)
        self.steps = nn.ModuleList([nn.Sequential(conv(o // 2, o // 2, 3), conv(o // 2, o // 2, 3)) for _ in range(n)])

    def forward(self, x):
        kept = list(self.open(x).chunk(2, 1))
        for step in self.steps:
            kept.append(kept[-1] + step(kept[-1]) if self.residual else step(kept[-1]))
        return self.close(torch.cat(kept, 1))


class Pools(nn.Module):
    """Windows of 5, 9 and 13 as one pooling three times."""

    def __init__(self, c):
        super().__init__()
        self.open, self.close = conv(c, c // 2), conv(2 * c, c)

    def forward(self, x):
        kept = [self.open(x)]
        for _ in range(3):
            kept.append(F.max_pool2d(kept[-1], 5, 1, 2))
        return self.close(torch.cat(kept, 1))


class Head(nn.Module):
    """(B, c, H, W) -> distances to the four sides (B, 4, HW) in cells, class scores (B, classes, HW)."""

    def __init__(self, c, classes, bins=16):
        super().__init__()
        self.bins, self.box = bins, nn.Sequential(conv(c, 64, 3), conv(64, 64, 3), nn.Conv2d(64, 4 * bins, 1))
        self.score = nn.Sequential(conv(c, c, 3), conv(c, c, 3), nn.Conv2d(c, classes, 1))
        self.register_buffer("distances", torch.arange(bins, dtype=torch.float32))

    def forward(self, x):
        sides = self.box(x).view(len(x), 4, self.bins, -1).softmax(2)
        return (sides * self.distances.view(-1, 1)).sum(2), self.score(x).flatten(2)
