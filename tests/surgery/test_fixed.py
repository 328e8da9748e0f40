"""What a result could silently get wrong: numbers of the call written into a graph, inputs that show nothing, tensors of the original."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import secateur as sc
from secateur.errors import CutError, ModelError, ProofError, SecateurError
from secateur.measure.checks import check
from secateur.surgery.batch import batch_is_free


class Net(nn.Module):
    """Its class cannot follow a cut (a power of the width), so that the rewritten graph is handed back."""

    def __init__(self, by_batch=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.by_batch = nn.Linear(6, 12), nn.Linear(12, 3), by_batch

    def forward(self, x, k=2, mask=None, mode="plain", both=False):
        h = self.a(x).relu()
        h = h * h.shape[-1] ** -0.5 * k / (h.shape[0] if self.by_batch else 1)
        h = h if mask is None else h * mask
        h = h.tanh() if mode == "tanh" else h
        return (self.b(h), h) if both else self.b(h)


def masked(model, kept, x, k):
    """The original without the units that went, by hand."""
    h = model.a(x).relu() * torch.isin(torch.arange(12), torch.as_tensor(kept)) * 12**-0.5 * k
    return model.b(h / (len(x) if model.by_batch else 1))


@pytest.mark.parametrize("other", [{"k": 50}, {"mask": torch.zeros(4, 1)}, {"mode": "tanh"}, {"both": True}])
def test_a_rewritten_graph_refuses_other_numbers_and_words_than_those_it_was_captured_with(other, tmp_path):
    model, x = Net().eval(), torch.randn(4, 6)
    given = {"k": 3, "mask": None, "mode": "plain", "both": False}
    result = sc.prune(model, (x,), sc.MACs(at_most="60%"), kwargs=given)
    assert result.cut.how == "graph"
    sc.save(result, tmp_path / "out")
    wanted = masked(model, result.cut.kept["a.weight"][0], y := torch.randn(7, 6), 3)
    for graph in (result.model, sc.load(tmp_path / "out")):
        torch.testing.assert_close(graph(y, **given), wanted)
        with pytest.raises(AssertionError, match=f"{next(iter(other))} was .* when this graph was captured"):
            graph(x, **{**given, **other})


def test_a_class_saved_as_a_graph_refuses_them_too(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x, k=2):
            return self.b(self.a(x).relu() * k)

    result = sc.prune(Plain().eval(), (torch.randn(4, 6),), sc.MACs(at_most="60%"), kwargs={"k": 3})
    assert result.cut.how == "attributes"
    sc.save(result, tmp_path / "out")
    loaded, x = sc.load(tmp_path / "out"), torch.randn(5, 6)
    torch.testing.assert_close(loaded(x, k=3), result.model(x, k=3))
    with pytest.raises(AssertionError, match="k was 3"):
        loaded(x, k=4)


@pytest.mark.parametrize("rows", [2, 3, 128])
def test_a_number_made_of_the_batch_size_is_no_free_batch(rows):
    model = Net(by_batch=True).eval()
    result = sc.prune(model, (torch.randn(rows, 6),), sc.MACs(at_most="60%"))
    assert any("takes only the batch size" in note for note in result.notes)
    x = torch.randn(rows, 6)
    torch.testing.assert_close(result.model(x), masked(model, result.cut.kept["a.weight"][0], x, 2))
    with pytest.raises(AssertionError, match=f"batch size was {rows}"):
        result.model(torch.randn(rows + 1, 6))
    assert batch_is_free(Net().eval(), Net().eval(), (x,), {}) == ""


def test_example_inputs_of_zeros_still_prove_something():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.bn, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.bn(self.a(x)).relu()
            return self.b(h.mean((2, 3)) * h.shape[1] ** -0.5)

    model, x = Conv().eval(), torch.randn(2, 3, 8, 8)
    result = sc.prune(model, (torch.zeros(2, 3, 8, 8),), sc.MACs(at_most="60%"))
    kept = torch.isin(torch.arange(8), torch.as_tensor(result.cut.kept["a.weight"][0]))
    wanted = model.b(model.bn(model.a(x)).relu().mean((2, 3)) * kept * 8**-0.5)
    torch.testing.assert_close(result.model(x), wanted)


class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(6, 12), nn.Linear(12, 3), nn.Parameter(torch.tensor(2.0))
        self.act = lambda h: h.relu() * self.gain

    def forward(self, x):
        return self.b(self.act(self.a(x)))


def test_a_result_does_not_reach_back_into_the_original():
    model, x = Closure().eval(), torch.randn(4, 6)
    result = sc.prune(model, (x,), sc.MACs(at_most="60%"))
    before = result.model(x).detach().clone()
    result.model(x).sum().backward()
    assert model.gain.grad is None
    with torch.no_grad():
        model.gain.zero_()
    torch.testing.assert_close(result.model(x), before)
    with pytest.raises(CutError, match="function kept as an attribute"):
        sc.sparsify(model, (x,), sc.Sparse(keep="50%", by="magnitude"))


def test_an_embedding_that_shortens_its_rows_is_left_alone():
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=0.5), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    before, x = model[0].weight.detach().clone(), (torch.randint(0, 20, (4, 5)),)
    sc.prune(model, x, sc.MACs(at_most="60%"))
    sc.measure(model, x)
    sc.sparsify(model, x, sc.Sparse(keep="50%", by="magnitude"))
    assert torch.equal(model[0].weight, before)


def test_lists_and_dicts_of_a_model_stay_the_same_objects():
    model, log, held = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval(), {}, []
    model.log, model[0].held, model[2].held = log, held, held
    sc.trace(model, (torch.randn(4, 6),))
    assert model.log is log and model[0].held is held and model[2].held is held


def test_a_head_that_runs_in_training_only_is_named():
    class Helped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)

        def forward(self, x):
            h = self.a(x).relu()
            return (self.b(h), self.aux(h)) if self.training else self.b(h)

    result = sc.prune(Helped().eval(), (torch.randn(4, 6),), sc.MACs(at_most="60%"))
    assert any("never reads aux.bias, aux.weight" in note for note in result.notes)


def test_vdot_is_proven():
    class Dot(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.a, self.b = nn.Parameter(torch.randn(12)), nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.b(self.a(x).relu()) * torch.vdot(self.r, self.a.bias)

    assert sc.prune(Dot().eval(), (torch.randn(4, 6),), sc.MACs(at_most="60%")).proof.passed


class Remembers(nn.Module):
    """Keeps what it computed, as modules for looking into do."""

    def __init__(self, how):
        super().__init__()
        self.how, self.seen, self.cache = how, [], {}
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.a(x).relu()
        if self.how == "list":
            self.seen.append(h)
        elif self.how == "dict":
            self.cache["h"] = h
        else:
            self.last = h
        return self.b(h)


@pytest.mark.parametrize("how", ["list", "dict", "attribute"])
def test_what_a_forward_remembers_of_a_capture_is_not_left_in_the_model(how):
    model, x = Remembers(how).eval(), torch.randn(4, 6)
    result = sc.prune(model, (x,), sc.Params(at_most="60%"))
    held = [*model.seen, *model.cache.values(), *([model.last] if hasattr(model, "last") else [])]
    assert not any(isinstance(t, FakeTensor) for t in held)
    with torch.no_grad():
        copy.deepcopy(model)(x)
        assert result.model(x).shape == (4, 3)


def test_what_is_made_in_inference_mode_can_be_trained():
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(4, 6)
    with torch.inference_mode():
        result = sc.prune(model, (x,), sc.Params(at_most="60%"))
    result.model(x).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in result.model.parameters())


def test_the_layout_of_a_convolution_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval().to(memory_format=torch.channels_last)
    result = sc.prune(model, (torch.randn(2, 3, 8, 8),), sc.Params(at_most="60%"))
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in result.model.modules() if isinstance(m, nn.Conv2d))


class Uses(nn.Module):
    def __init__(self, does, **held):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.does = nn.Linear(6, 16), nn.Linear(16, 3), does
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        return self.b(self.does(self, self.a(x).relu()))


ODD = {
    "a size is given beside the repeats": (lambda m, h: torch.repeat_interleave(h, 2, dim=1, output_size=32)[:, ::2], {}),
    "positions of a mask": (lambda m, h: h[:, torch.where(m.mask)[0]].repeat(1, 2), {"mask": torch.arange(16) % 2 == 0}),
    "rolled twice": (lambda m, h: h.roll((1, 2), (1, 1)), {}),
    "a part is gathered": (lambda m, h: h + h.gather(0, m.i).sum(), {"i": torch.zeros(2, 16, dtype=torch.long)}),
    "a sparse buffer": (lambda m, h: h + (m.adjacency @ h[:4]).sum(), {"adjacency": torch.eye(4).to_sparse()}),
    "tiled, with one number": (lambda m, h: (h[:, None] * torch.ones(16, device=h.device).view(16, 1).tile(1)[:1]).squeeze(1), {}),
    "decomposed": (lambda m, h: torch.ops.aten.native_layer_norm(h, [16], None, None, 1e-5)[0], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_uses_give_a_proven_cut_or_a_refusal_in_words(name):
    does, held = ODD[name]
    model, x = Uses(does, **held).eval(), torch.randn(4, 6)
    with torch.no_grad():
        before = model(x)
    try:
        result = sc.prune(model, (x,), sc.Params(at_most="80%"))
        assert result.proof.passed and result.after.params < result.before.params
    except SecateurError as error:
        assert name != "a size is given beside the repeats" and not isinstance(error, ProofError), str(error)
    torch.testing.assert_close(model(x), before)


def test_numbers_of_eight_bits_are_looked_at():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval()
    model.register_parameter("scale", nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False))
    check(model, (torch.randn(2, 6),), {})
    model.scale.data = torch.full((4,), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="'scale' holds 4 values of 4 that are NaN"):
        check(model, (torch.randn(2, 6),), {})
