"""The law for recurrent layers: the cut layer is an ordinary, narrower one and computes what the unrolled, masked original does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import secateur as sc
from secateur.errors import CaptureError
from secateur.measure import count
from secateur.measure.proof import prove
from secateur.surgery import cut as cut_model
from secateur.trace import trace

from .recurrent import GATES, Form, build, forms
from .test_random_networks import laws, planned, random_keep


def unit_mask(graph, keep, tensor: str, dim: int, size: int) -> torch.Tensor:
    """Which units of a dimension stay, read off the one group that lives there; all where none does."""
    found = [(name, s) for name, g in graph.groups.items() for s in g.slots if (s.tensor, s.dim) == (tensor, dim)]
    assert len(found) <= 1
    return keep[found[0][0]].double() if found else torch.ones(size, dtype=torch.float64)


@given(forms())
@laws
def test_a_cut_recurrent_layer_is_the_masked_original(form):
    model, x = build(form), torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(form.seed))
    graph = trace(model, (x,))
    assert count(model, (x,)) == graph.cost()
    keep = random_keep(graph, form.seed)
    made = planned(graph, keep)
    cut = cut_model(model, graph, made)
    assert cut.how == "attributes", cut.why
    assert prove(model, graph, keep, cut.model).passed and count(cut.model, (x,)) == made.after

    state = unit_mask(graph, keep, "rnn.weight_hh_l0", 1, model.proj or form.hidden)
    cells = torch.ones(form.hidden, dtype=torch.float64) if model.proj else state
    embed = unit_mask(graph, keep, "rnn.weight_ih_l0", 1, form.width)
    assert any(s.tensor == "rnn.weight_hh_l0" for g in graph.groups.values() for s in g.slots) or (model.proj or form.hidden) == 1
    assert any(s.tensor == "embed.weight" for g in graph.groups.values() for s in g.slots)

    rnn, new = model.rnn, cut.model.rnn
    assert type(new) is type(rnn) and new.input_size == embed.sum()
    assert (new.proj_size if model.proj else new.hidden_size) == state.sum()
    options = {"proj_size": new.proj_size} if new.proj_size else {"nonlinearity": rnn.nonlinearity} if form.mode.startswith("RNN") else {}
    fresh = type(rnn)(
        new.input_size, new.hidden_size, form.layers, bias=form.bias, batch_first=form.batch_first, bidirectional=form.both, **options
    ).double()
    fresh.load_state_dict(new.state_dict())  # what anyone would build from the new sizes
    z = torch.randn(3, 2, new.input_size, dtype=torch.float64)
    torch.testing.assert_close(fresh(z)[0], new(z)[0], rtol=0, atol=0)

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, wanted = cut.model(ours), model.reference(theirs, embed, state, cells)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    weights = torch.tensor([[1.0, -0.7], [0.4, 1.3]], dtype=torch.float64)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)
    dense = dict(model.named_parameters())
    for name, parameter in cut.model.named_parameters():
        grad = dense[name].grad
        for dim, kept in enumerate(cut.kept.get(name) or ()):
            grad = grad if kept is None or grad is None else grad.index_select(dim, torch.from_numpy(kept))
        if grad is None or parameter.grad is None:
            assert (grad is None or not grad.any()) and (parameter.grad is None or not parameter.grad.any()), name
        else:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-10)


def test_a_projected_layer_keeps_its_hidden_units_and_says_why():
    """torch takes a projection as wide as the hidden units for none at all: no plan may bring the two together."""
    model = nn.LSTM(5, 6, num_layers=2, proj_size=4, batch_first=True)
    graph = trace(nn.Sequential(model, Last(), nn.Linear(4, 3)), (torch.randn(2, 3, 5),))
    frozen = {where: f.reason for f in graph.frozen for where in f.where}
    for name in ("weight_hr_l0", "weight_hr_l1"):
        assert "hidden_size must stay above proj_size" in frozen[f"0.{name}:1"]
    (group,) = graph.groups.values()
    assert {(s.tensor, s.dim) for s in group.slots} == {
        ("0.weight_hr_l0", 0), ("0.weight_hr_l1", 0), ("0.weight_hh_l0", 1), ("0.weight_hh_l1", 1), ("0.weight_ih_l1", 1), ("2.weight", 1),
    }  # fmt: skip


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0]


class Padded(nn.Module):
    """Packs where lengths are given."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 8, batch_first=True, bidirectional=True), nn.Linear(16, 3)

    def forward(self, x, lengths=None):
        if lengths is None:
            return self.head(self.rnn(x)[0])
        packed, _ = self.rnn(pack_padded_sequence(x, lengths, batch_first=True))
        return self.head(pad_packed_sequence(packed, batch_first=True)[0])


