"""int8 beside pruning, where its tools are installed."""

import shlex
import sys
from pathlib import Path

import pytest

from secateur import cli
from secateur.advise import Settings, Source, candidates
from secateur.job import example_inputs
from secateur.models import load_data, load_model

RUN = sys.modules["secateur.advise.run"]
NETS = Path(__file__).parent.parent / "models" / "nets.py"
NET, ROWS = f"{NETS}:net", f"{NETS}:rows"


def search(monkeypatch, out, *names):
    every = {c.name: c for c in candidates()}
    monkeypatch.setattr(RUN, "candidates", lambda: [every[name] for name in names])
    monkeypatch.setattr(RUN, "careful", lambda rows, lose: [])
    data, loaded = load_data(ROWS), load_model(NET)
    inputs = example_inputs(loaded, data, [])
    done = RUN.advise(loaded, inputs, data, Source(NET, ROWS, 40), Settings(60, 50, runtimes=("torch",)), out=out)
    return {row["name"]: row for row in done.rows}


def test_int8_of_the_dense_and_of_a_pruned_model(tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    rows = search(monkeypatch, tmp_path / "out", "int8", "structures macs=50%", "int8 after structures macs=50%")
    assert [row["state"] for row in rows.values()] == ["measured"] * 3, [row.get("why") for row in rows.values()]
    alone, after = rows["int8"], rows["int8 after structures macs=50%"]
    assert alone["runtime"].endswith("int8") and abs(alone["lost"]) <= 100 and after["bytes"] < alone["bytes"]
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(alone["commands"][0])[1:]) == 0
    assert (tmp_path / alone["folder"] / "model-int8.onnx").stat().st_size == alone["bytes"]


def test_without_its_packages_it_is_a_row_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    row = search(monkeypatch, tmp_path / "out", "int8")["int8"]
    assert row["state"] == "refused" and "pip install" in row["why"]
