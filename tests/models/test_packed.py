"""Folders of models with single weights gone: smaller, and the same bits."""

import json

import nets
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from secateur.errors import FormatError
from secateur.models import atomic, folder
from secateur.models.folder import read
from secateur.models.verify import verify
from secateur.pack import unpack, write_archive
from secateur.pack.archive import KEY


class Wide(nn.Module):
    """A module with the names that packed tensors use, below it."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 64)
        self.two = nn.Linear(64, 32)
        self.two.register_buffer("weight_values", torch.ones(3))
        self.register_parameter("extra", nn.Parameter(torch.ones(2)))

    def forward(self, x):
        return self.two(torch.relu(self.one(x))) * self.extra.sum() + self.two.weight_values.sum()


def wide():
    torch.manual_seed(0)
    return Wide().eval()


HOWS = {"free": sc.Sparse("10%"), "2:4": sc.Sparse(pattern=sc.NM(2, of=4)), "4x1": sc.Sparse("25%", pattern=sc.Block(4)),
        "wide blocks": sc.Sparse("25%", pattern=sc.Block(2, 4)), "half": sc.Sparse("50%")}  # fmt: skip
X = (torch.randn(3, 32, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module", params=HOWS)
def sparse(request):
    return sc.sparsify(wide(), X, HOWS[request.param])


def tree(path):
    return sum(p.stat().st_size for p in path.iterdir())


@pytest.mark.parametrize("entropy", [False, True])
def test_the_same_bits_from_fewer_bytes(sparse, entropy, tmp_path):
    out = sc.save(sparse, tmp_path / "packed", entropy=entropy)
    dense = sc.save(sparse, tmp_path / "dense", packed=False)
    assert tree(out) < tree(dense)
    files = [(place / "model.safetensors").stat().st_size for place in (out, dense)]
    assert files[0] < (0.7 if sparse.plan.why["keep"] != "0.5" else 0.9) * files[1]
    with torch.no_grad():
        for place in (out, dense):
            for model in (sc.load(place), sc.load(place, wide)):
                assert torch.equal(model(*X), sparse.model(*X))
    loaded = sc.load(out, wide).state_dict()
    assert loaded.keys() == sparse.model.state_dict().keys()
    assert all(torch.equal(loaded[k], v) for k, v in sparse.model.state_dict().items())
    assert not verify(out).problems and not verify(dense).problems
    assert verify(out).stored < verify(out).dense <= verify(dense).stored
    assert sc.Plan.from_json(read(out).document["plan"]) == sc.Plan.from_json(read(dense).document["plan"])


def test_the_format_says_whether_something_is_packed(sparse, tmp_path):
    """So that versions that cannot unpack say so, and those that can read what was written before."""
    said = [json.loads((sc.save(sparse, tmp_path / "out", packed=p) / "plan.json").read_text()) for p in (True, False)]
    assert [d["format"] for d in said] == ["secateur/2", "secateur/1"]
    assert "bits" not in said[0]["plan"]["weights"]["one.weight"] and "bits" in said[1]["plan"]["weights"]["one.weight"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == sparse.model.state_dict().keys()


def test_a_plain_reader_of_safetensors_can_follow_the_page(tmp_path):
    from safetensors import safe_open

    sparse = sc.sparsify(wide(), X, HOWS["free"])
    path = sc.save(sparse, tmp_path / "out") / "model.safetensors"
    with safe_open(path, "pt") as held:
        said = json.loads(held.metadata()[KEY])
    assert said["version"] == 1 and said["tensors"].keys() == {"one.weight", "two.weight"}
    header = said["tensors"]["one.weight"]
    assert header == {"layout": "index", "shape": [64, 32], "dtype": "float32"}
    tensors = load_file(path)
    parts = {"values": tensors["one.weight.values"], "index": tensors["one.weight.index"]}
    assert torch.equal(unpack(header, parts), sparse.model.one.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    model, x = wide().to(dtype), X[0].to(dtype)
    sparse = sc.sparsify(model, (x,), HOWS["free"])
    out = sc.save(sparse, tmp_path / "out")
    assert json.loads((out / "plan.json").read_text())["format"] == "secateur/2"
    assert torch.equal(sc.load(out)(x), sparse.model(x))


def test_a_rewritten_graph_is_packed_too(rewritten, tmp_path):
    x = torch.randn(4, 6)
    sparse = sc.sparsify(rewritten.model, (x,), sc.Sparse("20%"))
    out = sc.save(sparse, tmp_path / "out")
    assert torch.equal(sc.load(out)(x), sparse.model(x)) and not verify(out).problems


def test_a_kept_weight_that_is_zero_keeps_the_bits_of_its_mask(tmp_path):
    sparse = sc.sparsify(wide(), X, HOWS["free"])
    with torch.no_grad():
        sparse.model.one.weight[tuple(sparse.plan.weights["one.weight"].nonzero()[0].tolist())] = 0.0
    out = sc.save(sparse, tmp_path / "out")
    said = json.loads((out / "plan.json").read_text())["plan"]["weights"]
    assert "bits" in said["one.weight"] and "bits" not in said["two.weight"]
    assert not verify(out).problems
    assert torch.equal(sc.Plan.from_json(read(out).document["plan"]).weights["one.weight"], sparse.plan.weights["one.weight"])


def test_layout_in_memory_and_frozen_weights_come_back(tmp_path):
    model = nets.net().to(memory_format=torch.channels_last)
    model.b.weight.requires_grad_(False)
    x = (torch.randn(2, 1, 8, 8),)
    sparse = sc.sparsify(model, x, sc.Sparse("30%"))
    loaded = sc.load(sc.save(sparse, tmp_path / "out"), nets.net)
    assert loaded.b.weight.stride() == sparse.model.b.weight.stride() and not loaded.b.weight.requires_grad
    assert all(torch.equal(v, sparse.model.state_dict()[k]) for k, v in loaded.state_dict().items())


# ---------------------------------------------------------------- damaged
def resealed(out, change):
    """The folder with another file of tensors, and with the hash of that."""
    path = out / "model.safetensors"
    change(path)
    document = folder._unsealed(out / "plan.json")
    document["files"]["model.safetensors"] = {"bytes": path.stat().st_size, "sha256": atomic.sha256(path)}
    (out / "plan.json").write_text(folder._sealed(document))


@pytest.mark.parametrize("entropy", [False, True])
def test_a_changed_byte_of_a_mask_is_found(entropy, tmp_path):
    out = sc.save(sc.sparsify(wide(), X, HOWS["half"]), tmp_path / "out", entropy=entropy)
    path = out / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 16
    path.write_bytes(raw)
    for call in (sc.load, verify):
        with pytest.raises(FormatError, match="altered"):
            call(out)
    resealed(out, lambda _: None)
    with pytest.raises(FormatError, match=r"two.weight: its places are \d+ and its values \d+"):
        sc.load(out)


def test_headers_that_disagree_with_the_plan_are_refused(tmp_path):
    out = sc.save(sc.sparsify(wide(), X, HOWS["half"]), tmp_path / "out")

    def other(path):
        write_archive({**read(out).tensors, "one.weight": torch.zeros(32, 64)}, path, {"one.weight"})

    resealed(out, other)
    with pytest.raises(FormatError, match=r"one.weight is float32 \[32, 64\], plan.json says float32 \[64, 32\]"):
        sc.load(out)


def test_a_weight_that_is_missing_is_said(tmp_path):
    out = sc.save(sc.sparsify(wide(), X, HOWS["half"]), tmp_path / "out")
    document = folder._unsealed(out / "plan.json")
    document["plan"]["weights"]["gone"] = document["plan"]["weights"]["one.weight"]
    (out / "plan.json").write_text(folder._sealed(document))
    assert verify(out).problems == ("gone: the plan masks it, and the folder has no such tensor",)
