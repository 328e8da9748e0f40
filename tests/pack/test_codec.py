"""Every layout gives back the same bits, is what a slow twin writes, and is as small as the books say."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import InputError
from secateur.pack import pack, smallest, theory, unpack

from . import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8]
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PART = {"bitmask": "mask", "index": "index", "nm": "codes", "blocks": "mask"}


def bits(tensor):
    return tensor.contiguous().view(WHOLE[tensor.element_size()])


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def any_bits(shape, dtype, keep, seed):
    """Values of any bits at all: NaN with payloads, infinities, subnormals, -0; a share of them is kept, the others are 0."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    found = torch.randint(0, 256, (math.prod(shape) * size,), generator=draw, dtype=torch.uint8).view(WHOLE[size])
    if len(found) and dtype.is_floating_point:
        special = torch.tensor([-0.0, math.inf, -math.inf, math.nan, torch.finfo(dtype).smallest_normal / 4], dtype=dtype).view(WHOLE[size])
        hit = torch.rand(len(found), generator=draw) < 0.3
        found = torch.where(hit, special[torch.randint(0, 5, (len(found),), generator=draw)], found)
    stays = torch.rand(len(found), generator=draw) < keep
    return (found * stays).to(WHOLE[size]).view(dtype).reshape(shape)


shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=4),
    st.tuples(st.integers(1, 70), st.integers(1, 40)).map(list),
    st.sampled_from([[], [1], [0], [0, 5], [5, 0, 3], [1, 1], [300, 1], [1, 300], [7], [4, 4, 3, 3], [16, 8, 3, 3], [2000]]),
)
shares = st.sampled_from([0.0, 0.002, 0.05, 0.3, 0.5, 0.9, 1.0])
given_tensors = st.builds(any_bits, shapes, st.sampled_from(DTYPES), shares, st.integers(0, 10_000))


def in_groups(shape, n, m, axis, at_most, seed, dtype=torch.float32):
    """A tensor in which every whole group has n weights, or at most n, and what is left over any number."""
    draw = torch.Generator().manual_seed(seed)
    groups, rest = reference.walk(shape, axis, m)
    flat = torch.zeros(math.prod(shape))
    for group in groups:
        many = int(torch.randint(0, n + 1, (), generator=draw)) if at_most else n
        for i in torch.randperm(m, generator=draw)[:many].tolist():
            flat[group[i]] = 1 + i
    for i in rest:
        flat[i] = float(torch.rand((), generator=draw) < 0.5)
    return flat.reshape(shape).to(dtype)


# ---------------------------------------------------------------- the same bits
@given(given_tensors, st.sampled_from(["bitmask", "index", "dense"]), st.booleans())
def test_any_bits_come_back(tensor, layout, entropy):
    packed = pack(tensor, layout, entropy=entropy)
    assert packed.layout == layout and same(unpack(json.loads(json.dumps(packed.header)), packed.tensors), tensor)
    stored = packed.tensors["values"]
    assert len(stored) == (tensor.numel() if layout == "dense" else int((bits(tensor) != 0).sum())), "values are never padded"


@given(given_tensors, st.sampled_from([2, 3, 4, 8, 16, 9, 49, 64]), st.integers(0, 2), st.booleans())
def test_any_bits_come_back_out_of_blocks(tensor, size, axis, entropy):
    packed = pack(tensor, "blocks", size=size, axis=axis, entropy=entropy)
    assert same(unpack(packed.header, packed.tensors), tensor)


@given(given_tensors, st.booleans())
def test_the_smallest_comes_back_and_is_never_larger_than_dense(tensor, entropy):
    packed = smallest(tensor, entropy)
    assert same(unpack(packed.header, packed.tensors), tensor)
    assert packed.nbytes <= tensor.nbytes
    for layout in ("bitmask", "index"):
        assert packed.nbytes <= pack(tensor, layout, entropy=entropy).nbytes


NM = st.tuples(st.integers(1, 15), st.integers(2, 16)).filter(lambda p: p[0] < p[1])


@settings(max_examples=60)
@given(NM, st.lists(st.integers(0, 20), min_size=1, max_size=3), st.integers(0, 2), st.booleans(), st.integers(0, 99))
def test_every_n_of_m_comes_back(pattern, shape, axis, at_most, seed):
    n, m = pattern
    tensor = in_groups(shape, n, m, axis, at_most, seed)
    packed = pack(tensor, "nm", n=n, m=m, axis=axis)
    assert same(unpack(packed.header, packed.tensors), tensor)
    assert len(packed.tensors["values"]) == int((tensor != 0).sum())


