"""A YOLO-type detector: what follows its heads depends on data and cannot be captured, so its traceable part is pruned and put back."""

import torch
from show import settled, show
from torch import nn
from yolo import Cross, Head, Pools, conv

import secateur as sc


class Pyramid(nn.Module):
    """Backbone, neck and heads. (B, 3, H, W) -> sides (B, 4, N), scores (B, classes, N) of strides 8, 16, 32."""

    def __init__(self, c=16, classes=5):
        super().__init__()
        self.a = nn.Sequential(conv(3, c, 3, 2), conv(c, 2 * c, 3, 2), Cross(2 * c, 2 * c), conv(2 * c, 4 * c, 3, 2), Cross(4 * c, 4 * c, 2))
        self.b = nn.Sequential(conv(4 * c, 8 * c, 3, 2), Cross(8 * c, 8 * c, 2))
        self.c = nn.Sequential(conv(8 * c, 16 * c, 3, 2), Cross(16 * c, 16 * c), Pools(16 * c))
        self.up, self.out16 = nn.Upsample(scale_factor=2), Cross(24 * c, 8 * c, residual=False)
        self.out8, self.down8 = Cross(12 * c, 4 * c, residual=False), conv(4 * c, 4 * c, 3, 2)
        self.mid16, self.down16 = Cross(12 * c, 8 * c, residual=False), conv(8 * c, 8 * c, 3, 2)
        self.mid32, self.heads = Cross(24 * c, 16 * c, residual=False), nn.ModuleList([Head(n * c, classes) for n in (4, 8, 16)])

    def forward(self, x):
        p8 = self.a(x)
        p16 = self.b(p8)
        p32 = self.c(p16)
        p16 = self.out16(torch.cat([self.up(p32), p16], 1))
        p8 = self.out8(torch.cat([self.up(p16), p8], 1))
        p16 = self.mid16(torch.cat([self.down8(p8), p16], 1))
        p32 = self.mid32(torch.cat([self.down16(p16), p32], 1))
        found = [head(p) for head, p in zip(self.heads, (p8, p16, p32), strict=True)]
        return torch.cat([sides for sides, _ in found], 2), torch.cat([scores for _, scores in found], 2)


class Detector(nn.Module):
    """Images -> for each of them the sides and the class of what scores above one half: as many rows as there are."""

    def __init__(self):
        super().__init__()
        self.pyramid = Pyramid()

    def forward(self, x):
        sides, scores = self.pyramid(x)
        best, kind = scores.sigmoid().max(1)
        return [(side[:, sure].T, k[sure]) for side, k, sure in zip(sides, kind, best > 0.5, strict=True)]


torch.manual_seed(0)
x = torch.randn(2, 3, 128, 128)
detector = settled(Detector(), x)
(part,) = sc.parts(detector, (x,))  # the largest modules that can be captured, with the inputs they were called with
result = sc.prune(part.module, part.args, sc.MACs(at_most="50%"))
pruned = part.put(detector, result.model)

show(f"detector, its {part.name!r}", detector, pruned, (x,), result.proof)
print(f"  {type(result.model).__name__} again, put back; boxes of the two images: {[len(kinds) for _, kinds in pruned(x)]}")
