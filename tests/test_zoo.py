"""The coverage suite's list is as wide as promised, and its limits bite."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.zoo import catalogue, guard, torchvision_models

BIG = {"convnext_large", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}  # 150 million parameters and more


def test_names_are_unique_and_the_list_is_wide():
    entries = catalogue.entries()
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names))
    assert sum(entry.kind == "timm" for entry in entries) >= 75
    assert sum(entry.kind == "huggingface" for entry in entries) >= 22


@pytest.mark.parametrize("kind", ["classification", "segmentation", "video"])
def test_every_torchvision_builder_is_listed(kind):
    pytest.importorskip("PIL")
    models = torchvision_models.library()
    module = models if kind == "classification" else getattr(models, kind)
    ours = {entry.name.partition("/")[2] for entry in catalogue.entries() if entry.kind == kind}
    assert ours == set(models.list_models(module=module)) - BIG


def _endless(name: str, out: Path) -> None:
    guard.write(out, {"model": name, "stage": "started"})
    while True:
        pass


def _hungry(name: str, out: Path) -> None:
    held = []
    while True:
        held.append(os.urandom(1 << 24))


def _dies(name: str, out: Path) -> None:
    raise RuntimeError("said so")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="limits are read from /proc")
@pytest.mark.parametrize(
    ("work", "limits", "said"),
    [
        (_endless, guard.Limits(seconds=0.3), "processor seconds"),
        (_hungry, guard.Limits(bytes=2**30 + 2**29), "memory limit"),
        (_dies, guard.Limits(), "said so"),
    ],
)
def test_a_model_that_misbehaves_costs_only_itself(work, limits, said):
    start = time.monotonic()
    row = guard.run(work, "someone", limits)
    assert said in row["stopped"]
    assert time.monotonic() - start < 60
    if work is _endless:
        assert row["stage"] == "started"
