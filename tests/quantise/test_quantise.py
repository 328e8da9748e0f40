"""int8 files by both runtimes against slow references, and the whole command on small networks."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.cli import main
from secateur.errors import InputError, ModelError
from secateur.export import File, onnx_file, run
from secateur.export.stages import write
from secateur.models.atomic import sha256
from secateur.models.data import Batches, Data
from secateur.quantise import How, int8_file, quantise
from tests.quantise.nets import convolutional, data_of, sparse, transformer

ONNX, OPENVINO = ("onnx", "onnxscript", "onnxruntime"), ("onnx", "onnxscript", "openvino", "nncf")
NETS = {"convolutional": convolutional, "transformer": transformer}
WAYS = [How(runtime, kind, rounds=2) for runtime in ("onnxruntime", "openvino") for kind in ("static", "weights")]
runtimes = pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.runtime}-{how.kind}")


def needs(how):
    for name in ONNX if how.runtime == "onnxruntime" else OPENVINO:
        pytest.importorskip(name)


def made(model, x, how, folder, calls=None):
    """The float32 file and the int8 file."""
    (folder / "float").mkdir()
    (file, _, _), _ = write("onnx" if how.runtime == "onnxruntime" else "openvino", model, ((x[:2],), {}), folder / "float")
    target = folder / f"int8{file.path.suffix}"
    rows = 4 if how.runtime == "onnxruntime" else 1
    int8_file(file, target, calls if calls is not None else [((part,), {}) for part in x.split(rows)], how)
    return file, File(target, file.format, file.inputs)


# ---------------------------------------------------------------- a linear layer, against arithmetic done by hand
def coded(value, step, zero, low, high):
    """What one number becomes: rounded to a whole number of steps, cut off, and back."""
    return (min(high, max(low, round(value / step) + zero)) - zero) * step


def by_hand(weight, bias, x, y_range):
    """Static int8 as the standard form has it, one multiplication at a time: weights symmetric per output, activations affine with 0
    in their range; the bias in steps of both."""
    x_step, x_zero = affine(min(x.min(), 0), max(x.max(), 0))
    y_step, y_zero = affine(min(y_range[0], 0), max(y_range[1], 0))
    out = np.zeros((len(x), len(weight)))
    for i, row in enumerate(x):
        for o, w in enumerate(weight):
            w_step = abs(w).max() / 127
            total = round(bias[o] / (w_step * x_step)) * w_step * x_step
            for a, b in zip(row, w, strict=True):
                total += coded(a, x_step, x_zero, 0, 255) * coded(b, w_step, 0, -127, 127)
            out[i, o] = coded(total, y_step, y_zero, 0, 255)
    return out, y_step


def affine(low, high):
    step = (high - low) / 255
    return step, round(-low / step)


def bound(weight, x, x_step, y_step):
    """How far static int8 can be from exact numbers: a step of every activation (half of it from rounding it, half from rounding the zero
    point), half a step of every weight, half a step of the bias, a step of the result."""
    w_step = abs(weight).max(1) / 127
    off = abs(weight).sum(1) * x_step + w_step / 2 * abs(x).sum(1, keepdims=True) + len(weight[0]) * x_step * w_step / 2
    return off + x_step * w_step / 2 + y_step


@pytest.fixture(scope="module")
def linear():
    """Outputs of very different sizes, so that one scale for all of them would not do."""
    torch.manual_seed(3)
    layer = nn.Linear(24, 6)
    with torch.no_grad():
        layer.weight *= torch.tensor([1.0, 0.5, 0.05, 2.0, 0.01, 1.0])[:, None]
    x = torch.randn(40, 24) + 0.7
    with torch.no_grad():
        return layer.eval(), x, layer(x).numpy().astype(np.float64), layer.weight.detach().numpy().astype(np.float64)


def test_a_static_linear_layer_is_the_one_made_by_hand(linear, tmp_path):
    needs(WAYS[0])
    layer, x, exact, weight = linear
    _, int8 = made(layer, x, WAYS[0], tmp_path)
    found = run(int8, [((x,), {})]).outputs[0][0]
    slow, y_step = by_hand(weight, layer.bias.detach().numpy(), x.numpy().astype(np.float64), (exact.min(), exact.max()))
    assert abs(found - slow).max() <= y_step * 1.01  # a tie may round the other way
    assert (abs(found - slow) < y_step * 0.01).mean() > 0.9
    x_step, _ = affine(min(float(x.min()), 0), max(float(x.max()), 0))
    assert (abs(found - exact) <= bound(weight, x.numpy(), x_step, y_step)).all()
    assert abs(found - exact).max() > 1e-4  # it is int8 and not float32


@pytest.mark.parametrize("how", WAYS[1:], ids=lambda how: f"{how.runtime}-{how.kind}")
def test_a_linear_layer_stays_within_what_rounding_can_do(how, linear, tmp_path):
    needs(how)
    layer, x, exact, weight = linear
    _, int8 = made(layer, x, how, tmp_path)
    found = run(int8, [((x,), {})]).outputs[0][0]
    wide = x.abs().max() if how.runtime == "openvino" else (x.max().clamp_min(0) - x.min().clamp_max(0)) / 2
    step = 0.0 if (how.runtime, how.kind) == ("openvino", "weights") else float(2 * wide / 254)
    limit = bound(weight, x.numpy(), step, 0.0)
    limit = limit + (limit.mean(0) if how.kind == "static" else 0)  # the bias is moved by the mean error at most
    assert (abs(found - exact) <= limit * (1 + 1e-5) + 1e-6).all()
    assert abs(found - exact).max() > 1e-4


@runtimes
def test_a_model_of_which_nothing_became_int8_says_so(how, tmp_path):
    needs(how)
    x = torch.rand(8, 6)
    (source, _, _), _ = write("onnx" if how.runtime == "onnxruntime" else "openvino", nn.Softmax(1).eval(), ((x[:2],), {}), tmp_path)
    for model, said in ((source, True), (None, False)):
        if model is None:
            (tmp_path / "linear").mkdir()
            linear = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
            (model, _, _), _ = write(source.format, linear, ((x[:2],), {}), tmp_path / "linear")
        target = tmp_path / f"int8-{said}{model.path.suffix}"
        notes = int8_file(model, target, [((part,), {}) for part in x.split(4 if how.runtime == "onnxruntime" else 1)], how)
        assert any("nothing became int8" in note for note in notes) == said, notes


# ---------------------------------------------------------------- zeros
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", ["static", "weights"])
def test_zeros_of_the_weights_are_zeros_of_the_codes(net, kind, tmp_path):
    needs(WAYS[0])
    import onnx

    model, args = NETS[net]()
    x = data_of(model, args).train.inputs
    file, int8 = made(sparse(model), x, How(kind=kind), tmp_path)
    held = [{t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(f.path).graph.initializer} for f in (file, int8)]
    matrices = {name: w for name, w in held[0].items() if w.ndim > 1 and w.dtype == np.float32}
    assert len(matrices) >= 3
    for name, w in matrices.items():
        codes = next(held[1][found] for found in held[1] if found.startswith(name) and found.endswith("_quantized"))
        codes = codes if codes.shape == w.shape else codes.T  # a linear layer may be turned into a plain product
        assert codes.dtype == np.int8
        assert not codes[w == 0].any() and (w == 0).mean() > 0.3
        assert codes[w != 0].any()


@pytest.mark.parametrize("net", NETS)
@runtimes
def test_sparsity_survives(net, how, tmp_path):
    needs(how)
    from secateur.quantise.run import RUNTIMES

    model, args = NETS[net]()
    file, int8 = made(sparse(model), data_of(model, args).train.inputs, how, tmp_path)
    zeros = RUNTIMES[how.runtime][0].zeros
    (before, gone), (after, still) = zeros(file.path), zeros(int8.path)
    assert before == after == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert 0.4 * before < gone <= still < 0.7 * before


# ---------------------------------------------------------------- the whole
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("how", [
    pytest.param(how, marks=[pytest.mark.slow] if how.runtime == "openvino" else [], id=f"{how.runtime}-{how.kind}") for how in WAYS
])  # fmt: skip
def test_four_models_in_one_table(net, how, tmp_path):
    needs(how)
    model, args = NETS[net]()
    less = sc.prune(model, args, sc.MACs(at_most="60%")).model
    data = data_of(model, args)
    said: list[str] = []
    done = quantise(less, (args, {}), data, tmp_path / "out", dense=model, how=how, progress=said.append)
    rows = {row.name: row for row in done.rows}
    assert list(rows) == ["dense", "pruned", "dense int8", "pruned int8"]
    assert rows["dense"].accuracy == 1  # its own words are the labels
    assert rows["dense"].error == rows["pruned"].error == rows["dense"].against_dense == 0
    for name in ("dense", "pruned"):
        assert 1e-4 < rows[f"{name} int8"].error < 0.12  # untrained, with small outputs
        assert abs(rows[f"{name} int8"].accuracy - rows[name].accuracy) < 0.2
    assert rows["pruned"].against_dense == pytest.approx(off(less, model, data), rel=1e-3)
    assert all(row.seconds.batch == 1 and row.seconds.rounds == 2 for row in done.rows) and rows["dense"].ratio == 1
    assert (done.calibration_rows, done.test_rows) == (64, 32)
    facts = json.loads((tmp_path / "out" / "quantised.json").read_text())
    assert [row["name"] for row in facts["rows"]] == list(rows) and facts["how"]["kind"] == how.kind
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {"quantised.json", *facts["files"]} and done.path.name in held
    assert all(sha256(tmp_path / "out" / name) == entry["sha256"] for name, entry in facts["files"].items())
    assert sum(entry["bytes"] for entry in facts["files"].values()) == rows["pruned int8"].bytes
    assert len(done.verdict) == 2 and len(said) >= 9


def off(less, model, data):
    with torch.no_grad():
        wanted = model(data.test.inputs)
        return float((less(data.test.inputs) - wanted).norm() / wanted.norm())


def test_the_kept_file_is_the_pruned_one_and_runs_at_any_batch(tmp_path):
    needs(WAYS[0])
    model, args = convolutional()
    less = sc.prune(model, args, sc.MACs(at_most="60%")).model
    done = quantise(less, (args, {}), data_of(model, args), tmp_path / "out", dense=model, how=WAYS[0])
    x = torch.randn(7, *args[0].shape[1:])
    found = torch.from_numpy(run(File.of(done.path), [((x,), {})]).outputs[0][0])
    with torch.no_grad():
        near, far = less(x), model(x)
    assert (found - near).norm() < 0.1 * near.norm() < (found - far).norm()


def test_what_is_measured_does_not_calibrate(tmp_path):
    needs(WAYS[0])
    model, args = convolutional()
    given, other = data_of(model, args), data_of(model, args, seed=5)
    wild = Batches(100 * other.test.inputs, other.test.labels)
    files = []
    for n, data in enumerate((given, Data("other test rows", given.train, wild, True), Data("other training rows", wild, given.test, True))):
        files.append(quantise(model, (args, {}), data, tmp_path / str(n), how=WAYS[0]).path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_rows_without_labels_are_compared_by_their_outputs(tmp_path):
    needs(WAYS[0])
    model, args = transformer()
    done = quantise(model, (args, {}), data_of(model, args, labelled=False), tmp_path / "out", how=WAYS[0])
    assert [(row.name, row.accuracy, row.against_dense) for row in done.rows] == [("model", None, None), ("model int8", None, None)]
    assert done.verdict == [] and 0 < done.rows[1].error < 0.12
    assert "softmax and norms stay float32" in " ".join(done.notes)


class Four(nn.Module):
    """Four rows and no other number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.two(torch.relu(self.one(x.reshape(4, 12))))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_batch_that_is_not_free_is_filled_with_rows(runtime, tmp_path):
    needs(How(runtime))
    model, x = Four().eval(), torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = torch.cat([model(part) for part in x[:48].split(4)]).argmax(1)
    data = Data("fours", Batches(x[:26], size=10), Batches(x[26:48], y[26:48], 11), True)
    done = quantise(model, ((x[:4],), {}), data, tmp_path / "out", how=How(runtime, rounds=2))
    assert (done.calibration_rows, done.test_rows) == (20, 16)  # of batches of 10, 10, 6 and of 11, 11
    assert done.rows[0].seconds.batch == 4 and done.rows[0].accuracy == 1
    assert any("could not keep the batch free" in note for note in done.notes)


