"""Peaks worked out by hand: weights and inputs all the time, activations while something refers to them."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from secateur.measure import count_bytes, peak_bytes


def chain(*widths):
    return nn.Sequential(*[nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])


def test_a_chain_holds_two_activations_at_once():
    model = chain(10, 50, 40, 10)
    floats = 2 * 10 + max(2 * 50, 2 * 50 + 2 * 40, 2 * 40 + 2 * 10)
    assert peak_bytes(model, (torch.zeros(2, 10),)) == count_bytes(model) + 4 * floats


def test_a_shortcut_keeps_its_activation_alive():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x):
            x = self.first(x)
            return x + self.second(x)

    model = Shortcut()
    floats = 20 + 20 + 20 + 20  # input, first, second, sum
    assert peak_bytes(model, (torch.zeros(2, 10),)) == count_bytes(model) + 4 * floats


def test_in_place_and_views_cost_nothing():
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(inplace=True), nn.Flatten())
    assert peak_bytes(model, (torch.zeros(2, 10),)) == count_bytes(model) + 4 * 40


def test_meta_device_agrees_up_to_what_its_kernels_return_besides():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.zeros(1, 3, 16, 16)
    there = peak_bytes(model, (x,))
    statistics = 2 * 8 * 4  # the batch norm of the meta device also returns a mean and a deviation
    assert peak_bytes(model.to("meta"), (x,)) == there + statistics


@pytest.mark.parametrize("width", [64, 256])
def test_the_profiler_sees_the_same_allocations(width):
    model = chain(width, 4 * width, width)
    x = torch.zeros(32, width)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(x)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak_bytes(model, (x,)) == count_bytes(model) + x.nbytes + peak
