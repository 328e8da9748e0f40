"""What must hold for a criterion whatever the network: laws of permutation and scale, and where units are found."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur import score
from secateur.calibrate import Calibration
from secateur.calibrate.sites import consumers, contracted_slots, sites
from secateur.trace import trace
from secateur.trace.call import module_of, op_name
from tests.score.networks import Perceptron, Residual, data, made

DETERMINED = [name for name in score.CRITERIA if name not in ("random", "obs")]


def scores(model, batches, name, **more):
    example = batches[0][0]
    graph = trace(model, (example,))
    return score.score(graph, model, name, calibration=Calibration(model, graph, batches, args=(example,), **more))


def relu_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)).double()


# ---------------------------------------------------------------- permutation
@pytest.mark.parametrize("name", DETERMINED)
def test_renamed_units_keep_their_scores(name):
    """Inner channels in another order: the network is the same, and the scores move along."""
    model, batches = made(Residual), data(Residual)
    order = torch.tensor([3, 0, 4, 1, 2])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (other.conv1.weight, other.conv1.bias, *(getattr(other.bn1, n) for n in ("weight", "bias", "running_mean", "running_var"))):
            tensor.copy_(tensor[order])
        other.conv2.weight.copy_(other.conv2.weight[:, order])
    before, after = (scores(m, batches, name) for m in (model, other))
    torch.testing.assert_close(after["conv1:out"], before["conv1:out"][order], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(after["conv0:out"], before["conv0:out"], rtol=1e-7, atol=1e-10)


# ---------------------------------------------------------------- scale
@pytest.mark.parametrize(("name", "changes"), [("wanda", False), ("flap", False), ("taylor", False), ("taylor_squared", False), ("fisher", False),
                                               ("snip", False), ("synflow", False), ("apoz", False), ("l1", True), ("l2", True), ("fpgm", True),
                                               ("lamp", True), ("activation_mean", True)])  # fmt: skip
def test_a_unit_made_larger_and_taken_in_smaller(name, changes):
    """Behind a ReLU the factor 3 before and 1/3 after a unit cancel: the function is the same. Criteria of the function do
    not notice; those of weights or activations alone do."""
    model, batches = relu_network(), data(Perceptron)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[2] *= 3
        other[0].bias[2] *= 3
        other[2].weight[:, 2] /= 3
    before, after = (scores(m, batches, name)["0:out"] for m in (model, other))
    assert torch.allclose(before, after, rtol=1e-6, atol=1e-9) != changes


@pytest.mark.parametrize("name", ["l1", "l2", "lamp", "fpgm", "wanda", "flap", "activation_mean", "apoz", "synflow"])
def test_the_size_of_a_whole_layer_does_not_matter_to_its_own_ranking(name):
    model, batches = relu_network(), data(Perceptron)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other[0].parameters():
            p *= 5
        if name in ("l1", "l2", "lamp"):  # they look at both sides of a unit
            other[2].weight *= 5
    before, after = (scores(m, batches, name)["0:out"] for m in (model, other))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("name", ["taylor", "taylor_squared", "fisher", "snip", "grasp"])
def test_the_unit_of_the_loss_does_not_matter(name):
    model, batches = made(Residual), data(Residual)
    one, ten = (scores(model, batches, name, loss=lambda out, b, k=k: k * F.cross_entropy(out, b[1])) for k in (1, 10))
    for group in one:
        torch.testing.assert_close(one[group], ten[group])


@pytest.mark.parametrize("name", [n for n in DETERMINED if n not in ("lamp", "bn_scale")])
def test_every_group_has_a_mean_size_of_one(name):
    for values in scores(made(Residual), data(Residual), name).values():
        assert float(values.abs().mean()) == pytest.approx(1.0)


# ---------------------------------------------------------------- what the criteria are for
def test_a_unit_that_does_nothing_goes_first():
    """Its outgoing weights are 0, or it never fires: whoever looks there ranks it last."""
    deaf, dead = relu_network(), relu_network()
    with torch.no_grad():
        deaf[2].weight[:, 4] = 0
        dead[0].bias[4] = -1e3
    for model, names in ((deaf, ("wanda", "flap", "taylor", "fisher", "snip", "synflow")),
                         (dead, ("apoz", "activation_mean", "wanda", "flap", "taylor", "fisher"))):  # fmt: skip
        for name in names:
            found = scores(model, data(Perceptron), name)["0:out"]
            assert int(found.argmin()) == 4, name
            assert name == "snip" or float(found[4]) == pytest.approx(0, abs=1e-12), name


def test_a_twin_is_what_the_geometric_median_lets_go():
    model = relu_network()
    with torch.no_grad():
        model[0].weight[:] = torch.eye(6, 5, dtype=torch.float64) * 10
        model[0].weight[5] = model[0].weight[1] * 1.001
    assert int(scores(model, data(Perceptron), "fpgm")["0:out"].argmin()) in (1, 5)


def test_lamp_of_equal_units_is_equal_and_the_largest_has_one():
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [2.0], [0.0]]))
        model[1].weight.zero_()
    found = scores(model, [(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long))], "lamp")["0:out"]
    torch.testing.assert_close(found, torch.tensor([1 / 9, 4 / 8, 4 / 8, 0.0], dtype=torch.float64))


# ---------------------------------------------------------------- functions as criteria
def test_a_function_of_the_library_is_the_criterion_and_that_of_a_user_gets_the_seed():
    model, batches = made(Residual), data(Residual)
    graph = trace(model, (batches[0][0],))
    found = Calibration(model, graph, batches, args=(batches[0][0],))
    for by in (score.taylor, score.CRITERIA["taylor"]):
        for group, values in score.score(graph, model, by, calibration=found).items():
            assert torch.equal(values, score.taylor(graph, model, found)[group])
    got = []

    def mine(graph, model, seed):
        got.append(seed)
        return score.random(graph, model, seed)

    score.score(graph, model, mine, seed=5, calibration=found)
    assert got == [5]
    assert torch.equal(score.CRITERIA["l1"](graph, model)["conv1:out"], score.l1(graph, model)["conv1:out"])


# ---------------------------------------------------------------- where units are found
class Swiglu(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(6, 3)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Foreign(nn.Module):
    """Weights stored the other way round, one used as it is and one turned."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(3, 5))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.relu(torch.addmm(self.bias, x, self.a)) @ self.b.t() @ self.c.T


class Upwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(3, 6, 2, groups=1), nn.ConvTranspose2d(6, 2, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Words(nn.Module):
    """An embedding, tied to the output, and a recurrence."""

    def __init__(self):
        super().__init__()
        self.words, self.rnn, self.out = nn.Embedding(7, 5), nn.GRU(5, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, i):
        return self.out(self.rnn(self.words(i))[0]) @ self.words.weight.T


def found_at(model, *inputs):
    graph = trace(model, inputs)
    seen = {n: [(op_name(x), module_of(x)) for x in nodes] for n, nodes in sites(graph).items()}
    eaten = {n: [(op_name(x.node), module_of(x.node)) for x in rows] for n, rows in consumers(graph).items()}
    return graph, seen, eaten


def test_a_gated_layer_is_seen_behind_its_gate():
    _, seen, eaten = found_at(Swiglu(), torch.randn(2, 4))
    assert seen == {"up:out": [("silu", "")]} and eaten == {"up:out": [("linear", "down")]}


def test_weights_stored_the_other_way_round_are_known_for_what_they_are():
    model = Foreign()
    graph, seen, eaten = found_at(model, torch.randn(2, 4))
    assert contracted_slots(graph) == {("a", 0), ("b", 1), ("c", 1)}
    (six,), (five,) = ([n for n, g in graph.groups.items() if g.size == k] for k in (6, 5))
    assert [op for op, _ in seen[six]] == ["relu"] and [op for op, _ in eaten[six]] == ["matmul"]
    x = torch.randn(50, 4)
    found = Calibration(model, graph, [(x, torch.zeros(50, dtype=torch.long))], args=(torch.randn(2, 4),))
    hidden = torch.relu(x @ model.a + model.bias).detach()
    by_hand = hidden.square().mean(0).sqrt() * model.b.detach().abs().sum(0)
    torch.testing.assert_close(score.wanda(graph, model, found)[six], (by_hand / by_hand.mean()).double(), rtol=1e-5, atol=1e-6)
    rows = model.a.detach().T  # what makes a unit is a column here
    by_hand = torch.tensor([sum((rows[i] - rows[j]).norm() for j in range(6)) for i in range(6)])
    torch.testing.assert_close(score.fpgm(graph, model)[six], (by_hand / by_hand.mean()).double(), rtol=1e-5, atol=1e-6)
    assert five in graph.groups


def test_transposed_convolutions_take_in_by_their_first_dimension():
    model = Upwards()
    graph, seen, eaten = found_at(model, torch.randn(1, 3, 4, 4))
    assert contracted_slots(graph) == {("a.weight", 0), ("b.weight", 0)}
    x = torch.randn(5, 3, 4, 4)
    found = Calibration(model, graph, [x], args=(x[:1],))
    hidden = torch.relu(model.a(x)).detach()
    by_hand = hidden.square().mean((0, 2, 3)).sqrt() * model.b.weight.detach().abs().sum((1, 2, 3))
    (values,) = score.wanda(graph, model, found).values()
    torch.testing.assert_close(values, (by_hand / by_hand.mean()).double(), rtol=1e-5, atol=1e-6)
    assert [op for op, _ in next(iter(seen.values()))] == ["relu"] and len(next(iter(eaten.values()))) == 1


def test_embeddings_recurrences_and_tied_weights_are_scored_by_everything():
    model = Words()
    i = torch.randint(0, 7, (2, 4))
    graph, seen, _ = found_at(model, i)
    (stream,) = (n for n, g in graph.groups.items() if g.size == 5)
    assert set(seen[stream]) == {("embedding", "words"), ("linear", "out")}
    (states,) = (n for n, g in graph.groups.items() if g.size == 6)
    assert seen[states] == [("getitem", "rnn")], "no layer makes a state, so the first tensor that shows it"
    found = Calibration(model, graph, [{"i": torch.randint(0, 7, (3, 6)), "labels": torch.randint(0, 7, (3, 6))}], args=(i,))
    for name in set(DETERMINED) - {"bn_scale", "apoz"}:
        for group, values in score.score(graph, model, name, calibration=found).items():
            assert bool(torch.isfinite(values).all()), (name, group)


@pytest.mark.parametrize("name", ["wanda", "taylor"])
def test_texts_of_many_lengths(name):
    """A batch of another length is captured anew; twelve lengths are more than are kept."""
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    batches = [(torch.randint(0, 9, (2, n)), torch.randint(0, 4, (2, n))) for n in range(3, 15)]
    example = batches[0][0]
    graph = trace(model, (example,))
    found = score.score(graph, model, name, calibration=Calibration(model, graph, batches, args=(example,)))
    assert set(found) == set(graph.groups)
    assert sc.plan(graph, found, sc.MACs(at_most="60%")).after.macs <= 0.6 * graph.cost().macs
