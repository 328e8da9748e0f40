"""A segmentation net of the U-Net kind: what comes down is joined with what goes up, so both sides lose channels together."""

import torch
from show import settled, show
from torch import nn

import secateur as sc


def double(i, o):
    """Two convolutions, each with norm and rectifier."""
    layers = [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """(B, 3, H, W) -> (B, classes, H, W), H and W divisible by 8. After Ronneberger, Fischer & Brox 2015."""

    def __init__(self, classes=4, c=16):
        super().__init__()
        widths = [c, 2 * c, 4 * c, 8 * c]
        self.down = nn.ModuleList([double(i, o) for i, o in zip([3, *widths], widths, strict=False)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * o, o, 2, 2) for o in widths[-2::-1]])
        self.join = nn.ModuleList([double(2 * o, o) for o in widths[-2::-1]])
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(c, classes, 1)

    def forward(self, x):
        kept = []
        for i, layer in enumerate(self.down):
            x = layer(self.pool(x) if i else x)
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return self.head(x)


torch.manual_seed(0)
x = torch.randn(2, 3, 64, 64)
model = settled(UNet(), x)

# Two budgets at once; both are met, widths in multiples of 8. The memory of feature maps is what a segmentation net often runs out of.
result = sc.prune(model, (x,), sc.MACs(at_most="50%"), sc.PeakMemory(at_most="60%"))

show("U-Net, 64x64 pixels", model, result.model, (x,), result.proof)
before, after = sc.measure(model, (x,), rounds=2).peak_bytes, sc.measure(result.model, (x,), rounds=2).peak_bytes
print(f"  peak memory {before:,} -> {after:,} bytes ({100 * after / before:.1f} %)")
