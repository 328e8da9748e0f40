"""Folders, paths, factories and files that are not what they should be."""

import json
import os

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import cli
from secateur.errors import DataError, FormatError, InputError, ModelError
from secateur.models import folder as folders
from secateur.models import load_data, load_model

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, act=torch.relu):
        super().__init__()
        torch.manual_seed(0)
        self.act = act
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


@pytest.fixture(scope="module")
def result():
    return sc.prune(Net(), (X,), sc.MACs(at_most="60%"))


@pytest.fixture
def saved(result, tmp_path):
    return sc.save(result, tmp_path / "out")


# ---------------------------------------------------------------- loading
@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "graph.json"])
@pytest.mark.parametrize("factory", [None, Net])
def test_one_flipped_byte_is_noticed_or_means_nothing(saved, result, name, factory):
    path = saved / name
    whole = path.read_bytes()
    for position in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2}:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(FormatError):
            sc.load(saved, factory)
    path.write_bytes(whole)
    assert torch.equal(sc.load(saved, factory)(X), result.model(X))


def resealed(saved, change):
    document = json.loads((saved / "plan.json").read_text())
    document.pop("sha256")
    change(document)
    (saved / "plan.json").write_text(json.dumps({**document, "sha256": folders._digest(document)}))


@pytest.mark.parametrize("key", ["how", "graph", "edits", "mode", "tensors", "aliases", "files"])
@pytest.mark.parametrize("value", [None, 5, "x", []])
def test_a_document_of_another_form_is_refused(saved, result, key, value):
    resealed(saved, lambda d: d.update({key: value}))
    for factory in (None, Net):
        try:
            model = sc.load(saved, factory)
        except FormatError:
            continue
        assert torch.equal(model(X), result.model(X)), "where the value does not matter, nothing may differ"


def test_json_that_is_too_deep(saved):
    (saved / "plan.json").write_text("[" * 100_000)
    with pytest.raises(FormatError):
        sc.load(saved)


class Other(Net):
    """The same names and sizes under another class."""


FACTORIES = {
    "another activation": (lambda: Net(torch.tanh), "outputs differ"),
    "another class": (Other, "builds a Other"),
    "a factory that fails": (lambda: 1 / 0, "ZeroDivisionError"),
    "a factory with arguments": (lambda width: Net(), "width"),
    "no function": (3, "not callable"),
    "no module": (lambda: 3, "int"),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_the_wrong_factory(saved, name):
    factory, says = FACTORIES[name]
    with pytest.raises(FormatError, match=says):
        sc.load(saved, factory)


def test_pruned_again_after_loading(saved, result, tmp_path):
    for factory in (None, Net):
        again = sc.prune(sc.load(saved, factory), (X,), sc.MACs(at_most="60%"))
        sc.save(again, tmp_path / "again")
        assert torch.equal(sc.load(tmp_path / "again")(X), again.model(X))
        assert again.before == result.after


# ---------------------------------------------------------------- saving
@pytest.mark.parametrize("path", [None, 3, b"out", "a\0b"])
def test_what_is_no_path(result, path):
    with pytest.raises(InputError, match="no path"):
        sc.save(result, path)


def test_what_is_no_result(result, tmp_path):
    with pytest.raises(InputError, match="what prune\\(\\) returned"):
        sc.save(result.model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_name_longer_than_names_can_be(result, tmp_path):
    with pytest.raises(FormatError, match="could not be written"):
        sc.save(result, tmp_path / ("x" * 300))
    assert not list(tmp_path.iterdir())


def test_a_linked_folder_stays_a_link(result, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    sc.save(result, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert torch.equal(sc.load(tmp_path / "real")(X), result.model(X))


# ---------------------------------------------------------------- code that is not what it should be
CODE = """
import sys, torch
from torch import nn
def net():
    print("a word from the factory")
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6)
def ends(): sys.exit(0)
def lazy(): return nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), torch.randn(2, 6)
def five(): return net()[0], 5
class Quits(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
    def forward(self, x): sys.exit(0)
def quits(): return Quits(), torch.randn(2, 6)
def rows():
    for _ in range(3): yield torch.randn(5, 6), torch.zeros(5, dtype=torch.long)
def uneven(): return [(torch.randn(5, 6), torch.zeros(5)), (torch.randn(5, 7), torch.zeros(5))]
def squares(): return torch.randn(20, 6), torch.zeros(20, 3)
def fractions(): return torch.randn(20, 6), torch.full((20,), 0.5)
def below(): return torch.randn(20, 6), torch.full((20,), -1)
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "odd.py").write_text(CODE)
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    return tmp_path / "odd.py"


@pytest.mark.parametrize(("name", "says"), [("ends", "SystemExit"), ("lazy", "no shape yet"), ("five", "inputs of type int")])
def test_factories_that_end_the_process_or_are_not_ready(code, name, says):
    with pytest.raises(ModelError, match=says):
        load_model(f"{code}:{name}")


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    assert "fault of secateur" not in said.err and "Traceback" not in said.err
    return status, said


def test_sys_exit_in_user_code_is_no_success(code, capsys):
    """Exit code 0 means that it was done."""
    for model in (f"{code}:ends", f"{code}:quits", f"{code.parent / 'script.py'}:net"):
        status, said = run(capsys, "prune", model, "--at-most", "macs=50%")
        assert status != 0 and "SystemExit" in said.err
    assert run(capsys, "prune", f"{code}:net", "--at-most", "macs=50%", "--data", f"{code}:ends")[0] == 1


def test_json_is_one_document_whatever_the_factory_prints(code, capsys):
    status, said = run(capsys, "prune", f"{code}:net", "--at-most", "macs=60%", "--json")
    assert status == 0 and json.loads(said.out)["proof"]["passed"]
    assert "a word from the factory" in said.err


@pytest.mark.parametrize(("name", "says"), [
    ("uneven", r"5, 7"), ("squares", "class number"), ("fractions", "class number"), ("below", "class number"),
])  # fmt: skip
def test_data_that_does_not_fit(code, capsys, name, says):
    status, said = run(capsys, "prune", f"{code}:net", "--at-most", "macs=60%", "--data", f"{code}:{name}")
    assert status == 1 and says in said.err


def test_a_generator_of_batches_can_be_gone_through_twice(code):
    data = load_data(f"{code}:rows")
    assert [len(list(part)) for part in (data.train, data.test, data.train)] == [2, 1, 2]


def test_labels_with_fractions(tmp_path):
    import numpy as np

    np.savez(tmp_path / "d.npz", images=np.zeros((6, 8, 8), np.float32), labels=np.full(6, 0.5))
    with pytest.raises(DataError, match="fractions"):
        load_data(f"npz:{tmp_path / 'd.npz'}")


@pytest.mark.parametrize("shape", ["1x6:int64<0", "99999999999x99999999999"])
def test_inputs_that_cannot_be_made(code, capsys, shape):
    status, said = run(capsys, "measure", f"{code}:net", "--input", shape)
    assert status == 2 and "cannot be made" in said.err
