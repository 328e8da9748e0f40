"""Recurrent layers written out step by step: the slow twin of `nn.LSTM`, `nn.GRU` and `nn.RNN`, and networks around them.

Nothing here uses secateur. A unit that goes is a unit whose state is zero after every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def _lstm(a: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (a + b).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(a: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (ra, za, na), (rb, zb, nb) = a.chunk(3, -1), b.chunk(3, -1)
    z = (za + zb).sigmoid()
    return (1 - z) * (na + (ra + rb).sigmoid() * nb).tanh() + z * h, c


def _plain(a: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (a + b).tanh(), c


def _rectified(a: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (a + b).relu(), c


STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _plain, "RNN_RELU": _rectified}


def unrolled(rnn: nn.RNNBase, x: Tensor, h0: Tensor, c0: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rnn` over x (T, B, in) with the units of its state that `keep` (width of h) leaves. `h0`, `c0` are (layers and
    directions, B, width). Returns the sequence and the last states."""
    last, cells, both = [], [], 2 if rnn.bidirectional else 1
    for layer in range(rnn.num_layers):
        outs = []
        for d in range(both):
            end = f"_l{layer}" + ("_reverse" if d else "")
            w, u = getattr(rnn, "weight_ih" + end), getattr(rnn, "weight_hh" + end)
            p, q = (getattr(rnn, "bias_ih" + end), getattr(rnn, "bias_hh" + end)) if rnn.bias else (0.0, 0.0)
            n = layer * both + d
            h, c, steps = h0[n] * keep, c0[n], []
            for now in x.flip(0) if d else x:
                h, c = STEPS[rnn.mode](now @ w.T + p, h @ u.T + q, h, c)
                h = (h @ getattr(rnn, "weight_hr" + end).T if rnn.proj_size else h) * keep
                steps.append(h)
            outs.append(torch.stack(steps[::-1] if d else steps))
            last.append(h)
            cells.append(c)
        x = torch.cat(outs, -1)
    return x, torch.stack(last), torch.stack(cells)


@dataclass(frozen=True)
class Form:
    """One form of a recurrent layer, and what is read of it."""

    mode: str
    width: int
    hidden: int
    layers: int
    both: bool
    projected: bool
    bias: bool
    batch_first: bool
    given: bool  # the first states come from a layer of their own
    seed: int


class Tagger(nn.Module):
    """A Linear, a recurrent layer, and heads on its sequence, its last states and (LSTM) its last cells. Input (2, 3, 5)."""

    def __init__(self, form: Form):
        super().__init__()
        self.form, self.proj = form, max(1, form.hidden // 2) if form.projected and form.mode == "LSTM" else 0
        options = {"num_layers": form.layers, "bidirectional": form.both, "bias": form.bias, "batch_first": form.batch_first}
        if form.mode == "LSTM":
            self.rnn: nn.RNNBase = nn.LSTM(form.width, form.hidden, proj_size=self.proj, **options)
        elif form.mode == "GRU":
            self.rnn = nn.GRU(form.width, form.hidden, **options)
        else:
            self.rnn = nn.RNN(form.width, form.hidden, nonlinearity=form.mode[4:].lower(), **options)
        out, self.runs = self.proj or form.hidden, form.layers * (2 if form.both else 1)
        self.embed = nn.Linear(5, form.width)
        self.first, self.cell = nn.Linear(5, out), nn.Linear(5, form.hidden)
        self.each, self.last = nn.Linear(out * (2 if form.both else 1), 2), nn.Linear(out, 2)
        self.cells = nn.Linear(form.hidden, 2)

    def states(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """First states (runs, B, width), of each run its own: h, and for an LSTM the cells."""
        scale = torch.arange(1, self.runs + 1, dtype=x.dtype)[:, None, None]
        h = self.first(x[:, 0]) * scale
        return (h, self.cell(x[:, 1]) * scale) if self.form.mode == "LSTM" else h

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x)
        z = z if self.form.batch_first else z.transpose(0, 1)
        y, last = self.rnn(z, self.states(x)) if self.form.given else self.rnn(z)
        y = y if self.form.batch_first else y.transpose(0, 1)
        h, c = last if self.form.mode == "LSTM" else (last, None)
        out = self.each(y).mean(1) + self.last(h).sum(0)
        return out if c is None else out + self.cells(c[-1])

    def reference(self, x: Tensor, embed: Tensor, keep: Tensor, cell: Tensor) -> Tensor:
        """The same without the units whose mask is False: of the embedding, of the state h, of the cells."""
        h0, c0 = x.new_zeros(self.runs, len(x), len(keep)), x.new_zeros(self.runs, len(x), len(cell))
        if self.form.given:
            given = self.states(x)
            h0, c0 = given if isinstance(given, tuple) else (given, c0)
        y, h, c = unrolled(self.rnn, (self.embed(x) * embed).transpose(0, 1), h0, c0, keep)
        out = self.each(y.transpose(0, 1)).mean(1) + self.last(h).sum(0)
        return out + self.cells(c[-1] * cell) if self.form.mode == "LSTM" else out


def build(form: Form) -> Tagger:
    """The network in float64 and evaluation mode."""
    torch.manual_seed(form.seed)
    return Tagger(form).double().eval()


def forms() -> st.SearchStrategy[Form]:
    return st.builds(
        Form,
        mode=st.sampled_from(("LSTM", "LSTM", "GRU", "RNN_TANH", "RNN_RELU")),
        width=st.integers(2, 7),
        hidden=st.integers(2, 9),
        layers=st.integers(1, 3),
        both=st.booleans(),
        projected=st.booleans(),
        bias=st.booleans(),
        batch_first=st.booleans(),
        given=st.booleans(),
        seed=st.integers(0, 999),
    )
