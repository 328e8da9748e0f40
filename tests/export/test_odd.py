"""Odd models and odd settings: the file is the model, or there is one clear error and no file."""

from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import ModelError
from secateur.export import check
from secateur.export.runner import File, Run


def test_one_output_that_is_no_number_is_enough_to_refuse(monkeypatch):
    class Two(nn.Module):
        def forward(self, x):
            return x, x + 1

    x = torch.ones(2, 3)
    file, lost = File(Path("m.pt2"), "pt2"), torch.full((2, 3), float("nan"))
    for found in ([x, lost], [lost, x + 1]):
        monkeypatch.setattr(check, "run", lambda *_, found=found: Run([[t.numpy() for t in found]], None, 0, 0, ""))
        with pytest.raises(ModelError, match="deviates from torch by nan") as said:
            check.checked(Two(), file, [((x,), {})])
        assert "--tolerance" not in str(said.value)
