"""All structures, family by family."""

from . import attention, bare, blocks, convs, foreign, knots, norms, parts, recurrent, reshape, residual, rotary

CASES = (
    *convs.CASES,
    *residual.CASES,
    *reshape.CASES,
    *parts.CASES,
    *norms.CASES,
    *attention.CASES,
    *rotary.CASES,
    *bare.CASES,
    *recurrent.CASES,
    *foreign.CASES,
    *blocks.CASES,
    *knots.CASES,
)
