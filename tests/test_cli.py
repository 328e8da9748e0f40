"""The command line: what it prints, what it writes, how it refuses, and with which exit code."""

import hashlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import secateur as sc
from secateur import cli

NETS = Path(__file__).parent / "models" / "nets.py"
NET = f"{NETS}:net"


def tree(path):
    files = [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of the net after a little training on digits, as safetensors."""
    from safetensors.torch import save_file

    sys.path.insert(0, str(NETS.parent))
    import nets

    model = nets.net().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    train = sc.models.load_data("digits").train
    for epoch in range(18):
        if epoch == 12:
            optimizer.param_groups[0]["lr"] = 1e-3  # else the running statistics trail behind, and how far is a matter of the machine
        for x, y in train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file({k: v.clone() for k, v in model.state_dict().items()}, path)
    return path


# ---------------------------------------------------------------- prune
def test_the_main_job(run, trained, tmp_path):
    out = tmp_path / "out"
    text = run("prune", NET, "--at-most", "macs=50%", "--data", "digits", "--weights", trained, "-o", out)
    for word in ("b:out", "channel", "MACs (batch of 1)", "as cut", "BatchNorm re-estimated", "repaired by least squares",
                 "layers fitted; median error", "branches fitted as a whole as well", "asked MACs(at_most='50%')", "proof: largest"):  # fmt: skip
        assert word in text
    assert str(out) in text
    model = sc.load(out, lambda: __import__("nets").net())
    assert model.b.out_channels < 8
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), sc.load(out)(x))


def test_json_says_the_same_in_numbers(run, trained, tmp_path):
    facts = json.loads(run("prune", NET, "--at-most", "macs=50%", "--at-most", "params=80%", "--data", "digits",
                           "--weights", trained, "--json"))  # fmt: skip
    assert facts["after"]["macs"] <= 0.5 * facts["before"]["macs"]
    assert facts["after"]["params"] <= 0.95 * facts["before"]["params"]
    assert set(facts["accuracy"]) == {"dense", "cut", "batch_norm", "repaired"}
    assert facts["accuracy"]["dense"] > 0.4 > facts["accuracy"]["cut"] and facts["accuracy"]["repaired"] > facts["accuracy"]["dense"] - 0.1
    assert [facts["why"][name] for name in ("score", "allocation", "repair")] == ["obs", "search", "gauss_newton"]
    assert facts["repairs"] and all({"layer", "plain", "repaired", "used"} <= set(row) for row in facts["repairs"])
    assert facts["proof"]["passed"] and facts["proof"]["max_error"] < 1e-9
    assert all(row["units_after"] < row["units_before"] for row in facts["groups"])
    assert facts["folder"] is None and facts["batch"] == 1


def test_what_may_be_chosen_is_chosen(run, trained):
    """Criteria that need labels get them from the data; every repair; budgets by scores or by curves."""
    arguments = ("prune", NET, "--at-most", "macs=60%", "--data", "digits", "--weights", trained, "--json")
    for chosen, became in (
        (("--score", "taylor", "--repair", "batch_norm"), ("taylor", "global", "batch_norm")),
        (("--score", "l2", "--allocation", "uniform"), ("l2", "uniform", "gauss_newton")),
        (("--allocation", "sensitivity", "--repair", "bias"), ("obs", "sensitivity", "bias")),
        (("--allocation", "curves"), ("obs", "curves", "gauss_newton")),
        (("--repair", "none"), ("obs", "search", "none")),
    ):
        facts = json.loads(run(*arguments, *chosen))
        assert tuple(facts["why"][name] for name in ("score", "allocation", "repair")) == became
        assert bool(facts["repairs"]) == (became[2] in ("gauss_newton", "least_squares", "bias"))
        assert ("repaired" in facts["accuracy"]) == (became[2] != "none")
        assert ("batch_norm" in facts["accuracy"]) == (became[2] in ("gauss_newton", "least_squares", "bias"))


DEEP = """
from torch import nn
def net(): return nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
"""


def test_what_batch_norm_alone_would_give_leaves_no_trace(tmp_path):
    """The stage that is only measured changes nothing: the repaired model is that of `prune` itself."""
    from secateur import job
    from secateur.models import load_data, load_model

    (tmp_path / "deep.py").write_text(DEEP)
    loaded, data = load_model(f"{tmp_path}/deep.py:net"), load_data("digits")
    inputs = job.example_inputs(loaded, data, ())
    done = job.run(loaded, inputs, [sc.MACs("60%")], job.Options(repair="bias", only=("0:*",)), data=data)
    alone = sc.prune(loaded.model, inputs[0], sc.MACs("60%"), data=data.train, repair="bias", only=["0:*"])
    assert done.result.model[0].out_channels < 8, "the second norm is behind a cut, and no layer is fitted with it"
    states = [m.state_dict() for m in (done.result.model, alone.model)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_search_is_not_run_again_for_the_batch_of_two(run, tmp_path, monkeypatch):
    from secateur import job

    calls, real = [], job.prune
    monkeypatch.setattr(job, "prune", lambda *a, **k: calls.append(a) or real(*a, **k))
    arguments = ("prune", f"{NETS}:hard", "--at-most", "macs=60%", "--input", "1x6", "-o", tmp_path / "out", "--json")
    facts = json.loads(run(*arguments))
    assert facts["how"] == "graph" and len(calls) == 1 and facts["batch"] == 2
    assert sc.load(tmp_path / "out")(torch.randn(5, 6)).shape == (5, 3)
    monkeypatch.setattr(job, "with_inputs", lambda *_: None)  # where the plan does not fit the second trace it is made again
    again = json.loads(run(*arguments))
    assert len(calls) == 3
    assert {k: again[k] for k in ("before", "after", "groups")} == {k: facts[k] for k in ("before", "after", "groups")}
    assert [r["achieved"] for r in again["why"]["achieved"]] == [r["achieved"] for r in facts["why"]["achieved"]]


def test_score_allocation_seed_and_ignore_reach_the_plan(run):
    arguments = ("prune", NET, "--at-most", "macs=60%", "--input", "2x1x8x8", "--json")
    choice = ("--score", "random", "--allocation", "uniform", "--seed", "3", "--ignore", "a")
    facts = json.loads(run(*arguments, *choice))
    assert facts["why"]["score"] == "random" and facts["why"]["seed"] == 3
    assert "uniform" in json.dumps(facts["why"])
    again = json.loads(run(*arguments, *choice))
    assert again["groups"] == facts["groups"]
    assert not [row for row in facts["groups"] if row["name"].startswith("a:")]


def test_a_rewritten_graph_takes_any_batch(run, tmp_path):
    np.savez(tmp_path / "d.npz", inputs=np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32),
             labels=np.arange(40) % 3)  # fmt: skip
    facts = json.loads(run("prune", f"{NETS}:hard", "--at-most", "macs=60%", "--data", f"npz:{tmp_path / 'd.npz'}",
                           "-o", tmp_path / "out", "--json"))  # fmt: skip
    assert facts["how"] == "graph" and facts["notes"]
    assert set(facts["accuracy"]) == {"dense", "cut", "repaired"}, "there is no BatchNorm to re-estimate"
    assert facts["batch"] == 2 and facts["why"]["repair"] == "gauss_newton" and facts["repairs"]
    assert facts["why"]["achieved"][0]["achieved"] == facts["after"]["macs"], "both are of the batch of two"
    assert sc.load(tmp_path / "out")(torch.randn(7, 6)).shape == (7, 3)


def test_an_exported_program_is_pruned_with_the_inputs_it_brings(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(NETS.parent)
    import nets

    program = torch.export.export(nets.net(), (torch.randn(2, 1, 8, 8),), strict=False)
    torch.export.save(program, tmp_path / "net.pt2")
    facts = json.loads(run("prune", tmp_path / "net.pt2", "--at-most", "macs=60%", "-o", tmp_path / "out", "--json"))
    assert facts["proof"]["passed"] and facts["batch"] == 2
    assert sc.load(tmp_path / "out")(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_float16_models_work(run, tmp_path):
    facts = json.loads(run("prune", f"{NETS}:half", "--at-most", "macs=60%", "--data", "digits", "--json"))
    assert facts["after"]["bytes"] < facts["before"]["bytes"] and facts["proof"]["passed"]


# ---------------------------------------------------------------- inspect, measure, demo
def test_depth_removes_whole_blocks_and_the_folder_comes_back(run, tmp_path):
    spec = tmp_path / "deep.py"
    spec.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up, self.a, self.b, self.head = (torch.nn.Linear(i, o) for i, o in ((4, 8), (8, 8), (8, 8), (8, 2)))\n"
        "        with torch.no_grad():\n"
        "            self.a.weight.mul_(0.01)\n"
        "    def forward(self, x):\n"
        "        x = self.up(x)\n"
        "        x = x + self.a(x).relu()\n"
        "        return self.head(x + self.b(x).relu())\n"
    )
    options = (f"{spec}:Net", "--input", "3x4", "--at-most", "macs=65%", "-o", tmp_path / "out")
    assert "a:block" not in run("prune", *options, "--json")
    said = json.loads(run("prune", *options, "--depth", "--json"))
    assert [(row["units_before"], row["units_after"]) for row in said["groups"] if row["name"] == "a:block"] == [(1, 0)]
    assert said["how"] == "graph" and said["proof"]["passed"]
    model = sc.load(tmp_path / "out")
    assert not [name for name in model.state_dict() if name.startswith("a.")]
    assert "a:block, b:block" in run("inspect", f"{spec}:Net", "--input", "3x4")


def test_inspect_names_groups_frozen_axes_and_costs(run):
    text = run("inspect", NET, "--input", "1x1x8x8")
    for word in ("a:out", "why it stays", "the model's output", "MACs (batch of 1)", "units"):
        assert word in text
    facts = json.loads(run("inspect", NET, "--input", "1x1x8x8", "--json"))
    assert {row["name"] for row in facts["groups"]} >= {"a:out"}
    assert all({"size", "reason", "where"} <= set(row) for row in facts["frozen"])
    assert facts["cost"]["params"] == 834 + 584


def test_measure_states_its_conditions(run):
    text = run("measure", NET, "--input", "4x1x8x8", "--rounds", 3, "--threads", 1)
    for word in ("MACs (batch of 4)", "peak memory", "latency, median", "3 rounds, 1 threads, cpu, float32"):
        assert word in text
    facts = json.loads(run("measure", NET, "--input", "4x1x8x8", "--rounds", 3, "--json"))
    assert facts["batch"] == 4 and facts["latency_median_s"] > 0 and facts["peak_bytes"] > facts["bytes"]


def test_measure_of_a_folder_agrees_with_what_prune_wrote(run, tmp_path):
    facts = json.loads(run("prune", NET, "--at-most", "macs=60%", "--input", "2x1x8x8", "-o", tmp_path / "o", "--json"))
    for extra in ((), ("--factory", NET)):
        found = json.loads(run("measure", tmp_path / "o", "--rounds", 2, "--json", *extra))
        assert {k: found[k] for k in ("macs", "params", "bytes")} == facts["after"]


def test_the_demo_trains_prunes_and_times(run, monkeypatch, tmp_path):
    from secateur import demo

    train = demo.trained_digits_net
    monkeypatch.setattr(demo, "trained_digits_net", lambda data, **kw: train(data, **{**kw, "epochs": 1}))
    facts = json.loads(run("demo", "--json", "-o", tmp_path / "out"))
    assert facts["after"]["macs"] <= 0.5 * facts["before"]["macs"]
    assert facts["proof"]["passed"] and set(facts["accuracy"]) == {"dense", "cut", "batch_norm", "repaired"}
    assert facts["seconds"]["seconds"]["dense"]["median"] > 0
    assert sc.load(tmp_path / "out")(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    text = run("demo")
    assert "dense" in text and "proof" in text and "times as fast" in text


@pytest.mark.slow
def test_the_demo_reaches_its_accuracy(run):
    facts = json.loads(run("demo", "--json"))
    assert facts["accuracy"]["dense"] > 0.97 and facts["accuracy"]["repaired"] > 0.97


# ---------------------------------------------------------------- how it refuses
PRUNE = ("prune", NET, "--at-most", "macs=50%", "--input", "1x1x8x8")
REFUSALS = [
    (("prune", NET, "--input", "1x1x8x8"), 2, r"--at-most"),
    (("prune", NET, "--at-most", "flops=50%"), 2, r"'flops=50%' is not a target.\n  Write one of macs=50%"),
    (("prune", NET, "--at-most", "macs=lots", "--input", "1x1x8x8"), 2, r"'lots' is not a budget"),
    (("prune", NET, "--at-most", "macs=0%", "--input", "1x1x8x8"), 2, r"asks for 0 macs.*\n.*above 0 %"),
    (("prune", NET, "--at-most", "macs=100%", "--input", "1x1x8x8"), 2, r"the dense model has [\d,]+.\n.*below 100 %"),
    (("prune", NET, "--at-most", "macs=1%", "--input", "1x1x8x8"), 1, r"(?i)macs.*\n"),
    ((*PRUNE, "--score", "magic"), 2, r"unknown criterion 'magic'.\n  There are: l1, l2"),
    ((*PRUNE, "--allocation", "magic"), 2, r"magic.*global"),
    ((*PRUNE, "--repair", "magic"), 2, r"magic.*least_squares"),
    ((*PRUNE, "--repair", "least_squares"), 2, r"repair='least_squares' needs calibration data.\n  Pass data="),
    ((*PRUNE, "--score", "obs"), 2, r"score='obs' needs calibration data"),
    ((*PRUNE, "--score", "taylor"), 2, r"score='taylor' needs data"),
    ((*PRUNE, "--allocation", "curves"), 2, r"allocation='curves' needs the error curves of score='obs'"),
    ((*PRUNE, "--input", "axb"), 2, r"'axb' is not a shape"),
    ((*PRUNE, "--data", "npz:nowhere.npz"), 1, r"nowhere.npz does not exist"),
    ((*PRUNE, "--data", f"{NETS}:no_rows"), 1, r"is empty"),
    ((*PRUNE, "--weights", "nowhere.pth"), 1, r"nowhere.pth does not exist"),
    (("prune", NET, "--at-most", "macs=50%"), 2, r"does not say what its inputs look like.\n  Add --input"),
    (("prune", NET, "--at-most", "macs=50%", "--input", "1x3x8x8"), 2, r"cannot run on inputs of \(1, 3, 8, 8\)"),
    (("prune", f"{NETS}:diverged", "--at-most", "macs=50%"), 1, r"b.weight are not finite"),
    (("prune", "nowhere.py:net", "--at-most", "macs=50%"), 1, r"nowhere.py does not exist"),
    (("measure", "nowhere"), 1, r"'nowhere' is no model"),
    (("cut", NET), 2, r"No such command 'cut'"),
    (("measure", NET, "--faster"), 2, r"No such option"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSALS, ids=[" ".join(r[0][2:])[-40:] for r in REFUSALS])
def test_what_cannot_be_is_refused_and_nothing_is_written(arguments, code, said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ("-o", tmp_path / "out") if arguments[0] == "prune" else ()
    message = run(*arguments, *out, code=code)
    assert re.search(said, message, re.DOTALL), message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_data_that_does_not_fit_the_model(run, tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((10, 8, 8, 3), np.uint8), labels=np.zeros(10, np.uint8))
    message = run("prune", NET, "--at-most", "macs=50%", "--data", f"npz:{tmp_path / 'd.npz'}", code=2)
    assert "cannot run on inputs of (1, 3, 8, 8)" in message


def test_weights_with_code_in_them(run, tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(subprocess.Popen))
    before = tree(tmp_path)
    message = run(*PRUNE, "--weights", tmp_path / "w.pth", "-o", tmp_path / "out", code=1)
    assert "could run code" in message and str(tmp_path / "w.pth") in message
    assert tree(tmp_path) == before


def test_a_refused_job_leaves_the_old_folder_as_it_was(run, tmp_path):
    run(*PRUNE, "-o", tmp_path / "out")
    before = tree(tmp_path)
    run("prune", NET, "--at-most", "macs=0.1%", "--input", "1x1x8x8", "-o", tmp_path / "out", code=1)
    assert tree(tmp_path) == before


def test_a_tampered_folder(run, tmp_path):
    run(*PRUNE, "-o", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut short" in run("measure", tmp_path / "out", code=1)


def test_a_fault_of_ours_is_called_one(run, monkeypatch):
    def fault(*_, **__):
        raise KeyError("axis")

    monkeypatch.setattr(cli, "load_model", fault)
    message = run("inspect", NET, code=3)
    assert "KeyError" in message and "--debug" in message and "Traceback" not in message
    assert "Traceback" in run("inspect", NET, "--debug", code=3)


def test_an_interruption_is_no_error_of_the_model(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", interrupted)
    assert "Traceback" not in run("inspect", NET, code=130)


def test_it_runs_as_a_module_and_answers_help():
    done = subprocess.run([sys.executable, "-m", "secateur", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("prune", "inspect", "measure", "demo"):
        assert command in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "secateur", "measure", "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stdout == "" and wrong.stderr.startswith("secateur: 'nowhere'")
