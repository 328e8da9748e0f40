"""The search for a measured target, with a clock that is only a formula: found in tolerance, under noise, or refused."""

import json
import random
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from secateur import cli
from secateur import score as criteria
from secateur.budget import MACs, MeasuredTarget, Params, PeakMemory, Reading, plan
from secateur.budget.between import between
from secateur.errors import InputError, TargetError
from secateur.measure import peak_bytes
from secateur.plan import Cost, Plan
from secateur.prune import _not_arithmetic, prune
from secateur.reach import Options, reach
from secateur.trace import trace

WHOLE = 1_000_000


class Cutout(nn.Module):
    """Stands for a cut model: the share of the MACs that is left."""

    def __init__(self, share):
        super().__init__()
        self.share = share


@dataclass(frozen=True)
class Clock(MeasuredTarget):
    """Seconds by a formula of the share of the MACs."""

    formula: object = None
    figure: ClassVar[str] = "latency"
    units: ClassVar[dict] = {"s": 1.0}
    example: ClassVar[str] = "'50%'"

    @contextmanager
    def beside(self, dense, args, kwargs=None):
        def read(cut, rounds):
            part, whole = self.formula(cut.share, rounds), self.formula(1.0, 10**9)
            return Reading(whole, part, part / whole, 0.0, rounds)

        yield read


