import contextlib
import subprocess
from types import SimpleNamespace

import pytest
import torch

from secateur.export import fresh, runner


@pytest.fixture
def here(monkeypatch):
    """Files run in this process: for what is not about the process of their own, whose start takes seconds."""

    def run(command, cwd, **options):
        with contextlib.chdir(cwd):
            fresh.main(*command[-2:])
        return subprocess.CompletedProcess(command, 0, "", "")

    threads = torch.get_num_threads()
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    yield
    torch.set_num_threads(threads)
