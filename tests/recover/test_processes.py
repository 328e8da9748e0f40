"""The same training in one process and in two, and from two to one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]


def run(processes, kind, folder, out, steps=-1, fails=""):
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else [sys.executable]
    line = [*start, str(WORKER), kind, str(folder), str(out), "3", str(steps)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (fails in done.stderr and done.returncode) if fails else done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cubic", "rigl", "ac_dc"])
def test_a_schedule_of_weights_spread_over_two_processes_is_that_of_one(kind, tmp_path):
    run(1, kind, tmp_path, tmp_path / "one.pt")
    run(2, kind, tmp_path, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one["plan"].keys() == two["plan"].keys() and all(torch.equal(mask, two["plan"][name]) for name, mask in one["plan"].items())
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copies", "shard", "lora", "ignored", "taught", "mean", "shard-mean", "shard-ema", "tokens", "column"])
def test_two_processes_train_as_one(kind, tmp_path):
    pytest.importorskip("accelerate")
    run(1, kind, tmp_path / "a", tmp_path / "one.pt")
    run(2, kind, tmp_path / "b", tmp_path / "two.pt")
    run(2, kind, tmp_path / "c", tmp_path / "none.pt", steps=7)  # stopped there
    assert not (tmp_path / "none.pt").exists()
    run(1, kind, tmp_path / "c", tmp_path / "rest.pt")
    one, two, rest = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two", "rest"))
    for other in (two, rest):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert all(torch.equal(mask, one["plan"][name]) for name, mask in other["plan"].items())
        assert not any(other["state"][name][~mask].any() for name, mask in one["plan"].items())
        for name, tensor in one["state"].items():
            torch.testing.assert_close(other["state"][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_processes_that_do_not_see_the_same_checkpoint_do_not_begin(tmp_path):
    pytest.importorskip("accelerate")
    for steps, fails in ((7, ""), (-1, "give a folder that all processes see")):  # only process 0 writes
        run(2, "copies", tmp_path / "RANK", tmp_path / "out.pt", steps, fails)
    assert not (tmp_path / "out.pt").exists()
