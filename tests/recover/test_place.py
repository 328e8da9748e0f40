"""Where training runs. There is no GPU here: the meta device stands for another one."""

import pytest
import torch
from torch import nn

from secateur.errors import InputError
from secateur.recover.place import moved, place


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) + torch.arange(4, dtype=x.dtype)


def test_the_calls_of_a_graph_that_make_tensors_move_along():
    graph = torch.export.export(Positions(), (torch.zeros(2, 4),)).module()
    assert graph(torch.zeros(2, 4)).device.type == "cpu"
    there = moved(graph, torch.device("meta"))
    made = [n for n in there.graph.nodes if "arange" in str(n.target)]
    assert made and all(n.kwargs["device"] == torch.device("meta") for n in made)
    assert there(torch.zeros(2, 4, device="meta")).device.type == "meta"


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place("auto") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")  # Accelerate puts them there, one on each
    assert place("auto") == torch.device("cpu")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place("auto") == place("cpu") == torch.device("cpu")


@pytest.mark.parametrize("said", ["gpu", "meta", "privateuseone", "cpu 1", ""])
def test_a_device_that_is_not_here_is_refused(said, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="--device"):
        place(said)


def test_one_device_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="for 2 processes"):
        place("cpu")
