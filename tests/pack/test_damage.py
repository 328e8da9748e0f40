"""Whatever the bytes are: a FormatError that says what is wrong, before anything is allocated."""

import importlib.util
import json
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import FormatError
from secateur.pack import pack, read_archive, unpack, write_archive
from secateur.pack.archive import KEY

ROOT = Path(__file__).parents[2]
DENSE = (torch.arange(48).reshape(6, 8) % 4 == 1) * 2.5  # 1 of 4, 12 values
HOWS = {"bitmask": {}, "index": {}, "nm": {"n": 1, "m": 4}, "blocks": {"size": 2}, "dense": {}}
PART = {"bitmask": "mask", "index": "index", "nm": "codes", "blocks": "mask"}


def refused(header, tensors, said):
    with pytest.raises(FormatError, match=said) as error:
        unpack(header, tensors, "w")
    assert str(error.value).startswith("w: ") and len(str(error.value).splitlines()) == 2


def packed(layout, **also):
    found = pack(DENSE, layout, **HOWS[layout], **also)
    return dict(found.header), dict(found.tensors)


@pytest.mark.parametrize("layout", HOWS)
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layout", "csr", "its layout is 'csr'"),
        ("layout", None, "its layout is 'None'"),
        ("shape", [6, -8], "shape is"),
        ("shape", [6, 8.0], "shape is"),
        ("shape", [6, True], "shape is"),
        ("shape", 48, "shape is"),
        ("shape", [1] * 65, "shape is"),
        ("shape", [0, 2**40, 2**40], "can be counted"),
        ("shape", [6, 2**40], "."),
        ("shape", [6, 7], "."),
        ("shape", [], "."),
        ("dtype", "float16", "should be float16 in one dimension"),
        ("dtype", "complex64", "."),
        ("dtype", 32, "dtype is '32'"),
        ("more", 1, "differ in 'more'"),
    ],
)
def test_a_header_that_cannot_be(layout, key, value, said):
    header, tensors = packed(layout)
    refused({**header, key: value}, tensors, said)


@pytest.mark.parametrize("layout", HOWS)
def test_a_header_that_lacks_something(layout):
    header, tensors = packed(layout)
    for key in header:
        refused({k: v for k, v in header.items() if k != key}, tensors, key)
    refused([], tensors, "its header is a list")


@pytest.mark.parametrize(("key", "value"), [("n", 0), ("n", 4), ("m", 17), ("m", 2.0), ("axis", 3), ("axis", -1), ("exact", 1), ("n", 2**70)])
def test_a_pattern_that_cannot_be(key, value):
    header, tensors = packed("nm")
    refused({**header, key: value}, tensors, r"its (pattern|n|m|axis|exact) is")


@pytest.mark.parametrize(("key", "value"), [("size", 1), ("size", 65), ("size", "2"), ("axis", 3)])
def test_blocks_that_cannot_be(key, value):
    header, tensors = packed("blocks")
    refused({**header, key: value}, tensors, r"its (blocks have|size is|axis is)")


@pytest.mark.parametrize("layout", HOWS)
def test_parts_that_do_not_fit(layout):
    header, tensors = packed(layout)
    refused(header, {}, "is missing")
    refused(header, {**tensors, "more": tensors["values"]}, "'more' is there too")
    refused(header, {**tensors, "values": tensors["values"][:-1]}, r"its places are \d+ and its values \d+")
    refused(header, {**tensors, "values": torch.cat([tensors["values"], torch.ones(1)])}, r"its places are \d+ and its values \d+")
    refused(header, {**tensors, "values": tensors["values"].double()}, "should be float32")
    refused(header, {**tensors, "values": tensors["values"][None]}, "in one dimension")
    if layout != "dense":
        part = tensors[PART[layout]]
        refused(header, {**tensors, PART[layout]: part[:-1]}, "bytes of places|its places are 11")
        refused(header, {**tensors, PART[layout]: torch.cat([part, part[:1]])}, "bytes of places|its places are 13")
        refused(header, {**tensors, PART[layout]: part.to(torch.int8)}, "should be uint8")


def test_places_that_do_not_fit_the_values():
    header, tensors = packed("bitmask")
    tensors["mask"] = tensors["mask"] | 1
    refused(header, tensors, "its places are 18 and its values 12")


def test_bits_behind_the_last_weight():
    found = pack(torch.tensor([1.0, 0.0, 2.0]), "bitmask")
    mask = torch.tensor([5 + 8], dtype=torch.uint8)
    refused(found.header, {**found.tensors, "mask": mask}, r"behind its last weight \(the last byte is 13, of which 3")


def test_a_code_that_stands_for_nothing():
    dense = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    found = pack(dense, "nm", n=2, m=4)
    refused(found.header, {**found.tensors, "codes": torch.tensor([6], dtype=torch.uint8)}, "the code 6, and 2 of 4 weights can lie in 6 ways")


def test_an_index_beyond_the_tensor():
    found = pack(torch.tensor([0.0, 1.0, 0.0]), "index")
    refused(found.header, {**found.tensors, "index": torch.tensor([3], dtype=torch.uint8)}, "ends at weight 4, and the shape has 3")
    refused({**found.header, "shape": [300]}, found.tensors, "ends at weight 2, and the shape has 300")


# ---------------------------------------------------------------- small files that would be large
def bomb(raw, said):
    """A bitmask of zeros that is deflated."""
    small = torch.frombuffer(bytearray(zlib.compress(bytes(raw), 9)), dtype=torch.uint8)
    header = {"layout": "bitmask", "shape": [raw * 8], "dtype": "float64", "deflated": said}
    return header, {"values": torch.empty(0, dtype=torch.float64), "mask": small}


