"""One call on each runtime: the same numbers as torch's, the model as it was, nothing left behind."""

import copy
import importlib
import sys
import tempfile
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from secateur.errors import InputError, ModelError
from secateur.measure import latency, measure, prepared
from secateur.measure.runtimes import onnx_file, rows

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4)
    )


def needs(package):
    for name in ("onnx", "onnxscript", package):
        pytest.importorskip(name, reason=f"{name} is not installed")


RUNTIMES = ["torch", "onnxruntime", "openvino"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_computes_what_torch_computes(runtime, monkeypatch, tmp_path):
    if runtime != "torch":
        needs(runtime)
    model = tiny().train()  # the dropout would show if the model were exported as it is
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(X)
    with prepared(model, (X,), runtime=runtime) as call:
        found = call()
    found = found if isinstance(found, torch.Tensor) else torch.from_numpy(found[0].copy())
    assert torch.allclose(found, wanted, atol=1e-5)
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not list(tmp_path.glob("secateur*"))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_keywords_and_dicts_find_their_names(runtime):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, a, *, first=None, scale=2.0, second=None):
            return {"y": self.linear(a) * scale + first - 3 * second, "n": first.sum()}

    needs(runtime)
    a, first, second = torch.randn(3, 2, 4)
    with prepared(Named(), (a,), {"second": second, "first": first}, runtime=runtime) as call:
        assert float(call()[1]) == pytest.approx(float(first.sum()), abs=1e-5)  # and `prepared` compared the rest


def test_measure_takes_the_runtime():
    needs("onnxruntime")
    found = measure(tiny(), (X,), runtime="onnxruntime", rounds=2).to_json()
    assert (found["runtime"], found["batch"], found["threads"]) == ("onnxruntime", 2, 1)
    assert found["latency_median_s"] > 0


@pytest.mark.slow
def test_many_models_of_one_class_are_all_compiled():
    """torch.compile gives up after eight versions of one code object; a search has more."""
    from torch._dynamo.utils import counters

    counters.clear()
    for width in range(3, 13):
        with prepared(nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU()), (X,), runtime="torch.compile") as call:
            assert call().shape == (2, width, 10, 10)
    assert counters["stats"]["unique_graphs"] == 10


def test_bfloat16_is_a_copy():
    model = tiny()
    with prepared(model, (X,), dtype="bfloat16") as call:
        assert call().dtype == torch.bfloat16
    assert model[0].weight.dtype == torch.float32
    with prepared(model.double(), (X.double(),), dtype="float32") as call:
        assert call().dtype == torch.float32
    assert model[0].weight.dtype == torch.float64


def test_rows_are_repeated_or_left_out():
    (x, fixed), more = rows((X, torch.zeros(7)), {"m": X[:, 0]}, 5)
    assert torch.equal(x, torch.cat([X, X, X])[:5]) and fixed.shape == (7,) and more["m"].shape == (5, 12, 12)
    assert torch.equal(rows((X,), {}, 1)[0][0], X[:1])
    with prepared(tiny(), (X,), batch=5) as call:
        assert call().shape == (5, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runtime": "tensorrt"}, "There are: torch, torch.compile, onnxruntime, openvino"),
        ({"threads": 0}, "1 to 1024"),
        ({"threads": True}, "1 to 1024"),
        ({"dtype": "int8"}, "float32, bfloat16"),
        ({"runtime": "onnxruntime", "dtype": "bfloat16"}, "float32"),
    ],
)
def test_senseless_settings_are_refused(settings, said):
    with pytest.raises(InputError, match=said), prepared(tiny(), (X,), **settings):
        pass
    if "dtype" not in settings:
        with pytest.raises(InputError, match=said):
            measure(tiny(), (X,), **settings)


@pytest.mark.parametrize(("runtime", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
@pytest.mark.parametrize("missing", ["onnxscript", None])
def test_a_missing_package_names_the_pip_line(monkeypatch, runtime, extra, missing):
    monkeypatch.setitem(sys.modules, missing or runtime, None)  # what makes an import fail
    with pytest.raises(ModelError, match=rf'pip install "secateur\[{extra}\]"'):
        latency(tiny(), (X,), runtime=runtime, rounds=2)


def test_a_runtime_that_computes_something_else_is_refused(monkeypatch):
    needs("onnxruntime")
    wrong, right = tiny(), onnx_file.exported
    with torch.no_grad():
        wrong[-1].bias += 0.01

    @contextmanager
    def other(model, args, kwargs):
        with right(wrong.eval(), args, kwargs) as path:
            yield path

    monkeypatch.setattr(importlib.import_module("secateur.measure.runtimes.onnx_runtime"), "exported", other)
    with pytest.raises(ModelError, match="deviates from torch"), prepared(tiny(), (X,), runtime="onnxruntime"):
        pass


def test_deviation_knows_nan_and_infinity():
    model, x = nn.Identity(), torch.tensor([1.0, float("nan"), float("inf"), 4.0])
    assert onnx_file.agree(model, (x,), {}, lambda: [x.numpy()], "it") == 0.0
    near = torch.tensor([1.002, float("nan"), float("inf"), 4.0])
    assert onnx_file.agree(model, (x,), {}, lambda: [near.numpy()], "it") == pytest.approx(0.0005, rel=1e-3)
    for wrong in ([1.0, 2.0, float("inf"), 4.0], [1.0, float("nan"), 3.0, 4.0]):
        with pytest.raises(ModelError, match="deviates"):
            onnx_file.agree(model, (x,), {}, lambda wrong=wrong: [torch.tensor(wrong).numpy()], "it")
    with pytest.raises(ModelError, match="shapes"):
        onnx_file.agree(model, (x,), {}, lambda: [x.numpy(), x.numpy()], "it")


def test_the_second_output_is_compared_as_the_first_is():
    """NaN is no larger than any number, so max() over the outputs would pass it over."""

    class Two(nn.Module):
        def forward(self, x):
            return x, x + 1

    x, lost = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    for found in ([x, lost], [lost, x + 1]):
        with pytest.raises(ModelError, match="deviates"):
            onnx_file.agree(Two(), (x,), {}, lambda found=found: [t.numpy() for t in found], "it")


def test_a_model_that_cannot_be_exported_says_so():
    needs("onnxruntime")

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match="cannot export Branching"):
        latency(Branching(), (torch.ones(1, 3),), runtime="onnxruntime", rounds=2)
