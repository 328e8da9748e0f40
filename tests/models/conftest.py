import sys
from pathlib import Path

import pytest
import torch

import secateur as sc

sys.path.insert(0, str(Path(__file__).parent))  # so that `nets` can be named as a user's module is


@pytest.fixture(scope="session")
def result():
    import nets

    return sc.prune(nets.net(), (torch.randn(2, 1, 8, 8),), sc.MACs(at_most="60%"))


@pytest.fixture(scope="session")
def rewritten():
    import nets

    return sc.prune(nets.hard(), (torch.randn(4, 6),), sc.MACs(at_most="60%"))
