"""Where training runs. There is no GPU here: the meta device stands for another one."""

import pytest
import torch
from torch import nn

from secateur.errors import InputError
from secateur.models.data import Batches
from secateur.recover import Training
from secateur.recover.engine import Engine
from secateur.recover.loop import Run
from secateur.recover.order import Order
from secateur.recover.place import moved, place


class Positions(nn.Module):
    """Calls that name a device as a keyword, by position and as that of another tensor, and a constant."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer(x) + torch.arange(4, dtype=x.dtype) + torch.arange(4, device=x.device).to(x)
        return x + torch.arange(4).to(x.device, torch.float32) + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Region(Positions):
    """A part in float32, whatever is around it."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = self.layer(x) * 2
        return x + 1


META, CPU = torch.device("meta"), torch.device("cpu")


def nodes_of(model):
    return [n for m in model.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes]


def graph_of(model):
    return torch.export.export(model, (torch.zeros(2, 4),)).module()


def test_the_calls_of_a_graph_that_name_a_device_move_along():
    graph, x = graph_of(Positions()), torch.randn(2, 4)
    wanted = graph(x)
    assert torch.equal(moved(graph, CPU)(x), wanted)
    there = moved(graph, META)
    assert there(torch.zeros(2, 4, device="meta")).device == META
    said = [str((n.args, n.kwargs)) for n in nodes_of(there)]
    assert any("meta" in s for s in said) and not any("cpu" in s for s in said)


def test_regions_in_another_precision_are_of_the_device():
    graph = moved(graph_of(Region()), META)
    named = [n.args[0] for n in nodes_of(graph) if "autocast" in str(n.target) and n.args]
    assert "meta" in named and "cpu" not in named


def test_a_teacher_is_moved_to_the_model_whole():
    data, teacher = Batches(torch.zeros(2, 4), torch.zeros(2).long()), graph_of(Positions())
    run = Run(Positions().to(META), Order(data, None, 0), Training(), Engine())
    run.teacher = teacher
    run._with_teacher(next(iter(data)))
    assert teacher(torch.zeros(2, 4, device="meta")).device == META


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"cuda cannot be used: .*\n  Add --device cpu"):  # it says that it is there, and it is not
        place("auto")
    monkeypatch.setenv("WORLD_SIZE", "2")  # Accelerate puts them there, one on each
    assert place("auto") == CPU
    with pytest.raises(InputError, match="for 2 processes"):
        place("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place("auto") == place("cpu") == CPU
    with pytest.raises(InputError, match="for 2 processes"):
        place("cuda")
    monkeypatch.delenv("WORLD_SIZE")
    assert place("auto") == place("cpu") == CPU


@pytest.mark.parametrize("said", ["gpu", "meta", "privateuseone", "cpu 1", ""])
def test_a_device_that_is_not_here_is_refused(said, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=r"--device|cannot be used"):
        place(said)
