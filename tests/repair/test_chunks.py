"""Calibration data in chunks of one shape: nothing twice, nothing lost without being counted."""

import pytest
import torch
from torch import nn

from secateur.errors import DataError
from secateur.repair.chunks import SIZE, chunks, fitting
from secateur.trace import trace
from tests.repair.networks import Sequenced, linear


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear(4, 6), linear(6, 3)

    def forward(self, ids=None, weights=None):
        return self.b(self.a(ids).relu() * weights)


def made(model=None, *args, **kwargs):
    """(example, again): a trace, and what traces with other inputs and keeps count."""
    torch.manual_seed(0)
    model = (model or nn.Sequential(linear(4, 6), nn.ReLU(), linear(6, 3))).eval()
    calls = []

    def again(args, kwargs):
        calls.append(args)
        return trace(model, args, kwargs)

    graph = trace(model, args, kwargs) if kwargs else trace(model, args or (torch.randn(2, 4),))
    return graph, again, calls


def numbered(rows):
    return torch.arange(rows * 4, dtype=torch.float32).reshape(rows, 4)


def all_rows(found):
    return torch.cat([args[0] for args, _ in found.feeds])


@pytest.mark.parametrize("batch", [1, 3, 50, 64, 100, 300])
def test_rows_come_in_order_in_equal_chunks(batch):
    graph, again, calls = made()
    x = numbered(300)
    found = chunks(list(x.split(batch)), graph, again)
    assert {args[0].shape for args, _ in found.feeds} == {torch.Size([64, 4])}
    assert torch.equal(all_rows(found), x[:256])
    assert (found.rows, found.left_out) == (256, 44)
    assert len(calls) == 1
    assert found.graph.program.example_inputs[0][0].shape == (64, 4)


FEW = [(1, 1, 1), (2, 1, 2), (3, 1, 3), (7, 1, 7), (8, 2, 4), (103, 25, 4), (200, 50, 4), (256, 64, 4), (700, 64, 10)]


@pytest.mark.parametrize(("rows", "size", "count"), FEW)
def test_few_rows_make_smaller_chunks_so_that_some_can_judge(rows, size, count):
    graph, again, _ = made()
    found = chunks([numbered(rows)], graph, again)
    assert [len(args[0]) for args, _ in found.feeds] == [size] * count
    assert found.rows + found.left_out == rows


def test_at_most_so_many_rows_are_read():
    graph, again, _ = made()
    given = []

    def data():
        for i in range(100):
            given.append(i)
            yield numbered(100) + i

    found = chunks(data(), graph, again)
    assert found.rows == 2048
    assert len(given) == 21


def test_the_trace_at_hand_is_used_where_it_fits():
    graph, again, calls = made(None, torch.randn(64, 4))
    found = chunks([numbered(300)], graph, again)
    assert found.graph is graph and not calls


def test_labels_are_dropped_and_inputs_are_not():
    graph, again, _ = made()
    x = numbered(8)
    for data in ([(x, torch.arange(8))], [[x]], [x], [{"input": x, "labels": torch.arange(8)}]):
        found = chunks(data, graph, again)
        assert torch.equal(torch.cat([next(iter((*args, *kwargs.values()))) for args, kwargs in found.feeds]), x)
        assert all(len(args) + len(kwargs) == 1 for args, kwargs in found.feeds)


def test_inputs_by_name():
    x, w = numbered(8), torch.arange(48.0).reshape(8, 6)
    graph, again, _ = made(Named(), ids=x[:2], weights=w[:2])
    found = chunks([{"ids": x[:5], "weights": w[:5], "labels": x, "other": 3}, {"ids": x[5:], "weights": w[5:]}], graph, again)
    assert all(set(kwargs) == {"ids", "weights"} and not args for args, kwargs in found.feeds)
    assert torch.equal(torch.cat([kwargs["ids"] for _, kwargs in found.feeds]), x)
    assert torch.equal(torch.cat([kwargs["weights"] for _, kwargs in found.feeds]), w)


def test_inputs_by_name_in_another_order_are_not_those_of_the_trace():
    """Both have the same shape, so only their names tell them apart."""
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(4, 6), linear(6, 3)

        def forward(self, x=None, mask=None):
            return self.b(self.a(x * (mask > 0)).relu())

    x, mask = torch.randn(64, 4), torch.randn(64, 4)
    graph, again, calls = made(Gated(), x=x, mask=mask)
    assert chunks([{"x": x, "mask": mask}] * 4, graph, again).graph is graph and not calls
    found = chunks([{"mask": mask, "x": x}] * 4, graph, again)
    assert found.graph is not graph and len(calls) == 1
    assert list(found.graph.program.example_inputs[1]) == ["mask", "x"]


def test_rows_of_another_shape_are_left_out_and_counted():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph, again, _ = made(model, torch.randn(2, 1, 6, 6))
    data = [torch.randn(5, 1, 8, 8), torch.randn(7, 1, 6, 6), torch.randn(3, 1, 8, 8), torch.randn(1, 1, 8, 8).double()]
    found = chunks(data, graph, again)
    assert {args[0].shape[1:] for args, _ in found.feeds} == {torch.Size([1, 8, 8])}
    assert (found.rows, found.left_out) == (8, 8)


def test_chunks_are_the_repairs_own():
    """A forward that writes into its input must not write into the user's data."""
    graph, again, _ = made()
    x = numbered(256)
    found = chunks([x], graph, again)
    found.feeds[0][0][0].zero_()
    assert torch.equal(x, numbered(256))


BAD = {
    "none at all": ([], "no row"),
    "empty batches": ([torch.zeros(0, 4)], "no row"),
    "NaN": ([torch.ones(3, 4), torch.full((3, 4), float("nan"))], "batch 2 of data.* holds NaN"),
    "no tensor": ([{3}], "a batch is a set"),
    "other features": ([torch.randn(8, 5)], "cannot be traced"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named(name):
    graph, again, _ = made()
    data, said = BAD[name]
    with pytest.raises(DataError, match=said):
        chunks(data, graph, again)


def test_an_input_without_a_row_for_each_sample_cannot_be_split():
    model = Sequenced(lambda m, x: m.a(x), a=linear(4, 3))
    model.forward = lambda x, scale: model.a(x) * scale
    graph, again, _ = made(model, torch.randn(2, 4), torch.randn(3))
    with pytest.raises(DataError, match="no row for each"):
        chunks([(torch.randn(5, 4), torch.randn(3))], graph, again)


def test_other_groups_on_the_data_than_on_the_example():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = linear(4, 6), linear(6, 5), linear(5, 3)

        def forward(self, x):
            y = self.b(self.a(x).relu())
            return self.c(y.relu()) if len(x) > 2 else y[:, :3]

    graph, again, _ = made(Branching(), torch.randn(2, 4))
    with pytest.raises(DataError, match="other groups on the data"):
        chunks([torch.randn(40, 4)], graph, again)


def test_a_large_network_gets_fewer_rows():
    """Of a value of 64 MiB a row six are held at once: 4 GiB hold ten rows, and a chunk is the least."""
    wide = nn.Sequential(nn.Linear(4, 2**24, bias=False), nn.ReLU()).to("meta")
    graph = trace(wide, (torch.randn(2, 4, device="meta"),))
    assert fitting(graph) == SIZE
    narrow = nn.Sequential(nn.Linear(4, 2**18, bias=False), nn.ReLU()).to("meta")  # 1 MiB a row
    assert fitting(trace(narrow, (torch.randn(2, 4, device="meta"),))) == 4 * 2**30 // (6 * 2**20)
