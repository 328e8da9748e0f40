"""LSTM and GRU: the hidden units stand in every gate, in the recurrence and in whatever reads the state."""

from __future__ import annotations

import torch
from torch import nn

from .harness import Case, U, prod
from .masks import on

SEQUENCE = ((2, 4, 5),)


def lstm(x, weights, keep, state=None):
    """One direction of one layer over (B, T, in); `weights` are w_ih, w_hh, b_ih, b_hh; gates in order i, f, g, o."""
    w_ih, w_hh, b_ih, b_hh = weights
    size = w_hh.shape[1]
    h, c = state if state is not None else (x.new_zeros(x.shape[0], size), x.new_zeros(x.shape[0], size))
    outs = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh).split(size, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = on(o.sigmoid() * c.tanh(), keep)
        outs.append(h)
    return torch.stack(outs, 1), h, c


def gru(x, weights, keep):
    """One direction of one layer over (B, T, in); gates in order r, z, n."""
    w_ih, w_hh, b_ih, b_hh = weights
    size = w_hh.shape[1]
    h, outs = x.new_zeros(x.shape[0], size), []
    for t in range(x.shape[1]):
        ri, zi, ni = (x[:, t] @ w_ih.t() + b_ih).split(size, 1)
        rh, zh, nh = (h @ w_hh.t() + b_hh).split(size, 1)
        z = (zi + zh).sigmoid()
        h = on((1 - z) * (ni + (ri + rh).sigmoid() * nh).tanh() + z * h, keep)
        outs.append(h)
    return torch.stack(outs, 1), h


def cell(rnn, suffix: str):
    """The four parameters of one layer and direction, by torch's names."""
    return [getattr(rnn, f"{name}_{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


class LSTMLayer(Case):
    """One layer; sequence and last state are both read; the input width is an axis as well."""

    units = {"in": U("embed.weight", 0, 6), "h": U("rnn.weight_hh_l0", 1, 7)}
    fixed = (("head.weight", 0),)
    shapes = SEQUENCE

    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Linear(5, 6), nn.LSTM(6, 7, batch_first=True)
        self.head, self.last = nn.Linear(7, 3), nn.Linear(7, 2)

    def forward(self, x):
        y, (h, _) = self.rnn(self.embed(x).relu())
        return self.head(y), self.last(h[-1])

    def reference(self, keep, x):
        y, h, _ = lstm(on(self.embed(x).relu(), keep["in"]), cell(self.rnn, "l0"), keep["h"])
        return self.head(y), self.last(h)


class LSTMGates(LSTMLayer):
    """The same, with the units read off the stacked gates of the input weight."""

    units = {"in": U("rnn.weight_ih_l0", 1, 6), "h": U("rnn.weight_ih_l0", 0, prod((4, 7), 1))}


class LSTMTwoLayers(Case):
    units = {"h0": U("rnn.weight_hh_l0", 1, 6), "h1": U("rnn.weight_hh_l1", 1, 6)}
    shapes = SEQUENCE

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])

    def reference(self, keep, x):
        y, _, _ = lstm(x, cell(self.rnn, "l0"), keep["h0"])
        _, h, _ = lstm(y, cell(self.rnn, "l1"), keep["h1"])
        return self.head(h)


class LSTMBidirectional(Case):
    units = {"f": U("rnn.weight_hh_l0", 1, 6), "b": U("rnn.weight_hh_l0_reverse", 1, 6)}
    shapes = SEQUENCE

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 6, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])

    def reference(self, keep, x):
        forward, _, _ = lstm(x, cell(self.rnn, "l0"), keep["f"])
        backward, _, _ = lstm(x.flip(1), cell(self.rnn, "l0_reverse"), keep["b"])
        return self.head(torch.cat([forward, backward.flip(1)], -1))


class LSTMGivenState(Case):
    """The first state comes from a Linear; time first; batch of one sequence."""

    units = {"h": U("rnn.weight_hh_l0", 1, 6)}
    shapes = ((4, 2, 5), (2, 3))

    def __init__(self):
        super().__init__()
        self.h0, self.c0, self.rnn, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.LSTM(5, 6), nn.Linear(6, 3)

    def forward(self, x, z):
        y, (_, c) = self.rnn(x, (self.h0(z).unsqueeze(0), self.c0(z).unsqueeze(0)))
        return self.head(y + c)

    def reference(self, keep, x, z):
        k = keep["h"]
        y, _, c = lstm(x.transpose(0, 1), cell(self.rnn, "l0"), k, (on(self.h0(z), k), self.c0(z)))
        return self.head(on(y.transpose(0, 1) + c, k))


class GRULayer(Case):
    units = {"h": U("rnn.weight_hh_l0", 1, 7), "m": U("mid.weight", 0, 8)}
    shapes = SEQUENCE

    def __init__(self):
        super().__init__()
        self.rnn, self.mid, self.head = nn.GRU(5, 7, batch_first=True), nn.Linear(7, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mid(self.rnn(x)[0]).relu())

    def reference(self, keep, x):
        y, _ = gru(x, cell(self.rnn, "l0"), keep["h"])
        return self.head(on(self.mid(y).relu(), keep["m"]))


class GRUStacked(Case):
    """Two layers, two directions: four recurrences in one module."""

    units = {
        "f0": U("rnn.weight_hh_l0", 1, 4),
        "b0": U("rnn.weight_hh_l0_reverse", 1, 4),
        "f1": U("rnn.weight_hh_l1", 1, 4),
        "b1": U("rnn.weight_hh_l1_reverse", 1, 4),
    }
    shapes = SEQUENCE

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))

    def reference(self, keep, x):
        for layer in ("0", "1"):
            f, _ = gru(x, cell(self.rnn, "l" + layer), keep["f" + layer])
            b, _ = gru(x.flip(1), cell(self.rnn, f"l{layer}_reverse"), keep["b" + layer])
            x = torch.cat([f, b.flip(1)], -1)
        return self.head(x.mean(1))


class LSTMCellLoop(Case):
    """`nn.LSTMCell` unrolled by Python over time: one module called four times."""

    units = {"h": U("cell.weight_hh", 1, 6)}
    shapes = SEQUENCE

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])

    def reference(self, keep, x):
        weights = (self.cell.weight_ih, self.cell.weight_hh, self.cell.bias_ih, self.cell.bias_hh)
        return self.head(lstm(x, weights, keep["h"])[1])


class TanhRNN(Case):
    units = {"h": U("rnn.weight_hh_l0", 1, 6)}
    shapes = SEQUENCE

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])

    def reference(self, keep, x):
        w_ih, w_hh, b_ih, b_hh = cell(self.rnn, "l0")
        h, outs = x.new_zeros(2, 6), []
        for t in range(4):
            h = on((x[:, t] @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh).tanh(), keep["h"])
            outs.append(h)
        return self.head(torch.stack(outs, 1))


CASES = (
    LSTMLayer, LSTMGates, LSTMTwoLayers, LSTMBidirectional, LSTMGivenState, GRULayer, GRUStacked, LSTMCellLoop, TanhRNN,
)  # fmt: skip
