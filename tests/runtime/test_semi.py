"""2:4 on GPUs: where it is computed, and what is said where it is not."""

import pytest
import torch
from torch import nn

from secateur.errors import InputError
from secateur.runtime import convert
from secateur.runtime.forms import formed
from secateur.runtime.semi import is_two_of_four, semi_structured, why_not_semi


def paired(rows=64, columns=128, **options):
    """A layer with the first two of every four weights."""
    layer = nn.Linear(columns, rows, **options)
    with torch.no_grad():
        layer.weight.view(rows, -1, 4)[..., 2:] = 0
    return layer


def test_two_of_four_is_seen():
    layer = paired()
    assert is_two_of_four(layer.weight) and not is_two_of_four(nn.Linear(128, 64).weight)
    with torch.no_grad():
        layer.weight[3, 7] = 1.0  # a third of its four
    assert not is_two_of_four(layer.weight) and not is_two_of_four(torch.zeros(4, 6)) and not is_two_of_four(torch.zeros(4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu_it_says_so():
    x = torch.randn(80, 128)
    assert "GPU" in why_not_semi(paired(), x) and "not 2:4" in why_not_semi(nn.Linear(128, 64), x) and "Conv1d" in why_not_semi(nn.Conv1d(2, 2, 1), x)
    for call in (lambda: semi_structured(paired(), x), lambda: formed(paired(), "2:4")):
        with pytest.raises(InputError, match="GPU"):
            call()
    found = convert(nn.Sequential(paired(), nn.ReLU()).eval(), (torch.randn(1, 128),), rounds=3, chosen=None)
    assert any("GPU" in note for note in found.notes) == (not found.chosen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_it_is_the_dense_product(dtype):
    layer, x = paired(256, 512).to("cuda", dtype).eval(), torch.randn(128, 512, device="cuda", dtype=dtype)
    assert not why_not_semi(layer, x) and "few" in why_not_semi(layer, x[:8])
    assert "multiple" in why_not_semi(paired(40, 128).to("cuda", dtype), x[:, :128])
    with torch.no_grad():
        torch.testing.assert_close(semi_structured(layer, x)(x), layer(x), rtol=2e-2, atol=2e-2)
