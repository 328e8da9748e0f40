"""`secateur demo`: train a small network on real digits, halve its MACs, prove it, repair it from the same digits without
training; all of it in about a minute."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from secateur import job, terminal
from secateur.budget import MACs
from secateur.job import Job, Options
from secateur.measure import Comparison, at_rest, compare
from secateur.models import LoadedModel, load_data
from secateur.models.digits import trained_digits_net

ROWS = 64  # of the batch that is timed


def run(out: str | Path | None = None, *, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Train, prune to half the MACs, repair by least squares, time both. Prints unless `quiet`; returns the facts.

    Raises DataError where scikit-learn, which brings the digits, is missing.
    """
    data = load_data("digits", seed=seed)
    with terminal.bar("training on 1,437 digits") as progress:
        dense = trained_digits_net(data, seed=seed, progress=progress)
    loaded = LoadedModel(dense, data.example(1)[0], "digits_net")
    with terminal.stages() as say:
        done = job.run(
            loaded, job.example_inputs(loaded, data, ()), [MACs(at_most="50%")], Options(seed=seed),
            data=data, out=out, progress=say,
        )  # fmt: skip
        say("timing both in turns")
        timed = _timed(dense, done, data)
    sides = {name: timed.seconds[name].to_json() for name in ("dense", "pruned")}
    job.write_report(
        done, latency=[{"runtime": "torch", "threads": sides["dense"]["threads"], "batch": ROWS, **sides, "ratio": timed.ratio["pruned"]}],
        settings={"command": f"secateur demo --seed {seed} -o {shlex.quote(str(out))}"},
    )  # fmt: skip
    if not quiet:
        _show(done, timed)
    return {**done.to_json(), "seconds": timed.to_json()}


def _timed(dense: Any, done: Job, data: Any) -> Comparison:
    (x,), _ = data.example(ROWS)
    pruned = done.result.model
    with at_rest(dense), at_rest(pruned):
        return compare({"dense": lambda: dense(x), "pruned": lambda: pruned(x)}, rounds=30, batch=len(x))


def _show(done: Job, timed: Comparison) -> None:
    terminal.job(done)
    dense, pruned = (timed.seconds[name] for name in ("dense", "pruned"))
    terminal.out().print(
        f"time: {terminal.seconds(dense.median)} dense, {terminal.seconds(pruned.median)} pruned "
        f"({1 / timed.ratio['pruned']:.2f} times as fast; batch of {dense.batch}, {dense.threads} thread, "
        f"{dense.rounds} rounds in turns, interquartile range {terminal.seconds(pruned.spread)})"
    )
