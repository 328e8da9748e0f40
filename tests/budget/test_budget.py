"""Targets are met exactly: never above, within one per cent below where the units allow, or refused."""

import pytest
import torch
from torch import nn

from secateur import score
from secateur.budget import Bytes, MACs, Params, parse, plan
from secateur.errors import InputError, PlanError, TargetError
from secateur.trace import trace


class Net(nn.Module):
    """A stem, a residual block and a head: groups of different width, one of them in two layers at once."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.one = nn.Conv2d(24, 40, 3, padding=1)
        self.two = nn.Conv2d(40, 24, 3, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.two(self.one(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = Net()
    graph = trace(model, (torch.zeros(1, 3, 8, 8),))
    return graph, score.l2(graph, model)


def removed(keep):
    return [(name, int(unit)) for name, mask in keep.items() for unit in torch.nonzero(~mask)]


def put_back(keep, name, unit):
    more = keep[name].clone()
    more[unit] = True
    return {**keep, name: more}


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("percent", range(15, 100, 7))
@pytest.mark.parametrize("target", [MACs, Params, Bytes])
def test_at_most_and_close(traced, target, percent, allocation):
    graph, scores = traced
    wanted = target(at_most=f"{percent}%")
    made = plan(graph, scores, wanted, allocation=allocation)
    limit, after = wanted.limit(made.before), getattr(made.after, target.figure)
    assert after <= limit
    assert made.after == graph.cost(made.keep)
    assert all(mask.any() for mask in made.keep.values())
    if after < 0.99 * limit:  # then the units do not allow more: any one of them put back breaks the budget
        for name, unit in removed(made.keep):
            assert getattr(graph.cost(put_back(made.keep, name, unit)), target.figure) > limit


def test_the_search_stops_at_the_first_plan_that_fits(traced):
    """Without filling up: putting the last removed unit back must break the budget."""
    graph, scores = traced
    for percent in (30, 50, 70, 90):
        wanted = MACs(at_most=f"{percent}%")
        made = plan(graph, scores, wanted, fill=False)
        limit = wanted.limit(made.before)
        assert made.after.macs <= limit
        last = max(removed(made.keep), key=lambda pair: float(scores[pair[0]][pair[1]]))
        assert graph.cost(put_back(made.keep, *last)).macs > limit


def test_all_targets_are_met_at_once(traced):
    graph, scores = traced
    targets = (MACs(at_most="60%"), Params(at_most="40%"), Bytes(at_most="30KiB"))
    made = plan(graph, scores, *targets)
    assert all(getattr(made.after, t.figure) <= t.limit(made.before) for t in targets)


def test_a_tighter_target_never_revives_a_unit(traced):
    graph, scores = traced
    loose = None
    for percent in range(95, 10, -5):
        tight = plan(graph, scores, MACs(at_most=f"{percent}%"), fill=False).keep
        if loose is not None:
            assert all(bool((~tight[name] | loose[name]).all()) for name in tight)
        loose = tight


def test_uniform_takes_the_same_share_of_every_group(traced):
    graph, scores = traced
    made = plan(graph, scores, MACs(at_most="50%"), allocation="uniform", fill=False)
    shares = [float(mask.double().mean()) for mask in made.keep.values()]
    assert max(shares) - min(shares) < 0.06


def test_out_of_reach_names_the_nearest_and_changes_nothing(traced):
    graph, scores = traced
    with pytest.raises(TargetError, match="nearest reachable is macs=") as refused:
        plan(graph, scores, MACs(at_most=10))
    nearest = str(refused.value).split("nearest reachable is macs=")[1].split("%")[0]
    made = plan(graph, scores, MACs(at_most=f"{float(nearest) + 0.1}%"))
    assert all(int(mask.sum()) >= 1 for mask in made.keep.values())


SENSELESS = ["0%", "100%", 0, -5, "150%", "many", "5 parsecs", "", True, float("nan"), float("inf")]


@pytest.mark.parametrize("budget", SENSELESS)
def test_senseless_budgets_are_refused(traced, budget):
    graph, scores = traced
    with pytest.raises(InputError):
        plan(graph, scores, MACs(at_most=budget))


def test_senseless_calls_are_refused(traced):
    graph, scores = traced
    with pytest.raises(InputError, match="no target"):
        plan(graph, scores)
    with pytest.raises(InputError, match="global, uniform"):
        plan(graph, scores, MACs(at_most="50%"), allocation="fair")
    with pytest.raises(InputError, match="macs=50%"):
        parse("speed=50%")


@pytest.mark.parametrize(
    ("text", "limit"),
    [("macs=1000", 1000), ("macs=1.5k", 1500), ("macs=2KiB", 2048), ("macs=50%", 50_000), ("MACS=1_000", 1000)],
)
def test_budgets_are_read(text, limit):
    from secateur.plan import Cost

    assert parse(text).limit(Cost(100_000, 0, 0)) == limit


def test_a_plan_for_another_model_is_refused(traced):
    graph, _ = traced
    with pytest.raises(PlanError, match="does not have"):
        graph.cost({"nowhere:out": torch.ones(4, dtype=torch.bool)})
    name = next(iter(graph.groups))
    with pytest.raises(PlanError, match="units"):
        graph.cost({name: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(PlanError, match="at least 1"):
        graph.cost({name: torch.zeros(graph.groups[name].size, dtype=torch.bool)})
