"""A converted model, packaged by AOTInductor and run by a C++ program."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.runtime import build, convert
from secateur.runtime.build import compiler
from tests.runtime.test_layers import zeroed

SOURCE = Path(__file__).parents[2] / "examples" / "aot" / "run.cpp"


@pytest.mark.slow
def test_a_program_without_python_computes_the_same(kernels, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(zeroed(nn.Conv2d(16, 32, 3, padding=1)), nn.ReLU(), nn.Flatten(), zeroed(nn.Linear(32 * 64, 64))).eval()
    x = (torch.arange(2 * 16 * 8 * 8) / (2 * 16 * 8 * 8)).view(2, 16, 8, 8)
    made = convert(model, (x,), chosen={"0": "4x1", "3": "4x1"}).model
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(torch.export.export(made, (x,)), package_path=str(tmp_path / "model.pt2"))
        wanted = float(model(x).double().sum())
    root = Path(torch.__file__).parent
    line = [*compiler().split(), "-std=c++20", "-O1", str(SOURCE), "-o", str(tmp_path / "run"), f"-I{root}/include",
            f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
            f"-Wl,-rpath,{root}/lib"]  # fmt: skip
    subprocess.run(line, check=True)
    done = subprocess.run([tmp_path / "run", build(), package, *"2 16 8 8".split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) == pytest.approx(wanted, abs=1e-3)
