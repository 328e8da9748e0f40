"""The no-training benchmark: it resumes, its samples never meet, its baselines and its table say what they mean."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import nn

import secateur as sc
from benchmarks import cifar
from benchmarks.no_training import __main__ as command
from benchmarks.no_training import methods, peer, scores, split, table, texts
from benchmarks.no_training.rows import Store, every_row
from benchmarks.no_training.tasks import TASKS, Task
from secateur.measure import count

SEEDS = range(6)


def has_data() -> bool:
    try:
        return cifar.folder().exists()
    except FileNotFoundError:
        return False


needs_data = pytest.mark.skipif(not has_data(), reason="the data folder is not here (SECATEUR_DATA)")


class Small(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b, self.out = nn.Conv2d(12, 10, 1), nn.Linear(10, 4)

    def forward(self, x):
        return self.out(self.b(self.n(self.a(x)).relu()).relu().mean((2, 3)))


def small_task(**changes) -> Task:
    x, y = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4

    def dense():
        torch.manual_seed(0)
        return Small().eval()

    options = {"shares": {"÷2.0": 0.5}, "bars": {"÷2.0": 90.0}, "calibration": "8 random images", "screen": None}
    return Task("small", dense, lambda: (x[:2],), lambda seed: [(x, y)], lambda model, first: {"top1": 50.0}, **(options | changes))


# ------------------------------------------------------------------ rows and resuming
def job(tmp_path, measure, resume=True):
    store = Store(tmp_path / "small.jsonl")
    return command.Job(small_task(), store, store.done() if resume else set(), measure)


def test_what_is_done_does_not_run_again(tmp_path):
    calls = []

    def measure(task, name, ratio, seed, first):
        calls.append((name, ratio, seed))
        return {"top1": 80.0 + seed, "macs_percent": 50.0, "seconds": 1.0}

    first = job(tmp_path, measure)
    for seed in (0, 1):
        first.run("magnitude", "÷2.0", seed)
    again = job(tmp_path, measure)
    for seed in (0, 1, 2):
        again.run("magnitude", "÷2.0", seed)
    assert calls == [("magnitude", "÷2.0", s) for s in (0, 1, 2)]
    assert [r["top1"] for r in every_row(tmp_path)] == [80.0, 81.0, 82.0]


def test_a_row_is_on_disk_before_the_next_starts(tmp_path):
    seen = []

    def measure(task, name, ratio, seed, first):
        path = tmp_path / "small.jsonl"
        seen.append(len(path.read_text().splitlines()) if path.exists() else 0)
        return {"top1": 1.0}

    run = job(tmp_path, measure)
    for seed in range(3):
        run.run("random", "÷2.0", seed)
    assert seen == [0, 1, 2]


def test_a_failure_is_a_row_and_runs_again_only_when_asked(tmp_path):
    def fails(task, name, ratio, seed, first):
        raise ValueError("no ratio\nmeets it")

    row = job(tmp_path, fails).run("flap", "÷2.0", 0)
    assert row["error"] == "ValueError: no ratio meets it"
    store = Store(tmp_path / "small.jsonl")
    assert store.done() == {("small", "÷2.0", "flap", 0)} and store.done(failed_too=False) == set()


def test_what_the_library_cannot_do_yet_leaves_no_row(tmp_path):
    def not_yet(task, name, ratio, seed, first):
        raise NotImplementedError("not in this version")

    assert job(tmp_path, not_yet).run("ours", "÷2.0", 0) is None
    assert not every_row(tmp_path)


def test_the_last_row_of_a_key_counts(tmp_path):
    run = job(tmp_path, lambda task, name, ratio, seed, first: {"top1": 1.0})
    run.run("random", "÷2.0", 0)
    fresh = job(tmp_path, lambda task, name, ratio, seed, first: {"top1": 2.0}, resume=False)
    fresh.run("random", "÷2.0", 0)
    assert [r["top1"] for r in every_row(tmp_path)] == [2.0]
    assert len((tmp_path / "small.jsonl").read_text().splitlines()) == 2


def test_the_best_variant_runs_with_every_seed(tmp_path, monkeypatch):
    names = [f"{peer.PREFIX}{c}/local/all" for c in ("l2", "taylor", "fpgm")]
    monkeypatch.setattr(peer, "variants", lambda task: names)

    def measure(task, name, ratio, seed, first):
        if "l2" in name:
            raise RuntimeError("cannot")
        return {"top1": 70.0 if "taylor" in name else 60.0}

    job(tmp_path, measure).torch_pruning("÷2.0", [0, 1, 2])
    best = [r for r in every_row(tmp_path) if r["method"] == "torch_pruning"]
    assert [(r["variant"], r["seed"]) for r in best] == [(names[1], s) for s in (0, 1, 2)]


def test_the_committed_rows_are_whole():
    rows = every_row()
    assert rows and {r["task"] for r in rows} <= set(TASKS)
    for row in rows:
        task = TASKS[row["task"]]
        assert "error" in row or (row["method"] == "dense") or row["macs"] <= row["macs_asked"], row
        assert "error" in row or math.isfinite(row[task.metric])
        assert "torch" in row["versions"]
        assert json.loads(json.dumps(row)) == row


# ------------------------------------------------------------------ samples
def test_keyword_windows_calibrate_or_are_measured():
    halves = [split.keywords(seed) for seed in SEEDS]
    for calibration, test in halves:
        assert not set(calibration.tolist()) & set(test.tolist())
        assert len(set(calibration.tolist())) == split.KEYWORDS and len(set(test.tolist())) == 500
    assert all(torch.equal(halves[0][1], test) for _, test in halves)
    assert all(not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(halves))


def test_images_calibrate_from_training_files_alone():
    assert {split.cifar_file(seed) for seed in range(20)} == {f"train_{i}" for i in range(5)}
    rows = [set(split.chosen(10_000, split.CALIBRATION, seed).tolist()) for seed in SEEDS]
    assert all(len(r) == split.CALIBRATION for r in rows) and rows[0] != rows[1]


def test_characters_are_measured_after_those_that_calibrate():
    calibration, validation = split.characters(1_115_394)
    assert calibration.stop == validation.start == 1_003_854 and validation.stop == 1_115_394


def test_about_half_of_the_files_are_measured():
    files = [f"numpy/lib/part_{i}.py" for i in range(1000)]
    measured = [f for f in files if split.measured(f)]
    assert 400 < len(measured) < 600 and measured == [f for f in files if split.measured(f)]


@needs_data
def test_the_keyword_network_gives_its_number():
    from benchmarks.no_training import tasks

    x, y = tasks.keyword_samples(slice(None))
    model = TASKS["kws_dscnn"].dense()
    assert cifar.accuracy(model, x, y) == pytest.approx(91.3)
    assert TASKS["kws_dscnn"].evaluate(model, None)["top1"] == pytest.approx(91.6)


@needs_data
@pytest.mark.parametrize("name", ["kws_dscnn", "ic_resnet8", "fashion_vit", "lm_shakespeare"])
def test_calibration_batches_are_equal_and_few(name):
    batches = TASKS[name].calibrate(1)
    assert len({x.shape for x, _ in batches}) == 1
    assert sum(len(x) for x, _ in batches) <= split.CALIBRATION
    again = TASKS[name].calibrate(1)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0][0], TASKS[name].calibrate(2)[0][0])


# ------------------------------------------------------------------ baselines
def test_removed_constants_go_into_the_biases():
    """Units that never change cost nothing when their mean moves into the next bias, with and without one of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[:4] = 0
        model[0].bias[:4] = torch.tensor([1.0, 2.0, 0.5, 3.0])
    x = torch.randn(40, 5)
    moments = scores.Moments(model, [x[:20], x[20:]])
    assert torch.allclose(moments.variance("2")[:4], torch.zeros(4, dtype=torch.float64), atol=1e-12)
    limit = sc.MACs(at_most=20 * 5 * 4 + 20 * 4 * 4 + 20 * 4 * 3)
    result = sc.prune(model, (x[:20],), limit, score=scores.flap(moments))
    assert [int(k.sum()) for k in result.plan.keep.values()] == [4, 4]
    wrong = result.model(x)
    assert scores.compensate(result, model, moments) == 2
    assert torch.allclose(result.model(x), model(x), atol=1e-5) and not torch.allclose(wrong, model(x), atol=1e-2)


