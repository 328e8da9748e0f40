"""Every example runs, meets its budget, proves its cut, and is in the list."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "examples"
PARTS = {"show", "spotter", "yolo"}  # what the examples share, and networks too long to stand in them
NEEDS = {
    "classifier_timm": "timm",
    "classifier_torchvision": "torchvision",
    "encoder_bert": "transformers",
    "llama": "transformers",
    "lstm": "sklearn",
    "segmentation_torchvision": "torchvision",
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in PARTS)


@pytest.fixture
def example(monkeypatch, capsys):
    """A function that runs an example and gives its names and what it printed."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str) -> tuple[dict, str]:
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            pytest.skip(f"{NEEDS[name]} is not installed")
        with torch.random.fork_rng():
            found = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return found, capsys.readouterr().out

    yield run
    for part in PARTS:
        sys.modules.pop(part, None)


def figures(said: str, what: str) -> tuple[int, int]:
    before, after = re.search(rf"^  {what} +([\d,]+) -> ([\d,]+) \(", said, flags=re.MULTILINE).groups()
    return int(before.replace(",", "")), int(after.replace(",", ""))


def checked(example, name: str) -> tuple[dict, str]:
    """What holds for every example."""
    found, said = example(name)
    result = found["result"]
    assert result.proof.passed and result.proof.max_error < 1e-12 and not result.proof.all_zero
    before, after = figures(said, "MACs")
    assert after < before and figures(said, "parameters")[1] < figures(said, "parameters")[0]
    assert result.plan.why["achieved"] and all(row["achieved"] <= row["limit"] for row in result.plan.why["achieved"])
    assert re.search(r"^  time +[\d.]+ ms -> [\d.]+ ms$", said, flags=re.MULTILINE)
    assert re.search(r"^  proof +at most \S+ away from the masked original, in float64 \(1e-09 allowed\)$", said, flags=re.MULTILINE)
    assert result.cut.how == "attributes" and type(result.model) is type(result.dense)
    return found, said


def test_every_example_is_short_and_listed():
    listed = re.findall(r"^\| \[(\w+)\.py\]\((\w+)\.py\) \|", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(a for a, _ in listed) == NAMES and all(a == b for a, b in listed)
    for path in FOLDER.glob("*.py"):
        assert path.read_text().count("\n") <= 60, path.name
    tested = re.findall(r'checked\(example, "(\w+)"\)', Path(__file__).read_text())
    assert sorted({*tested, *PLAIN}) == NAMES


PLAIN = ["classifier_torchvision", "segmentation_torchvision"]


@pytest.mark.parametrize("name", PLAIN)
def test_an_example_runs_and_proves_itself(example, name):
    found, said = checked(example, name)
    assert figures(said, "MACs") == (found["result"].before.macs, found["result"].after.macs)


def test_the_stream_of_a_transformer_stays_whole(example):
    found, _ = checked(example, "classifier_timm")
    assert found["result"].model.patch_embed.proj.out_channels == 192


def test_a_detector_is_pruned_where_it_can_be_captured(example):
    found, _ = checked(example, "detector")
    detector, pruned, x, result = (found[name] for name in ("detector", "pruned", "x", "result"))
    assert found["part"].name == "pyramid" and pruned.pyramid is result.model and detector.pyramid is not result.model
    sides, scores = result.model(x)
    assert sides.shape == (2, 4, 16**2 + 8**2 + 4**2) and scores.shape == (2, 5, sides.shape[2])
    for head in result.model.heads:
        assert head.box[2].out_channels == 4 * head.bins == 4 * len(head.distances)
    for cross in (m for m in result.model.modules() if type(m).__name__ == "Cross"):
        half = cross.open[0].out_channels // 2  # `chunk` halves: both sides lost as many
        outs = [step[1][0].out_channels for step in cross.steps]
        assert cross.steps[0][0][0].in_channels == half and cross.close[0].in_channels == 2 * half + sum(outs)
        assert not cross.residual or set(outs) == {half}
    boxes = pruned(x)
    assert len(boxes) == 2 and all(len(side) == len(kind) and side.shape[1] == 4 for side, kind in boxes)


def test_a_segmentation_net_meets_its_memory(example):
    found, said = checked(example, "segmentation")
    dense, pruned = (int(v.replace(",", "")) for v in re.search(r"peak memory ([\d,]+) -> ([\d,]+) bytes", said).groups())
    assert pruned <= 0.6 * dense
    model = found["result"].model
    for up, join, skip in zip(model.up, model.join, model.down[-2::-1], strict=True):
        assert join[0].in_channels == skip[3].out_channels + up.out_channels


def test_an_encoder_keeps_the_width_of_its_output(example):
    found, _ = checked(example, "encoder_bert")
    assert found["result"].model(**found["inputs"]).last_hidden_state.shape == (2, 32, 128)


def test_a_language_model_still_writes_with_its_cache(example):
    found, _ = checked(example, "llama")
    model, ids = found["result"].model, found["ids"]
    for layer in model.model.layers:
        own = layer.self_attn
        assert own.q_proj.out_features % own.k_proj.out_features == 0 and own.o_proj.in_features == own.q_proj.out_features
    slow = ids[:1, :8]
    with torch.no_grad():
        for _ in range(8):
            slow = torch.cat([slow, model(input_ids=slow).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found["text"], slow)


def test_a_keyword_spotter_fits_its_controller(example):
    found, said = checked(example, "keyword_spotter")
    result, flash, ram = found["result"], found["FLASH"], found["RAM"]
    assert result.after.bytes <= 4 * flash and result.after.params <= flash
    line = r"{}: ([\d,]+) bytes, peak memory ([\d,]+) bytes, ([\d.]+) % right"
    dense, pruned = (re.search(line.format(name), said).groups() for name in ("dense", "pruned"))
    assert int(pruned[1].replace(",", "")) <= 4 * (flash + ram) < int(dense[1].replace(",", ""))
    if float(dense[2]) > 90:  # the trained network was there
        assert float(pruned[2]) > 85
    if find_spec("onnxruntime") is None:
        assert "no int8" in said and "pip install" in said
    else:
        sizes = {row.name: row.bytes for row in found["done"].rows}
        assert sizes["pruned int8"] < sizes["dense int8"] and sizes["pruned int8"] < sizes["pruned"]


def test_a_recurrent_layer_stays_an_ordinary_one(example):
    found, said = checked(example, "lstm")
    rnn = found["result"].model.rnn
    assert type(rnn) is nn.LSTM and rnn.hidden_size < 64 == found["model"].rnn.hidden_size
    assert rnn.weight_hh_l1.shape == (4 * rnn.hidden_size, rnn.hidden_size)
    dense, pruned = map(float, re.search(r"test accuracy ([\d.]+) % -> ([\d.]+) %", said).groups())
    assert dense > 75 and pruned > dense - 8
