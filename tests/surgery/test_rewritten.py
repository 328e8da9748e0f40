"""A rewritten graph in copies and files, and called with other lists and dicts than it was captured with."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import secateur as sc
from secateur.errors import InputError


class Constants(nn.Module):
    """Tensors that are in no state dict: one made in forward, one among the attributes, a buffer that says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Linear(8, 32), nn.Linear(32, 4), torch.rand(32)
        self.register_buffer("grid", torch.rand(8), persistent=False)

    def forward(self, x):
        h = self.a(x * self.grid - torch.tensor([0.5] * 8)).relu() * self.scale
        return self.b(h * h.shape[-1] ** -0.5)


class States(nn.Module):
    """The rows are one size among others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.b = nn.LSTM(8, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        h = torch.zeros(2, x.shape[0], 16)
        return self.b(self.rnn(x[:, None], (h, h))[0][:, -1])


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("build", [Constants, States])
def test_copies_pickles_and_folders_keep_the_graph_and_its_state_dict(build, tmp_path):
    model, x = build().eval(), torch.randn(2, 8)
    result = sc.prune(model, (x,), sc.MACs(at_most="60%"))
    assert result.cut.how == "graph" and result.model.state_dict().keys() == model.state_dict().keys()
    sc.save(result, tmp_path / "out")
    loaded, more = sc.load(tmp_path / "out"), torch.randn(5, 8)
    for again in (f(m) for m in (result.model, loaded) for f in (copy.deepcopy, pickled, lambda m: pickled(copy.deepcopy(pickled(m))))):
        with torch.no_grad():
            assert torch.equal(again(x), result.model(x)) and torch.equal(again(more), result.model(more))
            for p in again.parameters():
                p.zero_()
        again.load_state_dict(result.model.state_dict())
        assert torch.equal(again(more), result.model(more)) and type(again).__name__ == "GraphModule"
    averaged = AveragedModel(result.model)
    averaged.update_parameters(result.model)


def test_constants_go_where_the_model_goes():
    result = sc.prune(Constants().eval(), (torch.randn(2, 8),), sc.MACs(at_most="60%"))
    assert result.cut.how == "graph" and result.after.bytes == result.plan.after.bytes
    assert copy.deepcopy(result.model).bfloat16()(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(result.model).to("meta")(torch.randn(2, 8, device="meta")).device.type == "meta"


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, xs, more, scale=None):
        h = sum(self.a(x) for x in xs).relu()
        h = h * h.shape[-1] ** -0.5 * more["k"] * scale["by"][0]
        return {"y": self.b(h), "width": h.shape[-1], "rows": (xs[0].shape[0], None)}


X, K = torch.randn(2, 6), torch.randn(2, 1)
OTHER = {
    "a list is longer": (([X, X, X], {"k": K}), [K], r"input 0 is a list of 3, a list of 2"),
    "a list is shorter": (([X], {"k": K}), [K], r"input 0 is a list of 1"),
    "a key more": (([X, X], {"k": K, "z": K}), [K], r"input 1 is a dict of \['k', 'z'\], a dict of \['k'\]"),
    "a key less": (([X, X], {}), [K], r"input 1 is a dict of \[\]"),
    "no list": ((X, {"k": K}), [K], r"input 0 is a Tensor"),
    "deeper, by name": (([X, X], {"k": K}), [K, K], r"scale\['by'\] is a list of 2"),
}


def test_lists_and_dicts_are_those_that_it_was_captured_with(tmp_path):
    model, given = Parts().eval(), ([X, torch.randn(2, 6)], {"k": K})
    result = sc.prune(model, given, sc.MACs(at_most="60%"), kwargs={"scale": {"by": [K]}})
    assert result.cut.how == "graph"
    sc.save(result, tmp_path / "out")
    for graph in (result.model, copy.deepcopy(result.model), pickled(result.model), sc.load(tmp_path / "out")):
        assert graph(*given, scale={"by": [K]})["y"].shape == (2, 3)
        for args, by, said in OTHER.values():
            with pytest.raises(InputError, match=said):
                graph(*args, scale={"by": by})
    assert torch.compile(result.model, backend="eager", fullgraph=True)(*given, scale={"by": [K]})["y"].shape == (2, 3)
    torch.export.export(result.model, given, {"scale": {"by": [K]}})


def test_outputs_that_are_numbers_are_named():
    result = sc.prune(Parts().eval(), ([X, torch.randn(2, 6)], {"k": K}), sc.MACs(at_most="60%"), kwargs={"scale": {"by": [K]}})
    (said,) = [n for n in result.notes if "numbers and no tensors" in n]
    assert said.endswith("['width'] = 32, ['rows'][0] = 2")