def test_what_unfolds_beyond_measure_is_refused_before_it_does():
    refused(*bomb(2**20, 2**20), r"bytes would unfold to \d+, more than 4096 times as many")
    header, tensors = bomb(2**20, 4)
    refused({**header, "shape": [32]}, tensors, "inflate to more than the 4 bytes")
    header, tensors = bomb(100, 101)
    refused(header, tensors, "inflate to other than the 101 bytes")
    empty = {"layout": "index", "shape": [2**50], "dtype": "float32"}
    refused(empty, {"values": torch.empty(0), "index": torch.empty(0, dtype=torch.uint8)}, "bytes would unfold")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [[2**50, 0], [0, 2**50], [3, 0, 2**50]])
def test_dimensions_beside_one_of_nothing_are_not_walked_along(shape, axis):
    for layout, how in (("nm", {"n": 1, "m": 4, "exact": True}), ("blocks", {"size": 2})):
        header = {"layout": layout, "shape": shape, "dtype": "float32", **how, "axis": axis}
        parts = {"values": torch.empty(0), PART[layout]: torch.empty(0, dtype=torch.uint8)}
        assert list(unpack(header, parts).shape) == shape
        refused(header, {**parts, PART[layout]: torch.zeros(1, dtype=torch.uint8)}, "its shape needs 0")


def test_no_more_is_inflated_than_is_said():
    header, tensors = bomb(2**24, 4)
    tracemalloc.start()
    refused({**header, "shape": [32]}, tensors, "inflate to more than the 4 bytes")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**20


@pytest.mark.parametrize("said", [0, -1, 2.0, True, 10**30, "8"])
def test_lengths_of_deflated_places_that_cannot_be(said):
    header, tensors = bomb(8, 8)
    refused({**header, "deflated": said}, tensors, "inflate to")


def test_deflated_places_that_are_none_or_are_followed_by_more():
    header, tensors = bomb(8, 8)
    assert unpack(header, tensors).shape == (64,)
    refused(header, {**tensors, "mask": tensors["mask"] ^ 255}, "cannot be inflated")
    refused(header, {**tensors, "mask": tensors["mask"][:-1]}, "inflate to other")
    refused(header, {**tensors, "mask": torch.cat([tensors["mask"], tensors["mask"]])}, "inflate to other")


# ---------------------------------------------------------------- files
def saved(tmp_path, metadata, **tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


def test_real_tensors_with_the_names_of_parts(tmp_path):
    tensors = {"x": DENSE.repeat(8, 8), "x.values": torch.ones(3), "y": DENSE.repeat(8, 8), "y.mask": DENSE.repeat(8, 8), "z": DENSE.repeat(8, 8)}
    path = tmp_path / "x.safetensors"
    assert write_archive(tensors, path, set(tensors)) == ["y.mask", "z"]
    found = read_archive(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], v) for k, v in tensors.items())


def test_a_tensor_too_small_to_pay_stays_dense(tmp_path):
    path = tmp_path / "x.safetensors"
    assert write_archive({"x": DENSE}, path, {"x"}) == []
    assert torch.equal(read_archive(path)["x"], DENSE)
    assert write_archive({"x": DENSE.repeat(9, 9)}, path, ()) == []


def test_no_file_grows_by_packing(tmp_path):
    """Around the size from which the longer header pays."""
    sizes = set()
    for rows in range(1, 60):
        tensor = torch.zeros(rows, 8)
        tensor[:, 0] = 1.5
        one, two = tmp_path / "one", tmp_path / "two"
        packed = write_archive({"some.weight": tensor}, one, {"some.weight"})
        write_archive({"some.weight": tensor}, two)
        assert one.stat().st_size <= two.stat().st_size
        sizes.add(len(packed))
    assert sizes == {0, 1}


@pytest.mark.parametrize(
    ("said", "matches"),
    [
        ("{", "is no JSON"),
        ("[" * 200_000, "is no JSON"),
        ("[]", "is a list, not an object"),
        ('{"version": 2, "tensors": {}}', r"version 2 of the layout, and this secateur reads 1"),
        ('{"tensors": {}}', "version None"),
        ('{"version": 1}', "are a NoneType"),
        ('{"version": 1, "tensors": {"w": []}}', "its header is a list"),
        ('{"version": 1, "tensors": {"w": {"layout": []}}}', "its layout is"),
        ('{"version": 1, "tensors": {"v": {}}}', "is there twice"),
    ],
)
def test_metadata_that_cannot_be(said, matches, tmp_path):
    path = saved(tmp_path, {KEY: said}, v=torch.ones(2))
    with pytest.raises(FormatError, match=matches) as error:
        read_archive(path)
    assert len(str(error.value).splitlines()) == 2


def test_parts_that_two_tensors_share(tmp_path):
    header, tensors = packed("bitmask")
    text = json.dumps({"version": 1, "tensors": {"w": header, "w.values": header}})
    path = saved(tmp_path, {KEY: text}, **{f"w.{k}": v for k, v in tensors.items()}, **{f"w.values.{k}": v.clone() for k, v in tensors.items()})
    with pytest.raises(FormatError, match="is there twice"):
        read_archive(path)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "x").write_bytes(b"no")
    for path in (tmp_path / "x", tmp_path / "missing", tmp_path):
        with pytest.raises(FormatError, match=r"cannot be read.*\n"):
            read_archive(path)


def test_nothing_but_tensors_and_format_errors_for_some_seconds():
    found = importlib.util.spec_from_file_location("fuzz_pack", ROOT / "scripts" / "fuzz_pack.py")
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    seen, findings = script.fuzz(2.0, seed=5)
    assert not findings
    assert seen["refused"] > 50 and seen["tensors"] > 5
