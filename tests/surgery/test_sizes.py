"""A rewritten graph at other sizes than those of the example inputs: it does what the model does, or refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc


class Net(nn.Module):
    """Its class cannot follow a cut (a power of the width), so that the rewritten graph is handed back."""

    def __init__(self, does, first):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.does = first, nn.Linear(32, 3), does

    def forward(self, *inputs):
        return self.does(self, *inputs)

    def h(self, x, dim=1):
        y = self.a(x).relu()
        return y * y.shape[dim] ** -0.5


def conv():
    return nn.Conv2d(3, 32, 3, padding=1)


def whole(m, x):  # no size is written anywhere
    return m.b(m.h(x).movedim(1, -1)).movedim(-1, 1)


def divided(m, x):
    return whole(m, x) / x.shape[-1]


def pooled(m, x):
    return m.b(m.h(x).view(x.shape[0], 32, x.shape[2] * x.shape[3]).mean(-1))


def resized(m, x):
    return F.interpolate(F.max_pool2d(whole(m, x), 2), size=x.shape[-2:])


def last_step(m, x):
    return m.b(m.h(x)[:, :, x.shape[2] - 1])


def frames(m, x):
    b, t = x.shape[:2]
    return m.b(m.h(x.reshape(b * t, *x.shape[2:])).mean((2, 3)).view(b, t, 32).mean(1))


def boxes(m, x):
    return m.b(m.h(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 32))


def sequence_first(m, x):
    t, b, _ = x.shape
    q = m.h(x, -1).reshape(t, b * 2, 16).transpose(0, 1)
    return m.b((q @ q.transpose(1, 2) @ q).transpose(0, 1).reshape(t, b, 32).mean(0))


def tokens(m, x, mask):
    """Two inputs of one length."""
    return m.b(m.h(x, -1) * mask[..., None]).sum(1)


def padded(m, x):
    return whole(m, F.pad(x, (0, -x.shape[3] % 2))).mean(-1)


X = torch.randn
CASES = {  # function, its layer, example inputs, inputs that come out right, inputs that are refused
    "free": (whole, conv, (2, 3, 8, 8), [(5, 3, 12, 9)], []),
    "a number": (divided, conv, (2, 3, 8, 8), [(3, 3, 12, 8)], [(2, 3, 8, 16)]),
    "a view": (pooled, conv, (2, 3, 8, 8), [(5, 3, 8, 8)], [(2, 3, 16, 16), (8, 3, 4, 4), (4, 3, 8, 16)]),
    "an output": (resized, conv, (2, 3, 16, 16), [(3, 3, 16, 16)], [(2, 3, 32, 32)]),
    "an index": (last_step, lambda: nn.Conv1d(4, 32, 3, padding=1), (2, 4, 12), [(3, 4, 12)], [(2, 4, 20), (2, 4, 30)]),
    "frames": (frames, conv, (2, 4, 3, 8, 8), [(3, 4, 3, 8, 8)], [(2, 8, 3, 8, 8)]),
    "rows second": (sequence_first, lambda: nn.Linear(8, 32), (6, 3, 8), [(9, 3, 8)], [(6, 6, 8), (3, 6, 8)]),
    "where it is odd": (padded, conv, (2, 3, 8, 8), [(2, 3, 6, 8)], [(2, 3, 8, 9)]),
    "a batch of one": (boxes, conv, (1, 3, 8, 8), [(4, 3, 8, 8)], []),
    "frames of one": (frames, conv, (1, 4, 3, 8, 8), [(1, 4, 3, 8, 8)], [(3, 4, 3, 8, 8), (4, 1, 3, 8, 8)]),
}


def cut_of(name):
    does, first, shape, right, refused = CASES[name]
    model = Net(does, first()).eval()
    result = sc.prune(model, (X(shape),), sc.MACs(at_most="70%"))
    assert result.cut.how == "graph"
    return model, result, right, refused


@pytest.mark.parametrize("name", CASES)
def test_other_sizes_come_out_right_or_are_refused(name, tmp_path):
    model, result, right, refused = cut_of(name)
    sc.save(result, tmp_path / "out")
    for graph in (result.model, sc.load(tmp_path / "out")):
        for shape in right:
            other = sc.trace(model, (X(shape),))
            assert sc.prove(model, other, result.plan.keep, graph).passed
        for shape in refused:
            model(X(shape))  # which takes it
            with pytest.raises(AssertionError, match="prune the model with an example of the size that you need"):
                graph(X(shape))
    held = [n for n in result.notes if "only these sizes" in n]
    assert len(held) == (name not in ("free", "a batch of one"))
    assert any("takes only the batch" in n for n in result.notes) == (name == "frames of one")


def test_the_note_says_which():
    said = [n for n in cut_of("a view")[1].notes if "only these sizes" in n]
    assert said and said[0].endswith(": 8 in dimension 2 of inputs_0, 8 in dimension 3 of inputs_0")


def test_inputs_of_one_length_may_have_another_together():
    model = Net(tokens, nn.Linear(6, 32)).eval()
    result = sc.prune(model, (X(2, 5, 6), torch.ones(2, 5)), sc.MACs(at_most="70%"))
    assert result.cut.how == "graph" and not any("takes only" in n for n in result.notes)
    other = sc.trace(model, (X(3, 9, 6), torch.rand(3, 9)))
    assert sc.prove(model, other, result.plan.keep, result.model).passed


class Square(Net):
    """Python that refuses what its operators would take."""

    def forward(self, x):
        if x.shape[2] != 8:
            raise ValueError("images of eight rows")
        return whole(self, x)


def test_what_the_model_refuses_is_refused():
    result = sc.prune(Square(None, conv()).eval(), (X(2, 3, 8, 8),), sc.MACs(at_most="70%"))
    assert result.cut.how == "graph" and result.model(X(2, 3, 8, 12)).shape == (2, 3, 8, 12)
    with pytest.raises(AssertionError, match="x had size 8 in dimension 2"):
        result.model(X(2, 3, 12, 8))


def test_a_batch_that_is_not_free_is_refused_whatever_the_reason():
    def mixed(m, x):
        return m.b(m.h(x, -1)) - x.mean((0, 1)).sum()

    result = sc.prune(Net(mixed, nn.Linear(6, 32)).eval(), (X(3, 5, 6),), sc.MACs(at_most="70%"))
    assert any("takes only the batch size" in n for n in result.notes)
    with pytest.raises(AssertionError, match="batch size was 3"):
        result.model(X(4, 5, 6))


def test_a_tensor_that_is_passed_twice_is_two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c, self.b = nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(32, 3)

        def forward(self, x, y):
            h = (self.a(x) + self.c(y)).relu()
            return self.b(h * h.shape[-1] ** -0.5)

    model, x = Two().eval(), X(2, 6)
    result = sc.prune(model, (x, x), sc.MACs(at_most="60%"))
    assert result.cut.how == "graph"
    assert sc.prove(model, sc.trace(model, (X(2, 6), X(2, 6))), result.plan.keep, result.model).passed


class Followed(nn.Module):
    """Its class follows a cut."""

    def __init__(self, by):
        super().__init__()
        torch.manual_seed(0)
        self.by, self.a, self.c, self.b = by, nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.c(self.a(x).relu()).relu().sum((2, 3))) / (x.shape[3] if self.by else 1)


@pytest.mark.parametrize("by", [True, False])
def test_a_class_saved_as_a_graph_refuses_sizes_too(by, tmp_path):
    result = sc.prune(Followed(by).eval(), (X(2, 3, 8, 8),), sc.MACs(at_most="70%"))
    assert result.cut.how == "attributes"
    sc.save(result, tmp_path / "out")
    loaded, x = sc.load(tmp_path / "out"), X(5, 3, 12, 8)
    torch.testing.assert_close(loaded(x), result.model(x))
    x = X(2, 3, 8, 16)
    if by:
        with pytest.raises(AssertionError, match="x had size 8 in dimension 3"):
            loaded(x)
    else:
        torch.testing.assert_close(loaded(x), result.model(x))
