"""Several budgets from one set of statistics: the same as one by one, saved as they come, and taken up again."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import explore
from secateur.budget import Latency, MACs, Params, parse_points
from secateur.errors import InputError, TargetError
from secateur.score import CRITERIA

PRUNE = sys.modules["secateur.prune"]  # the name in the package is the function
SWEEP = sys.modules["secateur.sweep"]
NETS = Path(__file__).parent / "models" / "nets.py"
NET, ROWS = f"{NETS}:net", f"{NETS}:rows"
LEVELS = ("macs=80%", "macs=60%", "macs=40%")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.wide, self.back = nn.Conv2d(12, 24, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.back(self.wide(x).relu())).relu().mean((2, 3)))


class Once:
    """Batches that count how often they are gone through."""

    def __init__(self):
        random = torch.Generator().manual_seed(3)
        self.batches = [(torch.randn(64, 1, 8, 8, generator=random), torch.randint(0, 10, (64,), generator=random)) for _ in range(4)]
        self.read = 0

    def __iter__(self):
        self.read += 1
        return iter(self.batches)


X = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
BUDGETS = [MACs("80%"), MACs("60%"), (MACs("70%"), Params("50%"))]


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.head.weight.mul_(30)  # so that its outputs differ by more than their rounding
    return model


def same(one, other):
    states = [r.model.state_dict() for r in (one, other)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert all(torch.equal(one.plan.keep[n], other.plan.keep[n]) for n in one.plan.keep) and one.after == other.after


# ---------------------------------------------------------------- the function
@pytest.mark.parametrize("chosen", [{}, {"score": "taylor", "repair": "batch_norm"}, {"score": "l2"}, {"allocation": "sensitivity"}])
def test_every_point_is_what_prune_gives(net, chosen):
    before = {n: t.clone() for n, t in net.state_dict().items()}
    for one, point in zip(sc.sweep(net, X, BUDGETS, data=Once(), **chosen), BUDGETS, strict=True):
        targets = point if isinstance(point, tuple) else (point,)
        same(one, sc.prune(net, X, *targets, data=Once(), **chosen))
        assert all(getattr(one.after, t.figure) <= t.limit(one.before) for t in targets)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_model_is_traced_and_the_data_read_once(net, monkeypatch):
    seen = {"trace": 0, "study_of": 0}
    for name in seen:
        real = getattr(PRUNE, name)

        def counted(*a, real=real, name=name, **k):
            seen[name] += 1
            return real(*a, **k)

        monkeypatch.setattr(PRUNE, name, counted)
    data = Once()
    found = sc.sweep(net, X, BUDGETS, data=data)
    assert seen == {"trace": 1, "study_of": 1} and data.read == 1
    assert found[0].study is found[1].study is found[2].study


@pytest.mark.parametrize("chosen", [(), ("--score", "l2")])
def test_the_command_collects_statistics_once(run, tmp_path, monkeypatch, chosen):
    study = sys.modules["secateur.repair.study"]
    made, real = [], study.chunks
    monkeypatch.setattr(study, "chunks", lambda *a, **k: made.append(a) or real(*a, **k))
    run(*order(tmp_path / "out", *chosen))
    assert len(made) == 1
    run("prune", NET, "--at-most", "macs=60%", "--data", ROWS, *chosen)
    assert len(made) == 2


def test_what_is_done_is_handed_out_before_what_fails(net):
    done = []
    with pytest.raises(TargetError):
        sc.sweep(net, X, [MACs("80%"), MACs("0.1%"), MACs("60%")], data=Once(), each=done.append)
    assert [str(r.plan.why["targets"][0]) for r in done] == ["MACs(at_most='80%')"]


def test_senseless_budgets_are_refused_before_anything_is_computed(net):
    done, data = [], Once()
    for budgets, says in (([MACs("80%"), MACs("120%")], "below 100 %"), ([], "no budgets"), ([()], "no target")):
        with pytest.raises(InputError, match=says):
            sc.sweep(net, X, budgets, data=data, each=done.append)
    assert done == [] and data.read == 0


def test_divergence_is_that_of_the_softmax_on_the_last_rows(net):
    data = Once()
    (result,) = sc.sweep(net, X, [MACs("50%")], data=data)
    rows = torch.cat([x for x, _ in data.batches])[-128:]
    with torch.no_grad():
        p, q = net(rows).double().softmax(1), result.model(rows).double().softmax(1)
    assert SWEEP.divergence(result, data) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)
    assert data.read == 1


def test_obs_is_a_card_that_only_prune_can_play(net):
    with pytest.raises(InputError, match=r"(?s)score='obs'.*prune\("):
        sc.score.score(sc.trace(net, X), net, "obs", calibration=object())
    assert CRITERIA["obs"].needs == "inputs"
    scores = sc.sweep(net, X, [MACs("50%")], data=Once())[0].study.scores()
    assert all((s[torch.isfinite(s)] >= 0).all() for s in scores.values())


# ---------------------------------------------------------------- lists of budgets
def test_lists_of_budgets_are_read():
    assert parse_points(["macs=80%, 60%"]) == {"macs=80%": [MACs("80%")], "macs=60%": [MACs("60%")]}
    both = parse_points(["macs=80%,60%", "params=50%"])
    assert both == {"macs=80% params=50%": [MACs("80%"), Params("50%")], "macs=60% params=50%": [MACs("60%"), Params("50%")]}
    timed = Latency("60%", "onnxruntime", batch=1, threads=2)
    assert parse_points(["latency=80%,60%@onnxruntime,batch=1,threads=2"])["latency=60%@onnxruntime,batch=1,threads=2"] == [timed]


@pytest.mark.parametrize(
    ("texts", "says"),
    [(["macs=80%,,40%"], "no list"), (["macs="], "no list"), (["macs"], "no list"), (["flops=80%,60%"], "not a target"), (["macs=60%,60%"], "twice"),
     (["macs=80%,60%,40%", "params=80%,60%"], "2 budgets where another has 3"), (["latency=batch=1"], "no list")],
)  # fmt: skip
def test_lists_that_are_none_are_refused(texts, says):
    with pytest.raises(InputError, match=says):
        parse_points(texts)


# ---------------------------------------------------------------- the command
def order(out, *more, levels=LEVELS):
    return ("sweep", NET, "--at-most", "macs=" + ",".join(x.removeprefix("macs=") for x in levels), "--data", ROWS, "-o", out, *more)


def test_a_sweep_saves_every_point_and_draws_the_front(run, tmp_path):
    out = tmp_path / "out"
    text = run(*order(out, "--latency"))
    for word in (*LEVELS, "dense", "as cut", "divergence", "time", "score obs, allocation search, repair gauss_newton", str(out)):
        assert word in text
    sheet = json.loads((out / "report.json").read_text())
    assert [row["label"] for row in sheet["pareto"]] == ["dense", *LEVELS]
    dense, *points = sheet["pareto"]
    assert dense["share"] == 1 and dense["accuracy"] is not None and dense["seconds"] > 0
    for row, level in zip(points, (0.8, 0.6, 0.4), strict=True):
        assert row["share"] == row["macs"] / dense["macs"] <= level
        assert row["kl"] >= 0 and row["seconds"] > 0 and set(row["stages"]) == {"cut", "batch_norm", "repaired"}
        assert sc.load(out / row["folder"])(torch.randn(3, 1, 8, 8)).shape == (3, 10)
        assert json.loads((out / row["folder"] / "report.json").read_text())["proof"]["passed"]
    page = (out / "report.html").read_text()
    assert 'id="pareto"' in page and "A sweep of" in page and "Nothing was measured" not in page
    assert "secateur sweep" in sheet["settings"]["command"]


def test_json_of_a_sweep_and_nothing_written_without_a_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = json.loads(run("sweep", NET, "--at-most", "macs=80%,50%", "--input", "1x1x8x8", "--json"))
    assert [row["label"] for row in facts["points"]] == ["macs=80%", "macs=50%"] and facts["folder"] is None
    assert facts["settings"]["score"] == "l2" and facts["dense"]["accuracy"] is None and facts["batch"] == 2
    half = facts["dense"]["macs"] // 4  # of one row
    same_budget = json.loads(run("sweep", NET, "--at-most", f"macs={half}", "--input", "1x1x8x8", "--json"))
    assert same_budget["points"][0]["macs"] == facts["points"][1]["macs"], "a number is meant for the row that was given"
    assert list(tmp_path.iterdir()) == []


def test_sensitivity_is_in_the_report_where_it_was_computed(run, tmp_path):
    facts = json.loads(run(*order(tmp_path / "out", "--allocation", "sensitivity", "--json", levels=LEVELS[:1])))
    assert {row["group"] for row in facts["sensitivity"]} == {"a:out", "b:out"}
    assert 'id="sensitivity"' in (tmp_path / "out" / "report.html").read_text()


class Counted:
    """`explore.sweep`, counting its points; the `stop`-th save is an interruption."""

    def __init__(self, monkeypatch, stop=None):
        self.points, self.saves = [], 0
        real_sweep, real_save = explore.sweep, explore.save

        def sweep(model, args, targets, **k):
            self.points += targets
            return real_sweep(model, args, targets, **k)

        def save(*a):
            self.saves += 1
            if self.saves == stop:
                raise KeyboardInterrupt
            return real_save(*a)

        monkeypatch.setattr(explore, "sweep", sweep)
        monkeypatch.setattr(explore, "save", save)


def test_an_interrupted_sweep_is_taken_up_again(run, tmp_path):
    whole = json.loads(run(*order(tmp_path / "whole", "--json")))
    with pytest.MonkeyPatch.context() as patch:
        Counted(patch, stop=3)
        run(*order(tmp_path / "out"), code=130)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["macs_60pct", "macs_80pct"]
    kept = (tmp_path / "out" / "macs_80pct" / "plan.json").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        again = json.loads(run(*order(tmp_path / "out", "--resume", "--json")))
    assert counted.points == [[MACs("40%")]] and counted.saves == 1
    assert (tmp_path / "out" / "macs_80pct" / "plan.json").stat().st_mtime_ns == kept
    assert again["points"] == whole["points"]
    assert [row["label"] for row in json.loads((tmp_path / "out" / "report.json").read_text())["pareto"]] == ["dense", *LEVELS]


def test_points_of_other_jobs_are_put_together(run, tmp_path, monkeypatch):
    """One job for each budget, anywhere; then one report of all, for which only what is missing is computed."""
    how = ("--allocation", "sensitivity", "--repair", "bias", "--json")
    whole = json.loads(run(*order(tmp_path / "whole", *how)))
    for place, level in zip(("one", "two"), LEVELS[:2], strict=True):
        run(*order(tmp_path / "jobs" / place, *how, levels=[level]))
    run(*order(tmp_path / "jobs" / "foreign", "--score", "l2", levels=LEVELS[2:]))  # of other options: not taken
    out = (tmp_path / "jobs").rename(tmp_path / "brought home")
    counted = Counted(monkeypatch)
    found = json.loads(run(*order(out, "--resume", *how)))
    assert counted.points == [[MACs("40%")]]
    assert [row["folder"] for row in found["points"]] == ["one/macs_80pct", "two/macs_60pct", "macs_40pct"]
    same = [{k: v for k, v in row.items() if k not in ("folder", "plan_sha256")} for row in found["points"]]
    assert same == [{k: v for k, v in row.items() if k not in ("folder", "plan_sha256")} for row in whole["points"]]
    run(*order(out, "--resume", *how))  # with nothing left to do
    sheet = json.loads((out / "report.json").read_text())
    assert [row["label"] for row in sheet["pareto"]] == ["dense", *LEVELS] and sheet["sensitivity"] == whole["sensitivity"]
    assert counted.points == [[MACs("40%")]]
    for row in sheet["pareto"][1:]:
        assert sc.load(out / row["folder"])(torch.randn(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("spoiled", ["tensors", "plan of another", "options", "latency", "weights"])
def test_what_is_not_whole_or_of_another_sweep_is_computed_again(run, tmp_path, spoiled, monkeypatch):
    out, two = tmp_path / "out", LEVELS[:2]
    run(*order(out, levels=two))
    more: tuple = {"options": ("--score", "l2"), "latency": ("--latency",)}.get(spoiled, ())
    if spoiled == "tensors":
        path = out / "macs_60pct" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif spoiled == "plan of another":
        for path in (out / "macs_80pct").iterdir():
            (out / "macs_60pct" / path.name).write_bytes(path.read_bytes())
    elif spoiled == "weights":
        from safetensors.torch import save_file

        sys.path.insert(0, str(NETS.parent))
        import nets

        state = {k: v.clone() for k, v in nets.net().state_dict().items()}
        state["head.bias"] += 1e-3
        save_file(state, tmp_path / "w.safetensors")
        more = ("--weights", tmp_path / "w.safetensors")
    counted = Counted(monkeypatch)
    run(*order(out, "--resume", *more, levels=two))
    assert counted.points == ([[MACs("60%")]] if spoiled in ("tensors", "plan of another") else [[MACs("80%")], [MACs("60%")]])
    assert all(sc.load(out / name)(torch.randn(1, 1, 8, 8)).shape == (1, 10) for name in ("macs_80pct", "macs_60pct"))


REFUSALS = [
    (("sweep", NET, "--at-most", "macs=80%,,40%", "--data", ROWS), 2, r"'macs=80%,,40%' is no list of budgets.\n  Write macs=80%,60%,40%"),
    (("sweep", NET, "--at-most", "macs=80%,lots", "--data", ROWS), 2, r"'lots' is not a budget"),
    (("sweep", NET, "--at-most", "macs=80%,120%", "--data", ROWS), 2, r"below 100 %"),
    (("sweep", NET, "--at-most", "macs=lots", "--input", "1x1x8x8"), 2, r"'lots' is not a budget"),
    (("sweep", NET, "--data", ROWS), 2, r"--at-most"),
    (("sweep", NET, "--at-most", "macs=80%", "--input", "1x1x8x8", "--repair", "least_squares"), 2, r"needs calibration data"),
    (("sweep", NET, "--at-most", "macs=80%", "--data", ROWS, "--resume"), 2, r"nothing to resume without a folder"),
    (("inspect", NET, "--input", "1x1x8x8", "--sensitivity"), 2, r"no data.\n  Add --data"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSALS, ids=[" ".join(r[0][2:])[:50] for r in REFUSALS])
def test_what_cannot_be_is_refused_and_nothing_is_written(arguments, code, said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = run(*arguments, *(("-o", tmp_path / "out") if "--resume" not in arguments else ()), code=code)
    assert re.search(said, message, re.DOTALL), message
    assert "Traceback" not in message and list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_stays_as_it_is(run, tmp_path):
    (tmp_path / "out" / "macs_80pct").mkdir(parents=True)
    (tmp_path / "out" / "macs_80pct" / "thesis.txt").write_text("mine")
    run(*order(tmp_path / "out", levels=LEVELS[:1]), code=2)
    assert [p.name for p in (tmp_path / "out" / "macs_80pct").iterdir()] == ["thesis.txt"]


# ---------------------------------------------------------------- inspect --sensitivity
def test_the_sensitivity_of_every_group(run, tmp_path):
    arguments = ("inspect", NET, "--sensitivity", "--data", ROWS)
    facts = json.loads(run(*arguments, "--json", "-o", tmp_path / "out"))
    graph = sc.trace(__import__("nets").net(), (torch.randn(1, 1, 8, 8),))
    assert {row["group"] for row in facts["sensitivity"]} == set(graph.groups)
    for row in facts["sensitivity"]:
        points = row["points"]
        assert [p["units"] for p in points] == sorted((p["units"] for p in points), reverse=True)
        assert points[0]["kept"] == 1 and points[0]["error"] == 0 and points[-1]["units"] == 1
        assert all(a["error"] <= b["error"] and a["macs"] >= b["macs"] for a, b in zip(points, points[1:], strict=False))
        assert [p["removed"] for p in points if p["divergence"] is not None] == [2, 4, 6]
        for p in points:
            some = torch.arange(row["units"]) < p["units"]
            assert p["macs"] == graph.cost({row["group"]: some}).macs
    sheet = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sheet["sensitivity"] == facts["sensitivity"] and "--sensitivity" in sheet["settings"]["command"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="sensitivity"' in page and "What is lost where each of" in page
    text = run(*arguments)
    assert all(word in text for word in ("75 % kept", "25 % kept", "a:out", "divergence"))
    assert "sensitivity" not in json.loads(run("inspect", NET, "--data", ROWS, "--json"))