def test_other_strides_and_gradients_and_dtypes():
    tensor = any_bits([6, 8], torch.float32, 0.2, 1)
    turned = tensor.t().requires_grad_()
    packed = smallest(turned)
    assert same(unpack(packed.header, packed.tensors), turned.detach().contiguous())
    assert same(unpack(**vars(smallest(tensor[:, 2:5]))), tensor[:, 2:5].contiguous())
    whole = torch.arange(5)
    assert smallest(whole).layout == "dense" and torch.equal(smallest(whole).tensors["values"], whole)
    assert torch.equal(unpack(**vars(smallest(whole))), whole)


def test_minus_zero_is_a_value():
    tensor = torch.tensor([0.0, -0.0, 1.0, 0.0])
    for layout in ("bitmask", "index"):
        packed = pack(tensor, layout)
        assert len(packed.tensors["values"]) == 2 and torch.signbit(unpack(packed.header, packed.tensors)).tolist() == [False, True, False, False]


# ---------------------------------------------------------------- what a slow twin writes
def agrees(tensor, layout, **how):
    packed = pack(tensor, layout, **how)
    mask = (bits(tensor) != 0).reshape(-1).tolist()
    wanted, stored = reference.LAYOUTS[layout](mask, tensor.shape, packed.header)
    assert packed.tensors[PART[layout]].tolist() == wanted
    flat = bits(tensor).reshape(-1).tolist()
    assert bits(packed.tensors["values"]).tolist() == [flat[i] for i, stays in enumerate(stored) if stays]
    return True


tiny = st.builds(any_bits, st.lists(st.integers(0, 6), max_size=4), st.sampled_from([torch.float32, torch.int8]), shares, st.integers(0, 999))


@given(tiny)
def test_the_bitmask_is_that_of_the_slow_twin(tensor):
    assert agrees(tensor, "bitmask")


@given(st.one_of(tiny, st.builds(any_bits, st.sampled_from([[3000], [255], [256], [254], [511], [2, 765]]), st.just(torch.int8),
                                 st.sampled_from([0.0, 0.0005, 0.002, 0.01]), st.integers(0, 999))))  # fmt: skip
def test_the_index_is_that_of_the_slow_twin(tensor):
    assert agrees(tensor, "index")


@pytest.mark.parametrize(("zeros", "wanted"), [(0, [0]), (254, [254]), (255, [255, 0]), (256, [255, 1]), (510, [255, 255, 0]), (600, [255, 255, 90])])
def test_escapes_of_the_index(zeros, wanted):
    tensor = torch.zeros(zeros + 1)
    tensor[-1] = 3.0
    assert pack(tensor, "index").tensors["index"].tolist() == wanted
    behind = torch.cat([tensor, torch.zeros(254)])
    assert pack(behind, "index").tensors["index"].tolist() == wanted
    assert pack(torch.cat([behind, torch.zeros(1)]), "index").tensors["index"].tolist() == [*wanted, 255], "zeros behind the last value count too"


@given(tiny, st.integers(2, 5), st.integers(0, 2))
def test_blocks_are_those_of_the_slow_twin(tensor, size, axis):
    assert agrees(tensor, "blocks", size=size, axis=axis)


@settings(max_examples=60)
@given(st.sampled_from([(2, 4), (1, 2), (1, 4), (3, 4), (2, 5), (4, 8)]), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 2), st.booleans(),
       st.integers(0, 99))  # fmt: skip
def test_codes_are_those_of_the_slow_twin(pattern, shape, axis, at_most, seed):
    tensor = in_groups(shape, *pattern, axis, at_most, seed, torch.int8)
    assert agrees(tensor, "nm", n=pattern[0], m=pattern[1], axis=axis)


# ---------------------------------------------------------------- how small it is
@pytest.mark.parametrize(("n", "m", "each"), [(2, 4, 3), (1, 4, 2), (4, 8, 7), (8, 16, 14), (1, 2, 1)])
def test_a_code_has_the_bits_of_its_logarithm(n, m, each):
    tensor = in_groups([16, 8 * m], n, m, 1, False, 0)
    packed = pack(tensor, "nm", n=n, m=m)
    assert packed.header["exact"] is True and each == math.ceil(math.log2(math.comb(m, n)))
    assert packed.tensors["codes"].nbytes == 16 * 8 * each // 8


