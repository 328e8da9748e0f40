"""All structures, family by family."""

from . import attention, convs, norms, parts, reshape, residual, rotary

CASES = (
    *convs.CASES,
    *residual.CASES,
    *reshape.CASES,
    *parts.CASES,
    *norms.CASES,
    *attention.CASES,
    *rotary.CASES,
)
