"""`secateur run`, as it is typed."""

import json
from pathlib import Path

import pytest
import torch

from secateur import cli

NETS = Path(__file__).parents[1] / "models" / "nets.py"


@pytest.fixture
def typed(capsys, monkeypatch, tmp_path, kernels):
    monkeypatch.chdir(tmp_path)

    def typed(*arguments, code=0):
        assert cli.main([str(a) for a in arguments]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return typed


def test_a_masked_folder_is_timed_layer_by_layer(typed, tmp_path):
    typed("mask", f"{NETS}:net", "--keep", "10%", "--input", "2x1x8x8", "-o", tmp_path / "out")
    before = torch.get_num_threads()
    found = json.loads(typed("run", tmp_path / "out", "--factory", f"{NETS}:net", "--batch", "5", "--threads", "2", "--rounds", "3", "--json"))
    assert found["batch"] == 5 and found["threads"] == 2 and torch.get_num_threads() == before
    assert {"b", "c", "head"} <= {row["layer"] for row in found["layers"]}
    assert all(row["zeros"] > 0.5 and row["dense"] > 0 and row["sparse"] > 0 for row in found["layers"])
    assert found["sparse_seconds"] <= 1.01 * found["dense_seconds"]
    text = " ".join(typed("run", tmp_path / "out", "--factory", f"{NETS}:net", "--rounds", "3").split())
    assert "batch of 2, 1 threads" in text and "times as fast" in text


def test_a_folder_with_its_graph_needs_no_factory(typed, tmp_path):
    typed("mask", f"{NETS}:net", "--keep", "10%", "--input", "2x1x8x8", "-o", tmp_path / "out")
    found = json.loads(typed("run", tmp_path / "out", "--rounds", "3", "--json"))
    assert len(found["layers"]) >= 4


def test_a_dense_model_has_nothing_to_time(typed):
    assert "no layer has zeros enough" in typed("run", f"{NETS}:net", "--input", "2x1x8x8", "--rounds", "3")
