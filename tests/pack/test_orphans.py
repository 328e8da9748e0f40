"""The layouts `sparse-bitmask` and `sparse-24-bitmask` of compressed-tensors, written here one weight at a time."""

import json

import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import FormatError
from secateur.pack import read_compressed_tensors


def row_bytes(row):
    out = [0] * -(-len(row) // 8)
    for i, bit in enumerate(row):
        out[i // 8] |= bool(bit) << i % 8
    return out


def sparse_bitmask(dense):
    """NAME.shape, NAME.compressed, NAME.bitmask, NAME.row_offsets of a matrix."""
    bits, values, offsets = [], [], []
    for row in dense:
        offsets.append(len(values))
        bits.append(row_bytes([float(v) != 0 for v in row]))
        values += [v for v in row if float(v) != 0]
    stacked = torch.stack(values) if values else dense.new_empty(0)
    return {"shape": torch.tensor(dense.shape), "compressed": stacked, "bitmask": torch.tensor(bits, dtype=torch.uint8),
            "row_offsets": torch.tensor(offsets, dtype=torch.int64)}  # fmt: skip


def sparse_24(dense, mask):
    bits = [row_bytes(row.tolist()) for row in mask]
    return {"shape": torch.tensor(dense.shape).reshape(-1, 1), "compressed": dense[mask].reshape(len(dense), -1),
            "bitmask": torch.tensor(bits, dtype=torch.uint8)}  # fmt: skip


@pytest.fixture
def dense():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(5, 11, generator=draw) * (torch.rand(5, 11, generator=draw) < 0.4)


@pytest.fixture
def pairs():
    """A 2:4 matrix of 12 columns, one of its kept weights being 0, and its mask."""
    draw = torch.Generator().manual_seed(1)
    mask = (torch.rand(6, 3, 4, generator=draw).argsort(-1) < 2).view(6, 12)
    dense = torch.where(mask, torch.randn(6, 12, generator=draw), torch.zeros(()))
    dense[tuple(mask.nonzero()[4].tolist())] = 0.0
    return dense, mask


def under(name, parts):
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in parts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_both_layouts_are_read(dense, pairs, dtype, tmp_path):
    free, (two, mask) = dense.mul(4).to(dtype), (pairs[0].mul(4).to(dtype), pairs[1])
    values = sparse_bitmask(free.float())
    values["compressed"] = values["compressed"].to(dtype)
    four = {**sparse_24(two.view(torch.uint8) if two.element_size() == 1 else two, mask)}
    four["compressed"] = four["compressed"].view(dtype)
    bias = torch.arange(3)
    if dtype == torch.int8:  # truncated values may be 0, which is fine where the bit is set
        values = sparse_bitmask(free)
    save_file({**under("a.free", values), **under("two.weight", four), "a.bias": bias}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read_compressed_tensors(path)
        assert found.keys() == {"a.free.weight", "two.weight", "a.bias"}
        assert found["a.free.weight"].dtype == dtype and torch.equal(found["a.free.weight"].float(), free.float())
        assert found["two.weight"].dtype == dtype and torch.equal(found["two.weight"].float(), two.float())
        assert torch.equal(found["a.bias"], bias)


def test_shards_and_their_index(dense, tmp_path):
    parts = under("w", sparse_bitmask(dense))
    one = {k: v for k, v in parts.items() if k.endswith(("shape", "bitmask"))}
    save_file(one, tmp_path / "1.safetensors")
    save_file({k: v for k, v in parts.items() if k not in one}, tmp_path / "2.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "3.safetensors")
    assert read_compressed_tensors(tmp_path).keys() == {"w.weight", "other"}
    index = {"weight_map": {k: "1.safetensors" if k in one else "2.safetensors" for k in parts}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_compressed_tensors(tmp_path)
    assert found.keys() == {"w.weight"} and torch.equal(found["w.weight"], dense)
    for odd in ("../1.safetensors", "4.safetensors", 3, [1]):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": odd}}))
        with pytest.raises(FormatError):
            read_compressed_tensors(tmp_path)


def test_an_empty_matrix_and_one_without_values(tmp_path):
    path = tmp_path / "x.safetensors"
    for shape in ((0, 4), (3, 0), (3, 5)):
        save_file(under("w", {**sparse_bitmask(torch.zeros(shape)), "bitmask": torch.zeros(shape[0], -(-shape[1] // 8), dtype=torch.uint8)}), path)
        assert torch.equal(read_compressed_tensors(path)["w.weight"], torch.zeros(shape))


def test_dimensions_beside_one_of_nothing_are_not_walked_along(tmp_path):
    path = tmp_path / "x.safetensors"
    none = torch.empty(0, dtype=torch.uint8)
    save_file(under("w", {"shape": torch.tensor([2**50, 0]), "bitmask": none, "compressed": torch.empty(0), "row_offsets": none.clone()}), path)
    assert read_compressed_tensors(path)["w.weight"].shape == (2**50, 0)
    save_file(under("w", {"shape": torch.tensor([2**50, 0]), "bitmask": none, "compressed": torch.ones(1)}), path)
    with pytest.raises(FormatError, match="there are 1 values"):
        read_compressed_tensors(path)


def test_what_only_looks_like_it_is_handed_back(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w.bitmask": torch.ones(2), "w.shape": torch.ones(2), "v.compressed": torch.ones(3)}, path)
    assert read_compressed_tensors(path).keys() == {"w.bitmask", "w.shape", "v.compressed"}


DAMAGES = {
    "a value less": (lambda p: {**p, "compressed": p["compressed"][:-1]}, r"has \d+ places, and there are \d+ values"),
    "a row less": (lambda p: {**p, "bitmask": p["bitmask"][:-1]}, "needs 5 x 2 bytes"),
    "another dtype": (lambda p: {**p, "bitmask": p["bitmask"].to(torch.int16)}, "needs 5 x 2 bytes"),
    "a bit behind the row": (lambda p: {**p, "bitmask": p["bitmask"] | torch.tensor([0, 128]).byte()}, "behind the last of its 11 columns"),
    "offsets of another matrix": (lambda p: {**p, "row_offsets": p["row_offsets"] + 1}, "numbers of values before each row"),
    "an offset less": (lambda p: {**p, "row_offsets": p["row_offsets"][:-1]}, "there are 5 rows"),
    "offsets that are no whole numbers": (lambda p: {**p, "row_offsets": p["row_offsets"].double()}, "there are 5 rows"),
    "no offsets": (lambda p: {k: v for k, v in p.items() if k != "row_offsets"}, "so it is 2:4"),
    "a negative shape": (lambda p: {**p, "shape": torch.tensor([5, -11])}, "no tensor can have that"),
    "a giant shape": (lambda p: {**p, "shape": torch.tensor([2**40, 2**40])}, "no tensor can have that"),
    "a large shape": (lambda p: {**p, "shape": torch.tensor([2**40, 11])}, "needs 1099511627776 x 2 bytes"),
    "a shape of nothing": (lambda p: {**p, "shape": torch.empty(0, dtype=torch.int64)}, "one to 64 whole numbers"),
    "a shape of fractions": (lambda p: {**p, "shape": torch.tensor([5.0, 11.0])}, "one to 64 whole numbers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage, dense, tmp_path):
    change, said = DAMAGES[damage]
    save_file(under("w", change(sparse_bitmask(dense))), tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=said) as error:
        read_compressed_tensors(tmp_path)
    assert "w.weight" in str(error.value) and len(str(error.value).splitlines()) == 2


def test_three_of_four_are_no_pairs(pairs, tmp_path):
    dense, mask = pairs
    parts = sparse_24(dense, mask)
    parts["bitmask"][0, 0] = 0b01110001  # as many bits as before
    save_file(under("w", parts), tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="2 bits set"):
        read_compressed_tensors(tmp_path)


def test_dense_and_compressed_at_once(dense, tmp_path):
    save_file({**under("w", sparse_bitmask(dense)), "w.weight": dense}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="both dense and compressed"):
        read_compressed_tensors(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        read_compressed_tensors(tmp_path)
