"""Whether weights have the zeros that their masks say, and no others are missing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.pattern import GROUPS, NM, TURNED, Kernels, legal, of_kernel, parse_pattern


def wrong_zeros(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[str]:
    """One sentence for every weight that is not what its mask says: a weight outside the mask that is not zero, or a -0."""
    found = []
    for name, stays in masks.items():
        w = state[name].detach()
        outside = int((w[~stays.to(w.device)] != 0).sum())
        if outside:
            found.append(f"{name}: {outside} weights that the plan removed are not zero")
        elif minus := int((torch.signbit(w) & (w == 0)).sum()):
            found.append(f"{name}: {minus} zeros are -0")
    return found


def illegal(masks: Mapping[str, Tensor], patterns: Mapping[str, str], at_most: bool = False) -> list[str]:
    """One sentence for every mask that does not obey its pattern. Patterns count along input channels. `at_most`: masks are those of
    values, of which some that stay may be 0, so a block may hold zeros."""
    found = []
    for name, stays in masks.items():
        pattern = of_kernel(parse_pattern(patterns[name]), stays[0, 0].numel())
        if at_most and not isinstance(pattern, NM):
            continue
        stays = stays.t() if patterns[name].endswith(TURNED) else stays
        places_first = stays.dim() > 2 and pattern.unit[1] > 1 and not isinstance(pattern, Kernels)
        rows = stays.flatten(2).transpose(1, 2).reshape(len(stays), -1) if places_first else stays.flatten(1)
        groups = int(patterns[name].partition(GROUPS)[2] or 1)
        if len(rows) % groups or not all(legal(pattern, part) for part in rows.chunk(groups)):
            found.append(f"{name}: its mask is no legal pattern {pattern}")
    return found
