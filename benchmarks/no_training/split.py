"""Which samples calibrate and which are measured: plain numbers, so that a test can show they never meet.

Calibration samples come from training files only and differ from seed to seed. Two data sets have no such files: the
1,000 keyword windows are halved once and for all, and the texts are divided by the file they come from.
"""

from __future__ import annotations

import zlib

import torch

CALIBRATION = 2048  # images, at most
KEYWORDS = 448  # of the 500 windows that are never measured


def chosen(pool: int, count: int, seed: int) -> torch.Tensor:
    """`count` different numbers below `pool`, in the order of `seed`: int64 (count,)."""
    return torch.randperm(pool, generator=torch.Generator().manual_seed(seed))[:count]


def cifar_file(seed: int) -> str:
    """The one training file of the five that a seed calibrates from (their order is random already)."""
    return f"train_{seed % 5}"


def keywords(seed: int, windows: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """(calibration, test) numbers of keyword windows. The half that is measured is the same for every seed."""
    order = chosen(windows, windows, 12345)
    pool, test = order[: windows // 2], order[windows // 2 :]
    return pool[chosen(len(pool), min(KEYWORDS, len(pool)), seed)], test.sort().values


def characters(length: int) -> tuple[range, range]:
    """(calibration, validation) positions of a text: the language model was trained on the first 90 %."""
    border = int(0.9 * length)
    return range(border), range(border, length)


def measured(path: str) -> bool:
    """Whether texts of this source file are measured (True) or calibrate (False): half of the files each."""
    return zlib.crc32(path.encode()) % 2 == 0