def test_two_of_four_takes_four_bits_at_most():
    tensor = in_groups([16, 32], 2, 4, 1, True, 0)
    assert pack(tensor, "nm", n=2, m=4).tensors["codes"].nbytes == 16 * 8 * 4 // 8


def chosen_in(shape, share, seed=0):
    """Random values with exactly such a share of them left."""
    draw = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    out = torch.zeros(size)
    out[torch.randperm(size, generator=draw)[: round(size * share)]] = 1.5
    return out.reshape(shape)


@pytest.mark.parametrize(("share", "layout"), [(0.5, "bitmask"), (0.2, "bitmask"), (0.1, "index"), (0.05, "index"), (0.0, "index"), (1.0, "dense")])
def test_free_weights_are_as_small_as_the_books_say(share, layout):
    tensor = chosen_in([256, 256], share)
    packed, books = smallest(tensor), theory(tensor.numel(), int((tensor != 0).sum()), 4)
    assert packed.layout == layout
    assert packed.nbytes == pytest.approx(min(books.dense, books.bitmask, books.index), rel=0.01, abs=2)
    if 0 < share <= 0.2:
        small = smallest(tensor, entropy=True)
        assert small.nbytes < min(books.bitmask, books.index) and small.nbytes < 1.02 * books.entropy
        assert "deflated" in small.header and same(unpack(small.header, small.tensors), tensor)


def test_each_pattern_gets_its_layout():
    draw = torch.Generator().manual_seed(0)
    ones = torch.ones(64, 48, 3, 3)
    pairs = in_groups([64, 48, 3, 3], 2, 4, 1, False, 0)
    assert {k: smallest(pairs).header[k] for k in ("layout", "n", "m", "axis", "exact")} == {"layout": "nm", "n": 2, "m": 4, "axis": 1, "exact": True}
    assert smallest(pairs.transpose(0, 1)).header["axis"] == 0
    for size in (2, 4, 8, 16):
        rows = ones * (torch.rand(64 // size, 48, 3, 3, generator=draw) < 0.3).repeat_interleave(size, 0)
        assert {k: smallest(rows).header[k] for k in ("layout", "size", "axis")} == {"layout": "blocks", "size": size, "axis": 0}
    kernels = ones * (torch.rand(64, 48, 1, 1, generator=draw) < 0.3)
    assert {k: smallest(kernels).header[k] for k in ("layout", "size", "axis")} == {"layout": "blocks", "size": 9, "axis": 2}


def test_the_entropy_stage_is_left_out_where_it_does_not_pay():
    tensor = chosen_in([64, 64], 0.5)
    assert "deflated" not in pack(tensor, "bitmask", entropy=True).header
    assert "deflated" in pack(torch.zeros(64, 64), "bitmask", entropy=True).header
    huge = pack(torch.zeros(4096, 256), "bitmask", entropy=True)
    assert "deflated" not in huge.header, "the loader refuses what unfolds to more than 4096 times its size"
    assert same(unpack(huge.header, huge.tensors), torch.zeros(4096, 256))


def test_books():
    books = theory(1000, 100, 2)
    assert (books.dense, books.bitmask) == (2000, 325)
    assert books.index == pytest.approx(300, abs=1e-6)
    assert books.entropy == pytest.approx(200 + 1000 * 0.46899559 / 8)
    assert theory(0, 0, 4) == theory(0, 0, 2) and theory(8, 8, 1).entropy == 8
    with pytest.raises(InputError, match="9 of 8 weights"):
        theory(8, 9, 1)


# ---------------------------------------------------------------- what cannot be meant
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t: pack(t.long(), "bitmask"), "torch.int64 is not packed"),
        (lambda t: pack(t, "csr"), "'csr' is no layout"),
        (lambda t: pack(t, "nm"), "takes axis, m, n"),
        (lambda t: pack(t, "bitmask", size=4), "takes no parameters"),
        (lambda t: pack(t, "blocks", size=1), "out of range"),
        (lambda t: pack(t, "blocks", size=4, axis=3), "out of range"),
        (lambda t: pack(t, "nm", n=4, m=4), "out of range"),
        (lambda t: pack(t, "nm", n=8, m=17), "out of range"),
        (lambda t: pack(t, "nm", n=2, m=4), "does not keep 2"),
    ],
)
def test_refused_in_words(call, said):
    with pytest.raises(InputError, match=said):
        call(torch.ones(4, 8))
