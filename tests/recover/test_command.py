"""`secateur recover`: from a folder to a folder."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import secateur as sc
from secateur import live, report
from secateur.cli import main
from secateur.models.data import Batches
from secateur.models.folder import read
from secateur.recover import Training, recover
from tests.recover.nets import Net, masked, rows
from tests.recover.test_blocks import Wide, inputs

FACTORY, TEACHER = f"{__name__}:net", f"{__name__}:trained_net"


def net():
    return Net()


def wide():
    torch.manual_seed(0)
    return Wide()


def wide_inputs():
    return Batches(inputs(), None, 20)


@pytest.fixture
def data(tmp_path):
    held = rows(160)
    np.savez(tmp_path / "rows.npz", images=held.inputs.numpy(), labels=held.labels.numpy())
    return f"npz:{tmp_path / 'rows.npz'}"


@cache
def trained_net():
    torch.manual_seed(0)
    return recover(Net(), rows(400), Training(epochs=12, lr=0.1)).model.eval()


@pytest.mark.parametrize("kind", ["mask", "cut"])
def test_a_folder_is_trained_back(kind, data, tmp_path, capsys):
    model, x = trained_net(), rows().inputs[:2]
    few = sc.Sparse(keep="8%", by="magnitude", refit=False)
    result = sc.sparsify(model, (x,), few) if kind == "mask" else sc.prune(model, (x,), sc.MACs("20%"))
    out, to = tmp_path / "out", tmp_path / "out-recovered"
    sc.save(result, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(["recover", str(out), "--data", data, "--epochs", "6", "--batch", "16", "--lr", "0.1", "--teacher", TEACHER, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(to) and len(facts["history"]) == 6 and facts["history"][-1]["loss"] < facts["history"][0]["loss"]
    assert facts["accuracy"]["recovered"] >= facts["accuracy"]["pruned"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before  # what was given is as it was
    assert not list(tmp_path.glob(".*")) and read(to).document["recovered"]["training"]["epochs"] == 6
    assert main(["verify", str(to)]) == 0
    found = sc.load(to)
    norms = [n for n, b in found.named_buffers() if n.endswith("running_mean")]
    assert norms and not any(torch.equal(found.get_buffer(n), sc.load(out).get_buffer(n)) for n in norms)  # a graph's batch norms train too
    if kind == "mask":
        state = dict(found.named_parameters())
        assert all(not state[n][~m].any() for n, m in result.plan.weights.items())


def test_what_cannot_be_meant_is_said(data, tmp_path, capsys):
    sc.save(masked(trained_net(), rows().inputs[:2]), tmp_path / "out")
    assert main(["recover", str(tmp_path / "out")]) == 2 and "--data" in capsys.readouterr().err
    assert main(["recover", str(tmp_path / "none"), "--data", data]) == 1
    assert main(["recover", str(tmp_path / "out"), "--data", data, "--blocks", "5"]) == 2 and "--teacher" in capsys.readouterr().err
    for more, said in ((["--features", "2"], "--features without a dense model"), (["--teacher-weights", "w"], "--teacher-weights without a dense"),
                       (["--shard"], "Start it by torchrun")):  # fmt: skip
        assert main(["recover", str(tmp_path / "out"), "--data", data, *more]) == 2 and said in capsys.readouterr().err
    assert main(["recover", str(tmp_path / "out"), "--data", f"{__name__}:wide_inputs", "--teacher", TEACHER, "--batch", "4"]) == 2
    assert "--batch 4 beside data that comes in batches" in capsys.readouterr().err
    line = ["recover", str(tmp_path / "out"), "--data", data, "--blocks", "5", "--teacher", TEACHER]
    assert main(line) == 2 and "captured graph" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("not yours")
    assert main(["recover", str(tmp_path / "out"), "--data", data, "-o", str(tmp_path / "mine")]) == 2 and "letter.txt" in capsys.readouterr().err
    assert main(["recover", str(tmp_path / "out"), "--data", data, "--precision", "int8"]) == 2
    np.savez(tmp_path / "plain.npz", images=rows().inputs.numpy())
    assert main(["recover", str(tmp_path / "out"), "--data", f"npz:{tmp_path / 'plain.npz'}"]) == 1 and "--teacher" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "out-recovered") == ["mine", "out", "plain.npz", "rows.npz"]


def test_boxes_mirror_images_and_the_device_reach_the_training(data, tmp_path, capsys, monkeypatch):
    places = []
    monkeypatch.setattr("secateur.cli_recover.moved", lambda model, device: places.append(device) or model)
    sc.save(masked(trained_net(), rows().inputs[:2]), tmp_path / "out")
    line = ["recover", str(tmp_path / "out"), "--data", data, "--epochs", "1", "--teacher", TEACHER, "--json"]
    assert main([*line, "--cutmix", "0.5", "--mirror", "--average", "0.25", "--device", "cpu"]) == 0
    how = json.loads(capsys.readouterr().out)["training"]
    assert how["cutmix"] == 0.5 and how["mirror"] is True and how["average"] == 0.25 and places == [torch.device("cpu")] * 2
    assert main([*line[:6], "--mirror"]) == 2 and "--mirror without a dense model" in capsys.readouterr().err
    assert main([*line, "--device", "gpu"]) == 2 and "--device cpu" in capsys.readouterr().err


def test_a_model_of_its_own_class_is_trained_too(data, tmp_path, capsys):
    sc.save(masked(trained_net(), rows().inputs[:2]), tmp_path / "out")
    line = ["recover", str(tmp_path / "out"), "--data", data, "--epochs", "1", "--factory", FACTORY, "-o", str(tmp_path / "to")]
    assert main(line) == 0 and "accuracy: pruned" in capsys.readouterr().out
    assert torch.isfinite(sc.load(tmp_path / "to", net)(rows().inputs[:2])).all()


def test_low_rank_updates_are_merged_into_the_folder(data, tmp_path, capsys):
    result = masked(trained_net(), rows().inputs[:2])
    sc.save(result, tmp_path / "out")
    line = ["recover", str(tmp_path / "out"), "--data", data, "--epochs", "2", "--batch", "16", "--train", "lora", "--rank", "2", "--json"]
    assert main(line) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["training"]["train"] == "lora" and facts["training"]["rank"] == 2 and main(["verify", str(tmp_path / "out-recovered")]) == 0
    found, before = (dict(sc.load(tmp_path / name).named_parameters()) for name in ("out-recovered", "out"))
    assert found.keys() == before.keys() and not torch.equal(found["layers.0.weight"], before["layers.0.weight"])
    assert all(not found[n][~m].any() for n, m in result.plan.weights.items())


def test_blocks_are_trained_without_labels_and_go_on_after_a_kill(tmp_path, capsys, monkeypatch):
    result = sc.sparsify(wide().eval(), (inputs(2),), sc.Sparse(keep="30%", by="magnitude", refit=False))
    sc.save(result, tmp_path / "out")
    line = ["recover", str(tmp_path / "out"), "--data", f"{__name__}:wide_inputs", "--teacher", f"{__name__}:wide", "--factory", f"{__name__}:wide"]
    line += ["--blocks", "10", "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(live.Display, "moved", killed_in_training)
        assert main([*line, "-o", str(tmp_path / "parts")]) != 0
    assert list(tmp_path.glob(".parts.training/blocks/checkpoint.pt")) and (tmp_path / "parts" / "report.html").exists()
    for name in ("parts", "whole"):
        assert main([*line, "--json", "-o", str(tmp_path / name)]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["reconstruction"]["after"] < facts["reconstruction"]["before"] and len(facts["reconstruction"]["blocks"]) == 3
        assert [row["kind"] for row in report.read(tmp_path / name)["repairs"]].count("block") == 3
    parts, whole = (sc.load(tmp_path / name, wide).state_dict() for name in ("parts", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in parts.items()) and not list(tmp_path.glob(".*"))


def killed_in_training(self, title, done, total, said=""):
    if title == "training" and done > 2:
        raise KeyboardInterrupt


def test_the_report_follows_the_training_and_lines_stand_where_no_terminal_is(data, tmp_path, capsys, monkeypatch):
    result = masked(trained_net(), rows().inputs[:2])
    sc.save(result, tmp_path / "out")
    pages, news = [], live.Page.news

    def watching(self, history, steps, epochs):
        news(self, history, steps, epochs)
        pages.append((report.read(self.folder), (self.folder / "report.html").read_text()))

    monkeypatch.setattr(live.Page, "news", watching)
    line = ["recover", str(tmp_path / "out"), "--data", data, "--epochs", "3", "--batch", "16", "--teacher", TEACHER]
    assert main(line) == 0
    said = capsys.readouterr()
    assert [len(sheet.get("training", {})["rows"]) for sheet, _ in pages] == [0, 1, 2, 3]
    assert [sheet["training"]["done"] for sheet, _ in pages] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert ['http-equiv="refresh"' in page for _, page in pages] == [True, True, True, False]
    assert said.err.count("epoch ") == 3 and "validation loss" in said.err and " left" in said.err and "accuracy: dense" in said.out
    sheet = report.read(tmp_path / "out-recovered")
    assert [row["stage"] for row in sheet["accuracy"]["stages"]] == ["dense", "pruned", "trained"] and len(sheet["training"]["rows"]) == 3
    assert all({"loss", "valid_loss", "valid"} <= row.keys() for row in sheet["training"]["rows"])
    assert {row["figure"] for row in sheet["cost"]} >= {"macs", "params"} and sheet["settings"]["command"].startswith("secateur recover")
    assert report.rewrite(tmp_path / "out-recovered").read_text() == (tmp_path / "out-recovered" / "report.html").read_text()


def test_a_report_that_cannot_be_written_is_told_once_and_training_goes_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    told = []
    page = live.Page(tmp_path / "file", {}, told.append)
    for step in (0, 5, 10):
        page.news([{"epoch": 1.0, "step": step, "loss": 1.0, "lr": 0.1, "seconds": 2.0}], 10, 2.0)
    assert len(told) == 1 and "goes on without it" in told[0] and Path(tmp_path / "file").read_text() == "in the way"


def test_time_left_is_that_of_the_pace_since_the_run_went_on(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    with live.Display() as display:
        for step in range(41, 61):  # forty were done by a run before
            display.moved("training", step, 100, ", loss 0.5")
            clock[0] += 5.0
        clock[0] -= 5.0
        display.ended({"epoch": 2.0, "step": 60.0, "loss": 0.25, "valid": 0.5}, 100)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "training: 53 of 100, loss 0.5, 0:03:37 left"
    assert said[-1] == "epoch 2, step 60 of 100: loss 0.2500, accuracy 50.00 %, 0:03:10 left" and len(said) == 2