def test_packed_sequences_are_refused_with_the_way_out_and_the_way_out_works():
    torch.manual_seed(0)
    model, x, lengths = Padded().double(), torch.randn(2, 4, 5, dtype=torch.float64), torch.tensor([4, 2])
    with pytest.raises(CaptureError, match=r"packed sequence has sizes.*trace it\s+with a padded batch"):
        trace(model, (x, lengths))
    result = sc.prune(model, (x,), sc.MACs(at_most="60%"))
    assert type(result.model) is Padded and result.model.rnn.hidden_size < 8
    got, alone = result.model(x, lengths), result.model(x[1:, :2])
    torch.testing.assert_close(got[1:, :2], alone, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[:1], result.model(x[:1]), rtol=1e-9, atol=1e-12)


def test_wrong_shapes_are_not_taken_for_packed_sequences():
    with pytest.raises(CaptureError, match="runs with these shapes"):
        trace(nn.LSTM(5, 8), (torch.randn(2, 4, 6),))


def flattened(rnn: nn.RNNBase) -> nn.RNNBase:
    """The weights side by side in one buffer, as cuDNN wants them."""
    weights = list(rnn.parameters())
    buffer, at = torch.empty(sum(w.numel() for w in weights)), 0
    for w in weights:
        place = buffer[at : at + w.numel()].view_as(w)
        place.copy_(w.data)
        w.data, at = place, at + w.numel()
    return rnn


def test_weights_side_by_side_in_one_buffer_are_free():
    torch.manual_seed(0)
    model = nn.Sequential(flattened(nn.LSTM(5, 8, batch_first=True)), Last(), nn.Linear(8, 3))
    assert len({w.untyped_storage().data_ptr() for w in model[0].parameters()}) == 1
    result = sc.prune(model, (torch.randn(2, 3, 5),), sc.MACs(at_most="60%"))
    assert result.proof.passed and result.model[0].hidden_size < 8


@pytest.mark.parametrize("start", [0, 4, 7])
def test_weights_whose_memory_overlaps_stay_whole(start):
    a, b, c = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False), nn.Linear(4, 4, bias=False)
    memory = torch.randn(64)
    a.weight.data, b.weight.data, c.weight.data = memory[:16].view(4, 4), memory[start : start + 8].view(2, 4), memory[16:32].view(4, 4)
    graph = trace(Apart(a, b, c), (torch.randn(2, 4),))
    frozen = {where for f in graph.frozen for where in f.where if "share memory" in f.reason}
    assert {"a.weight:0", "b.weight:0"} <= frozen and "c.weight:0" not in frozen
    assert [g for g in graph.groups if g.startswith("c")]


class Apart(nn.Module):
    """Three layers that each have a reader of their own."""

    def __init__(self, a, b, c):
        super().__init__()
        self.a, self.b, self.c = a, b, c
        self.heads = nn.ModuleList([nn.Linear(m.out_features, 2) for m in (a, b, c)])

    def forward(self, x):
        return sum(head(layer(x)) for head, layer in zip(self.heads, (self.a, self.b, self.c), strict=True))


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("both", [False, True])
def test_the_twin_without_masks_is_the_layer(mode, both):
    form = Form(mode, 4, 6, layers=2, both=both, projected=both, bias=True, batch_first=not both, given=True, seed=1)
    model, x = build(form), torch.randn(2, 3, 5, dtype=torch.float64)
    ones = (torch.ones(n, dtype=torch.float64) for n in (4, model.proj or 6, 6))
    torch.testing.assert_close(model.reference(x, *ones), model(x), rtol=1e-12, atol=1e-13)
