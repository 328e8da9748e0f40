"""`secateur recover`: from a folder to a folder."""

import json
from functools import cache

import numpy as np
import pytest
import torch

import secateur as sc
from secateur.cli import main
from secateur.models.folder import read
from secateur.recover import Training, recover
from tests.recover.test_recover import Net, masked, rows

FACTORY, TEACHER = f"{__name__}:net", f"{__name__}:trained_net"


def net():
    return Net()


@pytest.fixture
def data(tmp_path):
    held = rows(160)
    np.savez(tmp_path / "rows.npz", images=held.inputs.numpy(), labels=held.labels.numpy())
    return f"npz:{tmp_path / 'rows.npz'}"


@cache
def trained_net():
    torch.manual_seed(0)
    return recover(Net(), rows(400), Training(epochs=12, lr=0.1)).model.eval()


@pytest.mark.parametrize("kind", ["mask", "cut"])
def test_a_folder_is_trained_back(kind, data, tmp_path, capsys):
    model, x = trained_net(), rows().inputs[:2]
    few = sc.Sparse(keep="8%", by="magnitude", refit=False)
    result = sc.sparsify(model, (x,), few) if kind == "mask" else sc.prune(model, (x,), sc.MACs("20%"))
    out, to = tmp_path / "out", tmp_path / "out-recovered"
    sc.save(result, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(["recover", str(out), "--data", data, "--epochs", "6", "--batch", "16", "--teacher", TEACHER, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(to) and len(facts["history"]) == 6 and facts["history"][-1]["loss"] < facts["history"][0]["loss"]
    assert facts["accuracy"]["recovered"] >= facts["accuracy"]["pruned"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before  # what was given is as it was
    assert not list(tmp_path.glob(".*")) and read(to).document["recovered"]["training"]["epochs"] == 6
    assert main(["verify", str(to)]) == 0
    found = sc.load(to)
    norms = [n for n, b in found.named_buffers() if n.endswith("running_mean")]
    assert norms and not any(torch.equal(found.get_buffer(n), sc.load(out).get_buffer(n)) for n in norms)  # a graph's batch norms train too
    if kind == "mask":
        state = dict(found.named_parameters())
        assert all(not state[n][~m].any() for n, m in result.plan.weights.items())


def test_what_cannot_be_meant_is_said(data, tmp_path, capsys):
    sc.save(masked(trained_net(), rows().inputs[:2]), tmp_path / "out")
    assert main(["recover", str(tmp_path / "out")]) == 2 and "--data" in capsys.readouterr().err
    assert main(["recover", str(tmp_path / "none"), "--data", data]) == 1
    assert main(["recover", str(tmp_path / "out"), "--data", data, "--precision", "int8"]) == 2
    np.savez(tmp_path / "plain.npz", images=rows().inputs.numpy())
    assert main(["recover", str(tmp_path / "out"), "--data", f"npz:{tmp_path / 'plain.npz'}"]) == 1 and "--teacher" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain.npz", "rows.npz"]


def test_a_model_of_its_own_class_is_trained_too(data, tmp_path, capsys):
    sc.save(masked(trained_net(), rows().inputs[:2]), tmp_path / "out")
    line = ["recover", str(tmp_path / "out"), "--data", data, "--epochs", "1", "--factory", FACTORY, "-o", str(tmp_path / "to")]
    assert main(line) == 0 and "accuracy: pruned" in capsys.readouterr().out
    assert torch.isfinite(sc.load(tmp_path / "to", net)(rows().inputs[:2])).all()
