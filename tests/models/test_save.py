"""Saving odd models: what a forward writes stays out of the folder, and outputs of classes of their own come back as plain ones."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import FormatError

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


# ---------------------------------------------------------------- outputs of a class of their own
Pair = namedtuple("Pair", "logits hidden")


@dataclass
class Fields:
    logits: torch.Tensor
    missing: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


torch.export.register_dataclass(Fields)


class Opaque:
    """Nothing says what its parts are called."""

    def __init__(self, *values):
        self.values = values


torch.utils._pytree.register_pytree_node(Opaque, lambda o: (list(o.values), None), lambda v, _: Opaque(*v), serialized_type_name="tests.Opaque")


class Returns(nn.Module):
    def __init__(self, kind, hard=True):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.hard, self.a, self.b = kind, hard, nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        y = self.b(h * h.shape[1] ** -0.5 if self.hard else h)
        return {"nested": [self.kind(logits=y, hidden=2 * y)]} if self.kind is not Opaque else Opaque(y, 2 * y)


@pytest.mark.parametrize(("kind", "plain"), [(Pair, tuple), (Fields, dict)])
@pytest.mark.parametrize("hard", [True, False], ids=["graph", "class"])
def test_outputs_of_a_class_of_their_own_come_back_as_plain_ones(kind, plain, hard, tmp_path):
    x = torch.randn(3, 6)
    result = sc.prune(Returns(kind, hard).eval(), (x,), HALF)
    assert result.cut.how == ("graph" if hard else "attributes")
    for _ in range(2):
        out = sc.save(result, tmp_path / "out")
    assert [note for note in result.notes if "holds no classes" in note and kind.__name__ in note] == result.notes[-1:]
    (found,), (wanted,) = sc.load(out)(x)["nested"], result.model(x)["nested"]
    assert type(wanted) is kind and type(found) is plain
    found = found if plain is tuple else (found["logits"], found["hidden"])
    assert torch.equal(found[0], wanted.logits) and torch.equal(found[1], wanted.hidden)
    if not hard:
        assert type(sc.load(out, lambda: Returns(kind, hard))(x)["nested"][0]) is kind


def test_output_classes_of_transformers_stay_and_those_of_the_user_become_dicts(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.modeling_outputs.BaseModelOutput
    own = dataclass(type("Own", (transformers.utils.ModelOutput,), {"__annotations__": {"last_hidden_state": torch.Tensor}}))
    for kind, plain in ((theirs, theirs), (own, dict)):
        model = Returns(lambda logits, hidden, kind=kind: kind(last_hidden_state=logits))
        x = torch.randn(3, 6)
        result = sc.prune(model.eval(), (x,), HALF)
        (found,) = sc.load(sc.save(result, tmp_path / "out"))(x)["nested"]
        assert type(found) is plain and torch.equal(found["last_hidden_state"], result.model(x)["nested"][0]["last_hidden_state"])
        assert any("Own" in note for note in result.notes) is (kind is own)


def test_a_rewritten_graph_that_cannot_be_written_is_refused_and_the_old_folder_stays(tmp_path):
    x = torch.randn(3, 6)
    kept = sc.save(sc.prune(Returns(Pair).eval(), (x,), HALF), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    result = sc.prune(Returns(Opaque).eval(), (x,), HALF)
    assert result.cut.how == "graph"
    for place in (kept, tmp_path / "new"):
        with pytest.raises(FormatError, match=r"(?s)was not saved: .*Opaque.*\n  Let forward\(\) .*torch.save"):
            sc.save(result, place)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before and not (tmp_path / "new").exists()
    easy = sc.prune(Returns(Opaque, hard=False).eval(), (x,), HALF)  # its class can be loaded
    out = sc.save(easy, tmp_path / "easy")
    assert torch.equal(sc.load(out, lambda: Returns(Opaque, hard=False))(x).values[0], easy.model(x).values[0])
