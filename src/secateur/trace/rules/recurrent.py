"""LSTM, GRU, RNN. Gates are stacked on the first dimension of each weight: gates x hidden. One hidden size serves
all layers and directions, because `nn.LSTM` has one."""

from __future__ import annotations

from secateur.axes import Dim, add, factor, resolve, unify
from secateur.trace.call import Call, Dims, Value


def recurrent(gates: int):
    def rule(t, c: Call) -> Value:
        x = c.dims("input")
        hx = c.dims_list("hx") if isinstance(c["hx"], (list, tuple)) else [c.dims("hx")]
        params = c.dims_list("params")
        layers, both = c["num_layers"], 2 if c["bidirectional"] else 1
        per = len(params) // (layers * both)
        projected = gates == 4 and hx[0][-1].size != hx[1][-1].size
        hidden: Dim | None = None
        state: Dim | None = None  # what the recurrence and the next layer read: the hidden units, or their projection
        feed: Dim = x[-1]
        for layer in range(layers):
            outs = []
            for d in range(both):
                own = params[(layer * both + d) * per : (layer * both + d + 1) * per]
                hidden = _cell(t, c, own, feed, hidden, gates)
                out = own[-1][0] if projected else hidden
                for same in (own[1][1], state):
                    if same is not None:
                        unify(same, out)
                state = resolve(out)
                outs.append(state)
            feed = _join(outs)
        assert hidden is not None
        if projected:  # torch sees a projection by its size alone: one as wide as the hidden units would be none
            t.freeze((hidden,), c.reason("hidden_size must stay above proj_size"))
        for h in hx:
            t.freeze(h[:1], c.reason("layers and directions"))
            if len(x) == 3:
                unify(h[1], x[0 if c["batch_first"] else 1])
        for o in outs:
            unify(hx[0][-1], o)
        if len(hx) > 1:
            unify(hx[1][-1], hidden)
        states = [(*h[:-1], resolve(h[-1])) for h in hx]
        t.freeze(x[:-1], c.reason("time and batch of a recurrent layer"))
        return [(*x[:-1], _join([resolve(o) for o in outs])), *states]

    return rule


def _join(outs: list[Dim]) -> Dim:
    return add([resolve(o) for o in outs])


def _cell(t, c: Call, own: list[Dims], feed: Dim, hidden: Dim | None, gates: int) -> Dim:
    w_ih, w_hh = own[0], own[1]
    unify(w_ih[1], feed)
    for w in own[: 4 if c["has_biases"] else 2]:
        if gates > 1:
            g, h = factor(w[0], w[0].size // gates)
            t.freeze((g,), c.reason("the gates of a recurrent layer"))
        else:
            h = w[0]
        if hidden is None:
            hidden = h
        else:
            unify(hidden, h)
    assert hidden is not None
    if len(own) in (3, 5):  # a projection: w_hr (proj, hidden)
        unify(own[-1][1], hidden)
    steps = c.dims("input")[:-1]
    t.macs(c, (*steps, w_ih[0], w_ih[1]))
    t.macs(c, (*steps, w_hh[0], w_hh[1]))
    if len(own) in (3, 5):
        t.macs(c, (*steps, own[-1][0], own[-1][1]))
    return resolve(hidden)


def cell(gates: int):
    """`nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`: one step."""

    def rule(t, c: Call) -> Value:
        x, w_ih, w_hh = c.dims("input"), c.dims("w_ih"), c.dims("w_hh")
        hx = c.dims_list("hx") if isinstance(c["hx"], (list, tuple)) else [c.dims("hx")]
        unify(w_ih[1], x[-1])
        hidden = w_hh[1]
        for w in (w_ih, w_hh, c.dims("b_ih"), c.dims("b_hh")):
            if w:
                g, h = factor(w[0], w[0].size // gates)
                t.freeze((g,), c.reason("the gates of a recurrent layer"))
                unify(h, hidden)
        for h in hx:
            unify(h[-1], hidden)
        t.macs(c, (*x[:-1], *w_ih))
        t.macs(c, (*x[:-1], *w_hh))
        states = [(*x[:-1], resolve(hidden)) for _ in hx]
        return states if isinstance(c["hx"], (list, tuple)) else states[0]

    return rule


RULES = {
    "lstm_cell": cell(4),
    "gru_cell": cell(3),
    "rnn_tanh_cell": cell(1),
    "rnn_relu_cell": cell(1),
    "lstm": recurrent(4),
    "gru": recurrent(3),
    "rnn_tanh": recurrent(1),
    "rnn_relu": recurrent(1),
}
