"""Every other runtime, where it is installed."""

import numpy as np
import pytest
import torch
from torch import nn

from secateur import export
from secateur.errors import ModelError

from .test_export import QUICK, net, things, x

PACKAGES = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["onnx", "onnxscript", "openvino"], "executorch": ["executorch"]}
FILES = {"onnx": ["model.onnx"], "openvino": ["model.bin", "model.xml"], "executorch": ["model.pte"]}


def needs(format):
    for name in PACKAGES[format]:
        pytest.importorskip(name, reason=f"{name} is not installed")


EACH = ["onnx", "openvino", pytest.param("executorch", marks=pytest.mark.slow)]


@pytest.mark.parametrize("format", EACH)
def test_a_runtime_gives_what_torch_gives(format, tmp_path):
    needs(format)
    model = net().train()
    done = getattr(export, format)(model, (x(),), tmp_path / "p", how=export.How(rounds=2, batches=(1, 3)))
    assert things(done.folder) == ["export.json", *FILES[format]] and things(tmp_path) == ["p"]
    assert done.deviation < 1e-5 and done.peak_bytes["pruned"] > done.idle_bytes > 0 and done.seconds.seconds["pruned"].median > 0
    assert [row.batch for row in done.deviations] == ([2] if format == "executorch" else [2, 1, 3])
    model.eval()
    file = export.File(done.path, format, done.inputs)
    call = x(2 if format == "executorch" else 5)
    found = export.run(file, [((call,), {})]).outputs[0][0]
    assert np.allclose(found, model(call).detach().numpy(), atol=1e-5)


def test_an_onnx_file_says_batch(tmp_path):
    needs("onnx")
    import onnx

    path = export.onnx_file(net(), (x(),), tmp_path / "a" / "m.onnx")
    graph = onnx.load(path).graph
    names = [value.type.tensor_type.shape.dim[0].dim_param for value in (graph.input[0], graph.output[0])]
    assert names == ["batch", "batch"] and things(path.parent) == ["m.onnx"]
    found = export.race({"one": path, "two": path}, ((x(),), {}), rounds=3)
    assert set(found.seconds) == {"one", "two"} and found.seconds["two"].rounds == 3


class Odd(nn.Module):
    """Eigenvalues: a runtime for the edge has none."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(4, 16), Eigen()

    def forward(self, t):
        return self.inner(self.first(t))


class Eigen(nn.Module):
    def forward(self, t):
        return torch.linalg.eigvalsh(t.view(-1, 4, 4))


@pytest.mark.parametrize("format", EACH)
def test_an_operator_that_is_missing_is_named_with_its_layer(format, tmp_path):
    needs(format)
    with pytest.raises(ModelError, match=r"linalg_eig\w* in 'inner'"):
        getattr(export, format)(Odd(), (torch.randn(2, 4),), tmp_path / "p", how=QUICK)
    assert not things(tmp_path)
