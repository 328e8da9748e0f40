"""Measured targets: how they are written, what they refuse, what they measure."""

import pytest
import torch
from torch import nn

from secateur.budget import Bytes, Latency, MACs, Params, PeakMemory, Reading, parse, plan
from secateur.errors import InputError
from secateur.measure import peak_bytes
from secateur.trace import trace


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("latency=60%", Latency("60%")),
        ("latency=60%@onnxruntime,batch=1,threads=1", Latency("60%", "onnxruntime", batch=1, threads=1)),
        (" Latency = 3.5ms @ torch.compile , threads = 2 ", Latency("3.5ms", "torch.compile", threads=2)),
        ("latency=60%,dtype=bfloat16", Latency("60%", dtype="bfloat16")),
        ("latency=350us@openvino", Latency("350us", "openvino")),
        ("peak_memory=4MiB", PeakMemory("4MiB")),
        ("macs=50%", MACs("50%")), ("params=50%", Params("50%")), ("bytes=50%", Bytes("50%")),
    ],
)  # fmt: skip
def test_targets_are_read(text, target):
    assert parse(text) == target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed=50%", "latency=60%@onnxruntime"),
        ("latency", "is not a target"),
        ("latency=120%", "below 100 %"),
        ("latency=100%", "below 100 %"),
        ("latency=0%", "above 0"),
        ("latency=fast", "'3.5ms'"),
        ("latency=3 parsecs", "'3.5ms'"),
        ("latency=", "'3.5ms'"),
        ("latency=60%@tensorrt", "onnxruntime, openvino"),
        ("latency=60%@", "unknown runtime ''"),
        ("latency=60%,threads=0", "1 to 1024"),
        ("latency=60%,threads=two", "no whole number"),
        ("latency=60%,threads=1,threads=2", "not a setting"),
        ("latency=60%,cores=2", "not a setting"),
        ("latency=60%,2", "not a setting"),
        ("latency=60%,batch=0", "one row"),
        ("latency=60%@onnxruntime,dtype=bfloat16", "float32"),
        ("latency=60%,dtype=int8", "float32, bfloat16"),
        ("peak_memory=150%", "below 100 %"),
        ("peak_memory=3ms", "'4MiB'"),
    ],
)
def test_senseless_targets_are_refused(text, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        parse(text)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), True, None])
def test_senseless_numbers_are_refused(wrong):
    for target in (Latency, PeakMemory):
        with pytest.raises(InputError):
            target(wrong)


def test_limits_and_shares():
    half = Reading(dense=0.010, cut=0.006, ratio=0.55)  # the ratio is the median of the rounds, not the ratio of medians
    assert Latency("50%").limit(0.010) == pytest.approx(0.005)
    assert Latency("50%").share(half) == pytest.approx(1.1)
    assert Latency("4ms").limit(0.010) == Latency(0.004).limit(0.010) == pytest.approx(0.004)
    assert Latency("4ms").share(half) == pytest.approx(1.5)
    assert PeakMemory("2KiB").limit(4096) == 2048
    with pytest.raises(InputError, match=r"dense model takes 0\.01"):
        Latency("12ms").limit(0.010)


def test_a_target_says_itself_in_full():
    assert str(Latency("60%", "openvino", batch=4, threads=2)) == "Latency(at_most='60%', runtime='openvino', batch=4, threads=2)"
    assert str(Latency("60%", dtype="bfloat16")) == "Latency(at_most='60%', runtime='torch', threads=1, dtype='bfloat16')"
    assert str(PeakMemory(100)) == "PeakMemory(at_most=100)"


def test_peak_memory_reads_what_measure_counts():
    dense, cut, x = nn.Linear(10, 50), nn.Linear(10, 20), torch.zeros(2, 10)
    with PeakMemory("50%").beside(dense, (x,)) as read:
        found = read(cut, 5)
    assert (found.dense, found.cut) == (peak_bytes(dense, (x,)), peak_bytes(cut, (x,)))
    assert found.ratio == found.cut / found.dense


def test_latency_reads_both_in_turns_and_leaves_the_models():
    dense, cut, x = nn.Linear(8, 8), nn.Linear(8, 4), torch.zeros(2, 8)
    with Latency("50%", batch=3).beside(dense, (x,)) as read:
        found = read(cut, 3)
    assert found.rounds == 3 and found.dense > 0 and found.cut > 0 and found.ratio > 0
    assert dense.training and cut.training and torch.is_grad_enabled()


def test_plan_alone_cannot_meet_what_is_measured():
    graph = trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (torch.zeros(1, 4),))
    with pytest.raises(InputError, match="Pass it to prune"):
        plan(graph, {n: torch.ones(g.size) for n, g in graph.groups.items()}, Latency("50%"))
