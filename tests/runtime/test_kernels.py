"""Every kernel against a plain loop in float64, for every instruction set that runs here, and shapes that fit no tile."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.runtime.decode import packed, unpacked
from secateur.runtime.layout import Layout

ISAS = (0, 1, 2)  # the best there is, the baseline, AVX2


@pytest.fixture(scope="module", autouse=True)
def _kernels(kernels):
    return kernels


def matrix(rows, columns, zeros, r, seed=0):
    """Zeros in blocks of r rows; the first block full and the second empty, where there are so many."""
    random = torch.Generator().manual_seed(seed)
    blocks = -(-rows // r)
    stays = torch.rand(blocks, 1, columns, generator=random) >= zeros
    if blocks > 2:
        stays[0], stays[1] = True, False
    return (torch.randn(blocks, r, columns, generator=random) * stays).view(blocks * r, columns)[:rows]


def by_loop(w, x, bias):
    y = torch.zeros(len(x), len(w), dtype=torch.float64)
    for t, o in itertools.product(range(len(x)), range(len(w))):
        total = float(bias[o])
        for k in range(w.shape[1]):
            total += float(w[o, k]) * float(x[t, k])
        y[t, o] = total
    return y


def linear(layout, x, bias=None, relu=False, isa=0):
    return torch.ops.secateur.sparse_linear(
        x, layout.values, layout.index, layout.starts, bias, layout.rows, layout.columns, layout.r, layout.set, relu, isa
    )  # fmt: skip


def conv(layout, x, window, bias=None, relu=False, isa=0, plus=None):
    return torch.ops.secateur.sparse_conv2d(
        x, layout.values, layout.index, layout.starts, bias, plus, layout.rows, layout.columns, layout.r, layout.set, relu, window, isa
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("r", [1, 4, 8])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 1), (3, 5, 2), (2, 13, 40), (70, 3, 9), (5, 8, 1)])
def test_linear_is_the_plain_loop(tokens, rows, columns, r, isa):
    w, x, bias = matrix(rows, columns, 0.5, r), torch.randn(tokens, columns), torch.randn(rows)
    found = linear(Layout.of(w, r, 16), x, bias, isa=isa)
    torch.testing.assert_close(found.double(), by_loop(w, x, bias), rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 150), st.integers(1, 200), st.sampled_from([1, 4, 8]), st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([16, 100, 65536]), st.sampled_from(ISAS), st.booleans(),
)  # fmt: skip
def test_linear_is_the_dense_product_for_any_shape(tokens, rows, columns, r, zeros, columns_of_set, isa, relu):
    w, x, bias = matrix(rows, columns, zeros, r), torch.randn(tokens, columns), torch.randn(rows)
    found = linear(Layout.of(w, r, columns_of_set), x, bias, relu, isa)
    wanted = F.linear(x.double(), w.double(), bias.double())
    torch.testing.assert_close(found.double(), wanted.relu() if relu else wanted, rtol=0, atol=1e-5 * (1 + float(wanted.abs().max())))


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 11), st.tuples(st.integers(1, 40), st.integers(1, 40)), SIZES,
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(0, 3), st.integers(0, 3)), SIZES, st.sampled_from([1, 4, 8]),
    st.sampled_from([3, 64]), st.booleans(), st.booleans(), st.sampled_from(ISAS),
)  # fmt: skip
def test_convolution_is_the_dense_one_for_any_window(images, channels, filters, size, kernel, stride, padding, dilation, r, each, relu, added, isa):
    if any(n + 2 * p < d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        return
    w, x, bias = matrix(filters, channels * kernel[0] * kernel[1], 0.5, r), torch.randn(images, channels, *size), torch.randn(filters)
    wanted = F.conv2d(x.double(), w.double().view(filters, channels, *kernel), bias.double(), stride, padding, dilation)
    plus = torch.randn(wanted.shape) if added else None
    found = conv(Layout.of(w, r, each * kernel[0] * kernel[1]), x, [*kernel, *stride, *padding, *dilation], bias, relu, isa, plus)
    wanted = wanted if plus is None else wanted + plus
    wanted = wanted.relu() if relu else wanted
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 * (1 + float(wanted.abs().max())))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("r", [1, 4, 8])
def test_one_pixel_windows_write_their_pixels_and_no_others(r, isa):
    w = matrix(9, 5, 0.3, r)
    layout = Layout.of(w, r, 2)  # three sets of columns
    for pixels in range(1, 200):
        x, plus = torch.randn(1, 5, 1, pixels), torch.randn(1, 9, 1, pixels)
        found = conv(layout, x, [1, 1, 1, 1, 0, 0, 1, 1], isa=isa, plus=plus)
        wanted = F.conv2d(x.double(), w.double().view(9, 5, 1, 1)) + plus
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_a_large_image_is_worked_on_in_stretches(isa):
    w, x = matrix(12, 70 * 9, 0.7, 4), torch.randn(2, 70, 61, 67)
    found = conv(Layout.of(w, 4, 32 * 9), x, [3, 3, 1, 1, 1, 1, 1, 1], relu=True, isa=isa)
    wanted = F.conv2d(x.double(), w.double().view(12, 70, 3, 3), padding=1).relu()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 200), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.booleans(), st.sampled_from(ISAS))
def test_decoding_is_the_dense_product_for_any_shape(tokens, rows, columns, zeros, half, isa):
    w = matrix(rows, columns, zeros, 1).to(torch.bfloat16 if half else torch.float32)
    values, masks, starts = packed(w)
    assert torch.equal(unpacked(values, masks, (rows, columns)), w) and len(values) == int((w != 0).sum()) + 32
    x, bias = torch.randn(tokens, columns), torch.randn(rows)
    found = torch.ops.secateur.sparse_decode(x, values, masks, starts, bias, rows, columns, isa)
    wanted = F.linear(x.double(), w.double(), bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 * (1 + float(wanted.abs().max())))


WRONG = {
    "a bit too many": lambda a: {**a, "masks": a["masks"] | 0x7FFFFFFF},
    "a bit too few": lambda a: {**a, "masks": a["masks"] & 0x7FFFFF00},
    "starts past the end": lambda a: {**a, "starts": a["starts"] + 1},
    "starts that go back": lambda a: {**a, "starts": torch.tensor([0, a["starts"][2] + 5, a["starts"][2]])},
    "no room to read": lambda a: {**a, "values": a["values"][:-1].clone()},
    "masks of another shape": lambda a: {**a, "masks": a["masks"][:-8].clone()},
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("isa", ISAS)
def test_masks_and_values_that_do_not_belong_together_are_refused(name, isa):
    values, masks, starts = packed(matrix(13, 70, 0.5, 1))
    good = {"x": torch.randn(1, 70), "values": values, "masks": masks, "starts": starts, "bias": None, "rows": 13, "columns": 70, "isa": isa}
    torch.ops.secateur.sparse_decode(**good)
    with pytest.raises(RuntimeError, match="secateur"):
        torch.ops.secateur.sparse_decode(**WRONG[name](good))


def test_threads_give_the_same_bits():
    w, x = matrix(50, 300, 0.6, 4), torch.randn(90, 300)
    layout, image = Layout.of(w, 4), torch.randn(3, 12, 20, 20)
    small = Layout.of(matrix(9, 12 * 9, 0.5, 1), 1)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append((linear(layout, x), conv(small, image, [3, 3, 1, 1, 1, 1, 1, 1])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))


def test_nan_goes_through_a_rectifier_and_inputs_may_lie_anywhere():
    w = matrix(6, 10, 0.0, 1)
    x = torch.randn(4, 11)[:, 1:].contiguous()
    line = torch.randn(41)[1:].view(4, 10)  # not aligned
    x[2, 3] = torch.nan
    found = linear(Layout.of(w, 1), x, relu=True)
    assert torch.equal(found[2].isnan(), w[:, 3] != 0) and not found[[0, 1, 3]].isnan().any()
    assert (linear(Layout.of(w, 1), torch.full((2, 10), -torch.inf), relu=True).nan_to_num(-1) >= -1).all()
    torch.testing.assert_close(linear(Layout.of(w, 4), line), F.linear(line, w), rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [1, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (17, 65), (8, 1000)])
def test_a_layout_is_the_matrix_and_nothing_more(shape, r):
    w = matrix(*shape, 0.7, r)
    layout = Layout.of(w, r, 64)
    assert torch.equal(layout.dense(), w)
    blocks = torch.cat([w, w.new_zeros(-len(w) % r, shape[1])]).view(-1, r, shape[1])
    assert len(layout.index) == int((blocks != 0).any(1).sum())


BAD = {
    "values": lambda a: {**a, "values": a["values"][:-1].clone()},
    "starts past the end": lambda a: {**a, "starts": a["starts"] + 1},
    "starts that go back": lambda a: {**a, "starts": a["starts"].flip(0).contiguous()},
    "a column too high": lambda a: {**a, "index": torch.full_like(a["index"], 10)},
    "a negative column": lambda a: {**a, "index": torch.full_like(a["index"], -1)},
    "another input": lambda a: {**a, "x": torch.randn(3, 9)},
    "float64": lambda a: {**a, "x": a["x"].double()},
    "strides": lambda a: {**a, "x": torch.randn(10, 3).t()},
    "no such block": lambda a: {**a, "r": 3},
    "a short bias": lambda a: {**a, "bias": torch.zeros(2)},
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_belong_together_is_refused(name):
    layout = Layout.of(matrix(6, 10, 0.3, 1), 1)
    good = {"x": torch.randn(3, 10), "values": layout.values, "index": layout.index, "starts": layout.starts, "bias": None, "rows": 6, "columns": 10,
            "r": 1, "set": layout.set, "relu": False}  # fmt: skip
    torch.ops.secateur.sparse_linear(**good)
    with pytest.raises(RuntimeError, match="secateur"):
        torch.ops.secateur.sparse_linear(**BAD[name](good))


@pytest.mark.parametrize("window", [[3, (2**64 + 2) // 3, 1, 1, 1, (2**64 + 2) // 6, 1, 1], [1, 1, 2**40, 2**40, 0, 0, 1, 1]])
def test_windows_that_cannot_be_counted_are_refused(window):
    empty = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="secateur"):
        torch.ops.secateur.sparse_conv2d(
            torch.randn(1, 1, 1, 1), torch.zeros(0, 1), torch.zeros(0, dtype=torch.int16), empty, None, None, 1, 1, 1, 2, False, window
        )  # fmt: skip


def test_sets_are_never_larger_than_a_column_number():
    w = matrix(2, 70_000, 0.9, 1)
    assert torch.equal(Layout.of(w, 1, 70_000).dense(), w)
    x = torch.randn(3, 70_000)
    torch.testing.assert_close(linear(Layout.of(w, 1, 70_000), x).double(), F.linear(x.double(), w.double()), rtol=0, atol=1e-2)


@settings(max_examples=80, deadline=None)
@given(st.tuples(st.integers(1, 70), st.integers(1, 70)), SIZES, SIZES, st.tuples(st.integers(0, 2), st.integers(0, 2)), SIZES, st.sampled_from(ISAS))
def test_the_largest_of_a_window_is_torchs(size, kernel, stride, padding, dilation, isa):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    if any(n + 2 * p < d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        return
    x = torch.randn(2, 3, *size)
    x[x > 2.5] = float("nan")
    found = torch.ops.secateur.max_pool2d(x, [*kernel, *stride, *padding, *dilation], isa)
    torch.testing.assert_close(found, F.max_pool2d(x, kernel, stride, padding, dilation), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [2**63 - 1, 2**40, 2**62])
def test_sizes_that_cannot_be_counted_are_refused(rows):
    empty = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="secateur"):
        torch.ops.secateur.sparse_linear(torch.randn(1, 1), torch.zeros(0, 8), torch.zeros(0, dtype=torch.int16), empty, None, rows, 1, 8, 1, False)
    with pytest.raises(RuntimeError, match="secateur"):
        masks, starts = torch.zeros(8, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        torch.ops.secateur.sparse_decode(torch.randn(1, 1), torch.zeros(32), masks, starts, None, rows, 1)


def test_steps_of_a_chain_that_name_what_is_not_there_are_refused():
    layout, x = Layout.of(matrix(4, 27, 0.5, 1), 1), torch.randn(1, 3, 5, 5)
    weights, step = [layout.values, layout.index, layout.starts], [0, -1, 0, 1, 2, -1, 4, 27, 1, layout.set, 0, 3, 3, 1, 1, 1, 1, 1, 1]
    (found,) = torch.ops.secateur.sparse_chain([x], weights, step, [1])
    torch.testing.assert_close(found, conv(layout, x, step[11:]), rtol=0, atol=0)
    for place, wrong in ((0, 1), (0, -1), (1, 5), (2, 3), (3, -2), (5, 3)):
        with pytest.raises(RuntimeError, match="secateur"):
            torch.ops.secateur.sparse_chain([x], weights, [wrong if i == place else n for i, n in enumerate(step)], [1])
    for steps, results in ((step[:-1], [1]), (step, [2]), (step, [-1])):
        with pytest.raises(RuntimeError, match="secateur"):
            torch.ops.secateur.sparse_chain([x], weights, steps, results)