def test_moments_are_those_of_all_positions():
    model, x = Small().eval(), torch.randn(4, 3, 6, 6)
    moments = scores.Moments(model, [x[:1], x[1:]])
    assert torch.allclose(moments.mean("a"), x.double().mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(moments.variance("a"), x.double().var((0, 2, 3), correction=0), atol=1e-6)


def test_taylor_is_the_squared_product_of_weight_and_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(10, 4), torch.arange(10) % 3
    batches, loss = [(x[:5], y[:5]), (x[5:], y[5:])], nn.functional.cross_entropy
    graph = sc.trace(model, (x[:2],))
    (found,) = scores.taylor(batches, loss)(graph, model, 0).values()
    wanted = torch.zeros(6)
    for a, b in batches:
        w, c = torch.autograd.grad(loss(model(a), b), [model[0].weight, model[0].bias])
        for unit in range(6):
            wanted[unit] += sum(model[0].weight[unit, j].detach() * w[unit, j] for j in range(4)) ** 2
            wanted[unit] += (model[0].bias[unit].detach() * c[unit]) ** 2
    assert torch.allclose(found.float(), wanted / wanted.mean(), rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_the_residual_stream_stays_where_it_is_told_to():
    graph = sc.trace(Small().eval(), (torch.zeros(2, 3, 6, 6),))
    found = scores.inside(sc.score.l2, ["a"])(graph, Small().eval(), 0)
    assert [bool(torch.isinf(s).all()) for s in found.values()] == ["a" in n for n in ("a:out", "b:out")]


def test_a_baseline_meets_the_budget_in_integers():
    task = small_task()
    for name in ("magnitude", "random", "taylor"):
        model, info = methods.METHODS[name](task, 0.5, 0)
        assert count(model, task.args()).macs <= 0.5 * count(task.dense(), task.args()).macs
        assert info["how"] == "attributes" and info["batch_norm_batches"] == 1


@pytest.mark.parametrize("criterion", ["l2", "taylor", "lamp", "fpgm", "bn_scale"])
def test_the_peer_stops_at_the_first_ratio_that_meets_the_budget(criterion):
    pytest.importorskip("torch_pruning")
    task = small_task()
    variant = peer.Variant.parse(f"{peer.PREFIX}{criterion}/local/all")
    model, info = variant.run(task, 0.5, 0)
    limit = 0.5 * count(task.dense(), task.args()).macs
    assert count(model, task.args()).macs <= limit
    if criterion != "taylor":  # which needs gradients on the copy
        less = variant.step(task, task.dense(), info["channel_ratio"] - 1 / peer.STEPS)
        assert count(less, task.args()).macs > limit


# ------------------------------------------------------------------ texts
def test_agreement_against_a_slow_count():
    generator = torch.Generator().manual_seed(3)
    dense = nn.functional.normalize(torch.randn(30, 6, generator=generator), dim=1)
    e = nn.functional.normalize(dense + 0.3 * torch.randn(30, 6, generator=generator), dim=1)
    best, first, ten = 0, 0, 0.0
    for i in range(30):
        others = [j for j in range(30) if j != i]
        mine = sorted(others, key=lambda j, i=i: -float(e[i] @ e[j]))
        theirs = sorted(others, key=lambda j, i=i: -float(dense[i] @ dense[j]))
        best += mine[0] == (i + 1 if i % 2 == 0 else i - 1)
        first += mine[0] == theirs[0]
        ten += len(set(mine[:10]) & set(theirs[:10])) / 10
    found = texts.agreement(e, dense)
    assert found["other_half"] == round(100 * best / 30, 2) and found["neighbour@1"] == round(100 * first / 30, 2)
    assert found["neighbours@10"] == pytest.approx(100 * ten / 30, abs=0.01)
    same = texts.agreement(dense, dense)
    assert same["neighbours@10"] == 100 and same["spearman"] == 1 > found["spearman"] > 0.3


def test_contrast_is_small_when_halves_agree():
    halves = torch.eye(8).repeat_interleave(2, 0)
    assert float(texts.contrast(halves, torch.arange(16) // 2)) < 1e-3
    assert float(texts.contrast(halves.roll(1, 0), torch.arange(16) // 2)) > 1


# ------------------------------------------------------------------ the table
def rows(method, values, **more):
    common = {"task": "ic_resnet8", "ratio": "÷1.5", "method": method, "macs_percent": 66.6, "seconds": 3.0}
    return [common | {"seed": i, "top1": v} | more for i, v in enumerate(values)]


def test_the_table_shows_mean_and_deviation():
    text = table.table([*rows("ours", [85.0, 86.0, 87.0]), *rows("random", [10.0])])
    assert "| ÷1.5 | **secateur**, inputs only | 86.00 ± 1.00 | ≥ 85.21: met | 66.60 % | 3 | 3 |" in text
    assert "| ÷1.5 | random, BN re-estimated | 10.00 |  | 66.60 % | 3 | 1 |" in text


def test_the_table_says_when_a_bar_is_missed_and_how_a_method_failed():
    failed = [{"task": "ic_resnet8", "ratio": "÷1.5", "method": "flap", "seed": 0, "error": "ValueError: no"}]
    text = table.table([*rows("ours", [84.0, 85.0]), *failed, *rows("torch_pruning", [80.0], variant=f"{peer.PREFIX}l2/local/all")])
    assert "≥ 85.21: missed" in text and "failed: ValueError: no" in text and "(l2/local/all)" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_less_perplexity_is_better():
    task = TASKS["lm_shakespeare"]
    assert table.asked(task, "−20 %", [{"perplexity": 4.7}]) == "≤ 4.769: met"
    assert table.asked(task, "−20 %", [{"perplexity": 4.8}]) == "≤ 4.769: missed"
