"""One small function per ATen op: which dimensions of its inputs and outputs are equal.

A rule takes the tracer and the `Call` and returns the dimensions of the output. An op that is not in the table
freezes every axis it touches and says so.
"""

from __future__ import annotations

from secateur.trace.rules import conv, create, linear, norms, pointwise, recurrent, reduce, select, shape

RULES = {
    **pointwise.RULES,
    **linear.RULES,
    **conv.RULES,
    **norms.RULES,
    **reduce.RULES,
    **shape.RULES,
    **select.RULES,
    **create.RULES,
    **recurrent.RULES,
}
