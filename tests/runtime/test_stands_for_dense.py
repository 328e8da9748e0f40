"""A sparse layer does what the layer did that it stands for, wherever a model or torch asks: or it refuses as that one would."""

import pytest
import torch
from torch import nn

from secateur.runtime import sparse
from secateur.runtime.chain import Chain
from tests.runtime.test_layers import zeroed


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_another_number_of_channels_is_refused(kernels, channels):
    dense = zeroed(nn.Conv2d(3, 8, 3, padding=1))
    with torch.no_grad():
        dense.weight[:, 1:] = 0  # so that fewer channels than there are would do
    layer, x = sparse(dense), torch.randn(2, channels, 8, 8)
    chain = Chain({"a": layer, "b": sparse(nn.Conv2d(8, 4, 1))}, [(0, -1), (1, -1)], [2])
    said = f"to have 3 channels, but it has {channels}"
    for call in (layer, chain, sparse(nn.Conv2d(3, 8, 1)), lambda x: torch.export.export(layer, (x,))):
        with pytest.raises(RuntimeError, match=said), torch.no_grad():
            call(x)
    with pytest.raises(RuntimeError, match=said):
        sparse(nn.Conv1d(3, 8, 3))(torch.randn(2, channels, 9))
    with pytest.raises(RuntimeError, match="columns"):
        torch.export.export(sparse(nn.Linear(3, 8)), (torch.randn(2, channels),))
