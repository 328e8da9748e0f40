"""What every example prints: the figures before and after, both timed in turns on one thread, and the proof."""

import torch
from torch import nn

from secateur.measure import at_rest, compare, count


def show(name, dense, pruned, args, proof, kwargs=None):
    """Print and return the costs (before, after)."""
    kwargs = kwargs or {}
    before, after = count(dense, args, kwargs), count(pruned, args, kwargs)
    with at_rest(dense), at_rest(pruned):
        timed = compare({"dense": lambda: dense(*args, **kwargs), "pruned": lambda: pruned(*args, **kwargs)}, rounds=5).seconds
    print(name)
    print(f"  MACs        {before.macs:,} -> {after.macs:,} ({100 * after.macs / before.macs:.1f} %)")
    print(f"  parameters  {before.params:,} -> {after.params:,} ({100 * after.params / before.params:.1f} %)")
    print(f"  time        {1e3 * timed['dense'].median:.2f} ms -> {1e3 * timed['pruned'].median:.2f} ms")
    print(f"  proof       at most {proof.max_error:.1e} away from the masked original, in float64 ({proof.tolerance:.0e} allowed)")
    return before, after


def settled(model, x):
    """Random weights whose batch norms have seen `x`: without it values fade from layer to layer, and a proof compares next to nothing."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