@pytest.mark.parametrize("runtime, ranges", [
    ("onnxruntime", "percentile"), ("onnxruntime", "entropy"), ("openvino", "percentile"), ("openvino", "mean_minmax"),
])  # fmt: skip
def test_other_ways_to_find_ranges(runtime, ranges, tmp_path):
    needs(How(runtime))
    model, args = convolutional()
    x = data_of(model, args).train.inputs
    file, int8 = made(model, x, How(runtime, ranges=ranges), tmp_path)
    outputs = [run(f, [((x,), {})]).outputs[0][0] for f in (file, int8)]
    assert 1e-4 < np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0]) < 0.3


class Crushed(nn.Module):
    """One hidden unit is 100,000 times as large as the others and then not read: one scale for all of them leaves the others no step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.first.weight[3] *= 1e5
            self.middle.weight[:, 3] = 0

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


def test_a_layer_that_int8_ruins_is_named(tmp_path):
    needs(WAYS[0])
    model = Crushed().eval()
    data = data_of(model, (torch.randn(2, 8),), labelled=False)
    done = quantise(model, ((torch.randn(2, 8),), {}), data, tmp_path / "out", how=WAYS[0])
    said = next(text for text in done.warnings if "off those of float32" in text)
    assert said.split("lose most: ")[1].startswith("middle (from")
    assert "last (" not in said  # its error is no larger than that of what it reads


# ---------------------------------------------------------------- refusals leave everything as it was
@runtimes
def test_a_file_that_exists_outlives_a_failure(how, tmp_path, monkeypatch):
    needs(how)
    model, args = convolutional()
    file, int8 = made(model, data_of(model, args).train.inputs, how, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def half(source, target, *rest, **more):
        with open(target, "wb") as file:
            file.write(b"half a file")
        raise RuntimeError("no room\nbelow")

    if how.runtime == "onnxruntime":
        monkeypatch.setattr("onnxruntime.quantization.quantize_static", half)
        monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", half)
    else:
        monkeypatch.setattr("openvino.save_model", lambda model, path, **more: half(model, path))
    with pytest.raises(ModelError, match="no room"):
        int8_file(file, int8.path, [((args[0],), {})], how)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"float"}


def test_refusals_keep_the_folder(tmp_path, monkeypatch):
    needs(WAYS[0])
    model, args = convolutional()
    data = data_of(model, args)
    quantise(model, (args, {}), data, tmp_path / "out", how=WAYS[0])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    wrong = Data("wrong labels", data.train, Batches(data.test.inputs, data.test.labels + 90), True)
    for refused in (lambda: quantise(model, (args, {}), wrong, tmp_path / "out", how=WAYS[0]),
                    lambda: quantise(model.double(), ((args[0].double(),), {}), data, tmp_path / "out", how=WAYS[0])):  # fmt: skip
        with pytest.raises(sc.SecateurError):
            refused()
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_file_that_has_the_name_of_ours_is_not_taken_for_one(tmp_path):
    needs(WAYS[0])
    model, args = convolutional()
    (tmp_path / "model-int8.onnx").write_text("the only copy")
    with pytest.raises(InputError, match=r"did not write \(model-int8.onnx\), going by quantised.json"):
        quantise(model, (args, {}), data_of(model, args), tmp_path, how=WAYS[0])
    assert (tmp_path / "model-int8.onnx").read_text() == "the only copy"


def test_files_of_another_runtime_and_no_calibration_rows_are_refused(tmp_path):
    needs(WAYS[0])
    model, args = convolutional()
    path = onnx_file(model, args, tmp_path / "model.onnx")
    file = File(path, "onnx", ("input",))
    with pytest.raises(InputError, match="openvino quantises openvino"):
        int8_file(file, tmp_path / "int8.xml", [((args[0],), {})], How("openvino"))
    with pytest.raises(InputError, match="there are none"):
        int8_file(file, tmp_path / "int8.onnx", [], How())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_nncf_reports_nothing_to_anybody():
    pytest.importorskip("nncf")
    import os
    import subprocess
    import sys

    code = "from secateur.quantise.by_nncf import imported; imported(); from nncf.telemetry import wrapper; print(type(wrapper.telemetry).__name__)"
    bare = {k: v for k, v in os.environ.items() if k not in ("CI", "NNCF_CI", "NNCF_DEV")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare)
    assert done.stdout.split()[-1] == "MagicMock", done.stderr


# ---------------------------------------------------------------- the command
def test_the_command_writes_beside_the_folder_and_prints_the_table(tmp_path, capsys, monkeypatch):
    needs(WAYS[0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_own.py").write_text(
        "import torch\nfrom tests.quantise.nets import convolutional, data_of\n"
        "def net():\n    return convolutional()\n"
        "def rows():\n    return data_of(*convolutional())\n"
    )
    assert main(["prune", "beside_own.py:net", "--at-most", "macs=60%", "-o", "out"]) == 0
    capsys.readouterr()
    assert main(["quantise", "out", "--data", "beside_own:rows", "--dense", "beside_own.py:net", "--rounds", "2"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("dense int8", "pruned int8", "accuracy", "int8 alone against pruning alone", "64 training rows", "out-int8"))
    assert sorted(path.name for path in (tmp_path / "out-int8").iterdir()) == ["model-int8.onnx", "quantised.json"]
    assert main(["quantise", "out", "--data", "beside_own:rows", "--rounds", "2", "--json", "--kind", "weights"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in facts["rows"]] == ["model", "model int8"] and not math.isnan(facts["rows"][1]["error"])


@pytest.mark.parametrize("line, said", [
    (["quantise", "out"], "Add --data DATA"),
    (["quantise", "my.py:net", "--data", "digits"], "Add -o FOLDER"),
    (["quantise", "out", "--data", "digits", "--kind", "int4"], "unknown kind"),
])  # fmt: skip
def test_command_lines_that_cannot_be_meant(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    assert said in capsys.readouterr().err


SIGNALLED = """
import ctypes, os, signal, sys
from pathlib import Path
import numpy as np
from secateur.quantise import by_nncf
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
def stack():
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(now := Stack()))
    return now.start, now.size
seen, before = [], stack()
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
model = Path(sys.argv[1])
feeds = [{"x": np.random.default_rng(i).normal(size=(1, 6, 16)).astype("float32")} for i in range(4)]
by_nncf.static(model, model.with_name("int8.xml"), feeds)
assert stack() == before, "another signal stack than before"
os.kill(os.getpid(), signal.SIGUSR1)
assert seen == [1]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the plugin's own signal stacks are those of Linux")
def test_signals_are_survived_after_openvino_ran_in_this_process(tmp_path):
    needs(How("openvino", "static"))
    model, args = transformer()
    (file, _, _), _ = write("openvino", model, (args, {}), tmp_path)
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(file.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:] or done.returncode
