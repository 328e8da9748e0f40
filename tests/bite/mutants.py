"""Ways to break the library that the tests must notice. `make bite` tries them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In ``file`` (below src/) put ``new`` for ``old``, which stands there exactly once; then ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS: list[Mutant] = [
    Mutant(
        "attention is not counted",
        "secateur/measure/count.py",
        "return 2 * prod(outer) * length * key[-2] * (depth + value[-1])",
        "return 0",
        ("tests/measure/test_count.py",),
    ),
]
