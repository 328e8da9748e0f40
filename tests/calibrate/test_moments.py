"""Streamed moments are those of all rows at once, and rows of patches are those that torch unfolds."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from secateur.calibrate.moments import Moments, begun, patches, variance
from secateur.processes import ALONE


def rows_of(groups=1, rows=60, features=4, outputs=3, offset=0.0):
    random = torch.Generator().manual_seed(5)
    x = torch.randn(groups, rows, features, generator=random) @ torch.randn(groups, features, features, generator=random) + offset
    t = x[:, :, :1] * 0.5 + torch.randn(groups, rows, outputs, generator=random)
    return x, t


def streamed(x, t, sizes):
    m = Moments(x.shape[0], x.shape[2], t.shape[2])
    for a, b in zip(x.split(sizes, 1), t.split(sizes, 1), strict=True):
        m.add(a, b)
    return m


def plain(x, t):
    """Everything that moments say, by numpy in float64 over all rows, group by group."""
    means, a, b, tt = [], [], [], []
    for x_g, t_g in zip(x.double().numpy(), t.double().numpy(), strict=True):
        both = np.cov(np.concatenate([x_g, t_g], 1).T, ddof=0)
        d = x_g.shape[1]
        means.append((x_g.mean(0), t_g.mean(0)))
        a.append(both[:d, :d])
        b.append(both[:d, d:])
        tt.append(np.diag(both)[d:])
    mean = tuple(torch.from_numpy(np.stack(m)) for m in zip(*means, strict=True))
    return mean, tuple(torch.from_numpy(np.stack(v)) for v in (a, b, tt))


def check_same(m, x, t, **how):
    means, central = plain(x, t)
    for one, two in zip((*m.mean(), *m.central()), (*means, *central), strict=True):
        torch.testing.assert_close(one, two, **({"rtol": 1e-4, "atol": 1e-5} | how))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("sizes", [[60], [1, 59], [20, 20, 20], [7, 13, 1, 39], [1] * 60])
def test_any_split_gives_the_moments_of_all_rows(groups, sizes):
    x, t = rows_of(groups)
    m = streamed(x, t, sizes)
    assert m.rows == 60
    check_same(m, x, t)


def test_a_large_offset_does_not_cancel():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4000, 3, generator=random) + 1e4
    t = torch.randn(1, 4000, 2, generator=random) - 1e4
    m = streamed(x, t, [1000] * 4)
    check_same(m, x, t, rtol=1e-3, atol=1e-3)
    assert (torch.diagonal(m.central()[0], dim1=1, dim2=2) - 1).abs().max() < 0.1


def test_held_out_rows_can_be_added():
    x, t = rows_of()
    fit, held = Moments(1, 4, 3), Moments(1, 4, 3)
    begun("a layer", ALONE, (x[:, :15], t[:, :15]), fit, held)
    for m, rows in ((fit, slice(0, 15)), (fit, slice(15, 40)), (held, slice(40, 50)), (held, slice(50, 60))):
        m.add(x[:, rows], t[:, rows])
    check_same(fit, x[:, :40], t[:, :40])
    check_same(held, x[:, 40:], t[:, 40:])
    torch.testing.assert_close(variance(fit, held), t.double().var(1, correction=0), rtol=1e-5, atol=1e-6)


def test_raw_moments_are_around_zero():
    x, t = rows_of(2, offset=3.0)
    a, b, tt = streamed(x, t, [30, 30]).raw()
    x, t = x.double(), t.double()
    for g in range(2):
        torch.testing.assert_close(a[g], x[g].T @ x[g] / 60, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b[g], x[g].T @ t[g] / 60, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tt[g], (t[g] ** 2).mean(0), rtol=1e-4, atol=1e-4)


def unfolded(x, kernel, stride, padding, dilation):
    """Patches by an explicit loop over output positions, in any number of dimensions."""
    n = len(kernel)
    x = F.pad(x, [p for q in reversed(padding) for p in (q, q)])
    sizes = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(n)]
    out = []
    for sample in x:
        for place in np.ndindex(*sizes):
            row = torch.stack([
                sample[(slice(None), *(place[i] * stride[i] + k[i] * dilation[i] for i in range(n)))] for k in np.ndindex(*kernel)
            ], 1)  # fmt: skip
            out.append(row)
    return torch.stack(out)


WINDOWS_2D = [
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((5, 5), (1, 1), (2, 2), (1, 1)),
    ((3, 1), (1, 2), (1, 0), (1, 1)),
    ((2, 3), (3, 1), (0, 2), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((1, 5), (2, 2), (0, 4), (1, 2)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("window", WINDOWS_2D, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "a view"])
def test_patches_are_what_unfold_gives(window, layout):
    kernel, stride, padding, dilation = window
    x = torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last) if layout == "channels last" else x.transpose(2, 3) if layout == "a view" else x
    want = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).reshape(-1, 3, kernel[0] * kernel[1])
    got = patches(x, list(kernel), list(stride), list(padding), list(dilation), None)
    assert torch.equal(got, want)


WINDOWS = [
    ((9,), (3,), (1,), (1,), (1,)),
    ((9,), (5,), (2,), (3,), (2,)),
    ((5, 4, 6), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((5, 4, 6), (1, 2, 3), (2, 1, 2), (0, 1, 2), (1, 2, 1)),
]


@pytest.mark.parametrize("row", WINDOWS, ids=str)
def test_patches_of_one_and_three_dimensions(row):
    space, kernel, stride, padding, dilation = row
    x = torch.randn(2, 3, *space, generator=torch.Generator().manual_seed(1))
    want = unfolded(x, kernel, stride, padding, dilation)
    got = patches(x, list(kernel), list(stride), list(padding), list(dilation), None)
    assert torch.equal(got, want)


@pytest.mark.parametrize("row", [*WINDOWS, *(((8, 7), *w) for w in WINDOWS_2D)], ids=str)
def test_sampled_positions_are_the_same_rows(row):
    space, kernel, stride, padding, dilation = row
    x = torch.randn(3, 2, *space, generator=torch.Generator().manual_seed(1))
    every = patches(x, list(kernel), list(stride), list(padding), list(dilation), None)
    places = len(every) // 3
    at = torch.randperm(places, generator=torch.Generator().manual_seed(2))[: max(1, places // 2)]
    some = patches(x, list(kernel), list(stride), list(padding), list(dilation), at)
    assert torch.equal(some.reshape(3, len(at), 2, -1), every.reshape(3, places, 2, -1)[:, at])