def planner(fraction, units=1000, smallest=0):
    """A plan that keeps as many of one group's units as the fraction allows."""
    n = int(fraction * units)
    if n <= smallest:
        raise TargetError("no plan so small")
    keep = torch.arange(units) < n
    return Plan({"g": keep}, Cost(WHOLE, 1, 1), Cost(WHOLE * n // units, 1, 1))


def realise(made):
    return Cutout(made.after.macs / made.before.macs)


def line(base):
    return lambda share, rounds: base + (1 - base) * share


def steps(share, rounds):
    """Falls in steps, as where registers are filled up, and rises a little between them."""
    return 0.1 + 0.9 * (round(share * 100) / 100) - 0.05 * (share * 100 % 1) / 100


def noisy(seed, spread, base=0.1):
    rng = random.Random(seed)
    return lambda share, rounds: (base + (1 - base) * share) * (1 if rounds > 10**6 else rng.gauss(1, spread / rounds**0.5))


@pytest.mark.parametrize("percent", [90, 70, 50, 35, 20])
@pytest.mark.parametrize("formula", [line(0.0), line(0.15), steps], ids=["proportional", "with a base", "in steps"])
def test_the_asked_value_is_reached_and_not_passed(percent, formula):
    target = Clock(f"{percent}%", formula)
    found = reach(planner, realise, [target], nn.Identity(), ())
    assert 0.95 * percent <= 100 * found.achieved[0]["ratio"] <= percent
    assert found.achieved[0]["rounds"] == Options.final_rounds
    assert len(found.trail) <= 12


@pytest.mark.parametrize("seed", range(12))
def test_noise_is_lived_with(seed):
    """Three per cent of noise on a step, under two on the reading that decides."""
    target = Clock("50%", noisy(seed, 0.1))
    found = reach(planner, realise, [target], nn.Identity(), ())
    assert found.achieved[0]["ratio"] <= 0.5
    truth = line(0.1)(found.plan.after.macs / WHOLE, 0)
    assert 0.45 < truth < 0.53


def test_readings_that_noise_spoilt_are_taken_back():
    """Plans of 12 to 20 % of the MACs fit, and look at first as if they did not: the search must not end below them."""

    def formula(share, rounds):
        return share**0.5 * (1.5 if 0.12 < share < 0.2 and rounds < Options.final_rounds else 1)

    found = reach(planner, realise, [Clock("50%", formula)], nn.Identity(), ())
    assert any(0.12 < t.fraction < 0.2 and not t.meets for t in found.trail)
    assert 0.475 <= found.achieved[0]["ratio"] <= 0.5


def test_a_deciding_reading_that_misses_goes_on():
    """Every first reading is a tenth too low, so what looks near enough is not."""
    formula = lambda share, rounds: share * (0.9 if rounds < Options.final_rounds else 1.0)  # noqa: E731
    found = reach(planner, realise, [Clock("50%", formula)], nn.Identity(), ())
    assert 0.45 <= found.achieved[0]["ratio"] <= 0.5
    assert any(t.note == "again" and not t.meets for t in found.trail)


def test_all_targets_are_met_at_once():
    targets = [Clock("60%", line(0.0)), Clock("0.5s", line(0.3)), Clock("70%", steps)]
    found = reach(planner, realise, targets, nn.Identity(), ())
    assert all(row["share"] <= 1 for row in found.achieved)
    assert max(row["share"] for row in found.achieved) >= 0.95
    assert found.achieved[1]["achieved"] <= 0.5


def test_a_planner_bound_by_another_target_ends_the_search():
    bound = lambda fraction: planner(min(fraction, 0.3))  # noqa: E731
    found = reach(bound, realise, [Clock("60%", line(0.0))], nn.Identity(), ())
    assert found.plan.after.macs == 0.3 * WHOLE
    assert len(found.trail) == 2  # once, and once more to decide: equal widths are not measured again


def test_the_trail_tells_every_step():
    told = []
    found = reach(planner, realise, [Clock("50%", line(0.2))], nn.Identity(), (), None, Options(say=told.append))
    assert len(told) == len(found.trail) >= 2
    for step, line_told in zip(found.trail, told, strict=True):
        facts = step.to_json()
        assert facts["macs"] == step.plan.after.macs / WHOLE and len(facts["widths"]) == 12
        assert facts["share"] == pytest.approx((0.2 + 0.8 * facts["macs"]) / 0.5)
        assert facts["seconds"] >= 0 and facts["readings"][0]["rounds"] == facts["rounds"]
        assert f"{100 * facts['macs']:.1f} % of the MACs" in line_told
    assert found.trail[-1].rounds == Options.final_rounds
    assert [t.widths for t in found.trail if t.plan == found.plan]


@pytest.mark.parametrize("smallest", [0, 40, 300])
def test_out_of_reach_names_the_nearest(smallest):
    target = Clock("25%", line(0.3))
    with pytest.raises(TargetError, match="out of reach") as refused:
        reach(lambda f: planner(f, smallest=smallest), realise, [target], nn.Identity(), ())
    nearest = float(str(refused.value).split("nearest reachable is latency=")[1].split("%")[0])
    floor = 100 * line(0.3)((smallest + 1) / 1000, 0)
    assert floor <= nearest <= 1.06 * floor + 2
    found = reach(lambda f: planner(f, smallest=smallest), realise, [Clock(f"{nearest}%", line(0.3))], nn.Identity(), ())
    assert 100 * found.achieved[0]["ratio"] <= nearest


def test_another_target_out_of_reach_is_said_as_the_planner_says_it():
    def never(fraction):
        raise TargetError("params cannot be met")

    with pytest.raises(TargetError, match="params cannot be met"):
        reach(never, realise, [Clock("50%", line(0.1))], nn.Identity(), ())


def test_a_budget_above_the_dense_model_is_refused():
    with pytest.raises(InputError, match="dense model takes"):
        reach(planner, realise, [Clock("2s", line(0.1))], nn.Identity(), ())
    with pytest.raises(InputError, match="dense model takes"):  # and where a percentage is asked beside it
        reach(planner, realise, [Clock("50%", line(0.1)), Clock("1.5s", line(0.1))], nn.Identity(), ())
    with pytest.raises(InputError, match="measured"):
        reach(planner, realise, [], nn.Identity(), ())


def eights(made):
    """Rounded up to a multiple of eight units."""
    n = -(-int(made.keep["g"].sum()) // 8) * 8
    return Plan({"g": torch.arange(1000) < n}, made.before, Cost(WHOLE * n // 1000, 1, 1), {"aligned": 8})


@pytest.mark.parametrize(("speed", "kept"), [(0.5, True), (0.9, True), (1.1, False)])
def test_a_form_is_kept_where_it_measures_no_slower(speed, kept):
    """As where a runtime has a fast kernel for multiples of eight: more units stay at the same latency."""

    def formula(share, rounds):
        return share * (speed if round(share * 1000) % 8 == 0 and share < 1 else 1)

    odd = lambda f: planner(f - 0.003 if round(1000 * f) % 8 == 0 else f)  # noqa: E731  # never aligned by itself
    plain = reach(odd, realise, [Clock("40%", formula)], nn.Identity(), ())
    found = reach(odd, realise, [Clock("40%", formula)], nn.Identity(), (), None, Options(forms=[eights]))
    assert found.trail[1].note == "aligned to 8"
    assert 0.37 <= found.achieved[0]["ratio"] <= 0.4
    assert (found.plan.why.get("aligned") == 8) is kept
    if kept:
        assert found.plan.after.macs > plain.plan.after.macs * 1.05


def test_a_form_that_cannot_go_so_low_is_given_up():
    """Aligned, at least eight units stay, and those are too slow; as planned it goes on to fewer."""
    formula = lambda share, rounds: max(share * 0.9 if round(share * 1000) % 8 == 0 else share, 1e-4)  # noqa: E731
    found = reach(planner, realise, [Clock("0.004s", formula)], nn.Identity(), (), None, Options(forms=[eights]))
    assert "aligned" not in found.plan.why and 0 < found.achieved[0]["achieved"] <= 0.004
    assert sum(t.plan.why.get("aligned") == 8 for t in found.trail) > 2


def test_gradients_are_there_for_the_planner_and_gone_for_the_clock():
    seen = []

    def watching(fraction):
        seen.append(torch.is_grad_enabled())
        return planner(fraction)

    @dataclass(frozen=True)
    class Still(Clock):
        @contextmanager
        def beside(self, dense, args, kwargs=None):
            with torch.no_grad(), super().beside(dense, args, kwargs) as read:
                yield read

    reach(watching, realise, [Still("50%", line(0.1))], nn.Identity(), ())
    assert all(seen) and torch.is_grad_enabled()


# ---------------------------------------------------------------- through prune()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.wide = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.wide(self.stem(x).relu()).relu().mean((2, 3)))


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def test_prune_meets_peak_memory_beside_counted_targets(net):
    targets = (PeakMemory("60%"), MACs("80%"), Params("90%"))
    result = prune(net, (X,), *targets)
    whole, part = peak_bytes(net, (X,)), peak_bytes(result.model, (X,))
    assert 0.55 * whole <= part <= 0.6 * whole
    rows = result.plan.why["achieved"]
    assert [row["target"] for row in rows] == [str(t) for t in targets] == result.plan.why["targets"]
    assert (rows[0]["dense"], rows[0]["achieved"], rows[0]["asked"]) == (whole, part, "60%")
    assert (rows[1]["achieved"], rows[1]["limit"]) == (result.after.macs, MACs("80%").limit(result.before))
    assert rows[2]["ratio"] == result.after.params / result.before.params <= 0.9
    assert result.plan.why["trail"] and result.proof.passed
    assert Plan.from_json(result.plan.to_json()) == result.plan


def test_a_counted_target_binds_where_it_is_the_tighter(net):
    result = prune(net, (X,), PeakMemory("90%"), MACs("30%"))
    assert result.after.macs <= 0.3 * result.before.macs
    memory, macs = result.plan.why["achieved"]
    assert memory["share"] <= 1 and macs["ratio"] <= 0.3


def test_prune_tells_what_it_achieved_of_counted_targets_too(net):
    result = prune(net, (X,), MACs("50%"))
    (row,) = result.plan.why["achieved"]
    assert (row["figure"], row["asked"], row["achieved"]) == ("macs", "50%", result.after.macs)
    assert row["ratio"] <= 0.5 and "trail" not in result.plan.why


def test_prune_to_a_latency_on_onnxruntime(net):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from secateur.budget import Latency

    result = prune(net, (X,), Latency("80%", runtime="onnxruntime"))
    (row,) = result.plan.why["achieved"]
    assert row["share"] <= 1 and row["settings"] == {"runtime": "onnxruntime", "batch": None, "threads": 1, "dtype": "float32"}
    assert result.after.macs < result.before.macs


def test_a_real_planner_gives_a_plan_at_every_step(net):
    graph = trace(net, (X,))
    scores = criteria.l2(graph, net)
    dense = graph.cost()
    found = reach(
        lambda f: plan(graph, scores, MACs(int(f * dense.macs))),
        lambda made: Cutout(made.after.macs / made.before.macs), [Clock("40%", line(0.05))], net, (X,),
    )  # fmt: skip
    assert 0.38 <= found.achieved[0]["ratio"] <= 0.4


# ---------------------------------------------------------------- on the command line
NET = f"{Path(__file__).parent / 'models' / 'nets.py'}:net"


def test_the_command_line_prints_asked_and_achieved(capsys):
    assert cli.main(["prune", NET, "--at-most", "peak_memory=90%", "--at-most", "macs=70%", "--input", "4x1x8x8"]) == 0
    text = capsys.readouterr().out
    assert "asked PeakMemory(at_most='90%')" in text and "asked MACs(at_most='70%')" in text
    assert cli.main(["prune", NET, "--at-most", "peak_memory=90%", "--input", "4x1x8x8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["why"]["achieved"][0]["ratio"] <= 0.9 and facts["why"]["trail"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["prune", NET, "--at-most", "latency=120%"], 2, "below 100 %"),
        (["prune", NET, "--at-most", "latency=60%@tensorrt"], 2, "unknown runtime 'tensorrt'"),
        (["measure", NET, "--runtime", "tensorrt", "--input", "4x1x8x8"], 2, "unknown runtime 'tensorrt'"),
        (["prune", NET, "--at-most", "peak_memory=1%", "--input", "4x1x8x8"], 1, "nearest reachable is peak_memory="),
    ],
)
def test_the_command_line_refuses_in_words(capsys, arguments, code, said):
    assert cli.main(arguments) == code
    assert said in capsys.readouterr().err


# ------------------------------------------------------------ between two plans
def two_kinds(fraction, units=1000):
    """Below 0.3 a second group is nearly gone as well, and what it costs falls at once."""
    n, m = int(fraction * units), 5 if fraction < 0.3 else 100
    keep = {"g": torch.arange(units) < n, "h": torch.arange(100) < m}
    return Plan(keep, Cost(WHOLE, 1, 1), Cost(WHOLE * n // units, 1, 1), {"h": m})


def by_both(cut, rounds):
    return 0.5 * cut.share + 0.5 * cut.h


@dataclass(frozen=True)
class Clock2(Clock):
    @contextmanager
    def beside(self, dense, args, kwargs=None):
        yield lambda cut, rounds: Reading(1.0, by_both(cut, rounds), by_both(cut, rounds), 0.0, rounds)


def realise_both(made):
    cutout = realise(made)
    cutout.h = int(made.keep["h"].sum()) / 100
    return cutout


def halfway(smaller, larger, t):
    extra = (larger.keep["h"] & ~smaller.keep["h"]).nonzero()[:, 0]
    keep = {**smaller.keep, "h": smaller.keep["h"].clone()}
    keep["h"][extra[: round(t * len(extra))]] = True
    return Plan(keep, smaller.before, smaller.after, smaller.why)


@pytest.mark.parametrize("percent", [60, 45, 30, 20])
def test_a_jump_of_the_figure_is_filled_from_the_plans_on_both_sides(percent):
    """From 0.65 it falls to 0.17 between two fractions next to each other."""
    alone = reach(two_kinds, realise_both, [Clock2(f"{percent}%")], nn.Identity(), ())
    assert alone.achieved[0]["ratio"] < 0.9 * percent / 100
    found = reach(two_kinds, realise_both, [Clock2(f"{percent}%")], nn.Identity(), (), options=Options(between=halfway))
    assert 0.95 * percent <= 100 * found.achieved[0]["ratio"] <= percent
    assert found.achieved[0]["rounds"] == Options.final_rounds


def test_between_two_plans(net):
    graph = trace(net, (torch.randn(2, 3, 8, 8),))
    scores = criteria.score(graph, net, "l2")
    smaller, larger = (plan(graph, scores, MACs(p)) for p in ("30%", "70%"))
    before = smaller
    for t in (0.0, 0.2, 0.5, 0.8, 1.0):
        made = between(graph, smaller, larger, scores, t)
        assert all(bool((m <= made.keep[n]).all()) for n, m in before.keep.items())  # never loses a unit again
        assert made.after == graph.cost(made.keep)
        extra = sum(int((m & ~smaller.keep[n]).sum()) for n, m in larger.keep.items())
        assert sum(int(m.sum()) for m in made.keep.values()) == sum(int(m.sum()) for m in smaller.keep.values()) + round(t * extra)
        before = made
    assert all(torch.equal(m, larger.keep[n] | smaller.keep[n]) for n, m in made.keep.items())


def test_a_cut_far_deeper_than_the_time_it_saves_is_told():
    row = {"target": "Latency(at_most='70%')", "figure": "latency", "ratio": 0.66}
    (note,) = _not_arithmetic([row], 0.007)
    assert "66 % of the time is left with 0.7 % of the multiply-accumulates" in note
    assert not _not_arithmetic([row], 0.4) and not _not_arithmetic([{**row, "figure": "macs"}], 0.007)
