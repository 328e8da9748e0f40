"""Tensors made on the spot. Where every position has the same value the axes are free and follow what they are
combined with; where the value depends on the position (`arange`) they stay whole."""

from __future__ import annotations

from secateur.axes import ONE, Axis
from secateur.trace.call import Call, Value


def uniform(t, c: Call) -> Value:
    return tuple(Axis(s) if s > 1 else ONE for s in c.shape)


def positional(t, c: Call) -> Value:
    return c.constants("values depend on the position")


UNIFORM = "zeros ones full empty rand randn new_zeros new_ones new_full new_empty scalar_tensor"
POSITIONAL = "arange linspace logspace eye tril_indices triu_indices hann_window randperm randint _tensor_constant"

RULES = {
    **dict.fromkeys(UNIFORM.split(), uniform),
    **dict.fromkeys(POSITIONAL.split(), positional),
}
