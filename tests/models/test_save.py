"""Saving odd models: what a forward writes stays out of the folder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc

HALF = sc.MACs(at_most="60%")


class Stream(nn.Module):
    """Remembers the end of what it saw; `hard` leaves only the rewritten graph to a cut."""

    def __init__(self, hard=False):
        super().__init__()
        torch.manual_seed(0)
        self.hard, self.a, self.b, self.head = hard, nn.Conv1d(3, 24, 1), nn.Conv1d(24, 16, 3), nn.Conv1d(16, 2, 1)
        self.register_buffer("cache", torch.zeros(1, 24, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        h = F.relu(self.a(x))
        if self.hard:
            h = h * h.shape[1] ** -0.5
        h = torch.cat([self.cache.expand(x.shape[0], -1, -1), h], 2)
        self.cache.copy_(h[:1, :, -2:])
        self.calls += 1
        return self.head(F.relu(self.b(h)))


class Doubles(nn.Module):
    """Writes into what it is given, and gives it back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        x.mul_(2.0)
        return self.b(F.relu(self.a(x))), x


class Short(nn.Module):
    """An embedding that shortens what it looks up, and a size written into forward()."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.a, self.b = nn.Embedding(30, 6, max_norm=1.0), nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, ids):
        return self.b(F.relu(self.a(self.embed(ids))))


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("hard", [False, True], ids=["class", "graph"])
def test_what_a_forward_remembers_is_saved_as_it_is(hard, rows, tmp_path):
    result = sc.prune(Stream(hard).eval(), (torch.randn(rows, 3, 6),), HALF)
    assert result.cut.how == ("graph" if hard else "attributes")
    result.model.cache.fill_(0.5)
    before = copied(result.model)
    out = sc.save(result, tmp_path / "out")
    assert same(result.model, before)
    for factory in [None] if hard else [None, Stream]:
        loaded = sc.load(out, factory)
        assert same(loaded, before)
        x = torch.randn(rows, 3, 6)
        assert torch.equal(loaded(x), result.model(x)) and loaded.calls == result.model.calls == before["calls"] + 1
        result.model.load_state_dict(before)


def test_inputs_that_a_forward_writes_into_stay_what_they_were(tmp_path):
    x = torch.ones(2, 8)
    result = sc.prune(Doubles().eval(), (x,), HALF)
    out = sc.save(result, tmp_path / "out")
    assert torch.equal(x, torch.ones(2, 8))
    for factory in (None, Doubles) if result.cut.how == "attributes" else (None,):
        for found, wanted in zip(sc.load(out, factory)(x.clone()), result.model(x.clone()), strict=True):
            assert torch.equal(found, wanted)


def test_weights_that_a_forward_shortens_are_saved_as_they_are(tmp_path):
    result = sc.prune(Short().eval(), (torch.arange(6).view(1, 6),), HALF)
    with torch.no_grad():
        result.model.embed.weight.mul_(10)
    before = copied(result.model)
    assert same(sc.load(sc.save(result, tmp_path / "out"), Short), before) and same(result.model, before)
