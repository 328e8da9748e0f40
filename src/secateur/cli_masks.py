"""The commands for single weights: `secateur mask` and `secateur verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur import job, terminal
from secateur.errors import InputError
from secateur.models import load_model
from secateur.models.verify import verify as verified
from secateur.pattern import parse_pattern
from secateur.shell import (
    Debug,
    Ignore,
    Inputs,
    Json,
    Model,
    Rows,
    Seed,
    Source,
    Weights,
    by_one,
    command_line,
    given_data,
    shared,
    sharing,
    show,
    working,
)
from secateur.sparsify import Sparse
from secateur.stream.verify import is_stream, verify_stream


def mask(  # noqa: PLR0913  # a command's parameters are its options
    context: typer.Context,
    model: Model,
    keep: Annotated[str | None, typer.Option(help="Share of the weights that stays, 10% or 0.1; an N:M pattern has its own.")] = None,
    pattern: Annotated[str, typer.Option(help="free, free/row, 2:4 (2 kept of 4), 4x1 (blocks of 4 outputs), 4x1/row, kernels.")] = "free",
    by: Annotated[str, typer.Option(help="magnitude, wanda, ria, sparsegpt, obc or alps. auto: alps with DATA, else magnitude.")] = "auto",
    budget: Annotated[str, typer.Option(help="How much of each layer stays: uniform, erk, lamp, owl, atp, or search (slow).")] = "uniform",
    refit: Annotated[bool, typer.Option(help="Fit the weights that stay, from DATA.")] = True,
    permute: Annotated[bool, typer.Option("--permute", help="With N:M: units in an order in which it loses less; costs nothing.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help=(
        "Of hf/FOLDER: block by block from shards to shards, in the memory of about one block; goes on after a kill."
    ))] = False,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text at most.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 2048,
    at_once: Annotated[bool, typer.Option("--at-once", help="With --stream: one pass for each block; quicker, a little less exact.")] = False,
    data: Source = None,
    rows: Rows = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the result.")] = None,
    entropy: Annotated[bool, typer.Option(help="Deflate where weights are, for a smaller folder; slower to load.")] = False,
    ignore: Ignore = None,
    seed: Seed = 0,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make single weights zero, in a pattern, fit those that stay from DATA without training, and save the model."""
    how = Sparse(keep, by, parse_pattern(pattern), budget, refit, ignore=tuple(ignore or ()), seed=seed, permute=permute)
    how.share()  # what cannot be meant is said before anything is loaded
    if stream:
        by_one("--stream")
        if other := [name for name, given in (("--weights", weights), ("--input", inputs), ("--rows", rows)) if given]:
            raise InputError(f"{other[0]} beside --stream, which reads shards of hf/FOLDER and --samples of text.\n  Leave one of them out.")
        if entropy:
            raise InputError("--entropy beside --stream, which writes an ordinary Hugging Face folder of dense weights.\n  Leave one of them out.")
        return _streamed(model, how, (data, samples, length, at_once), out, as_json)
    with sharing(as_json) as (say, processes):
        held, given = given_data(data, inputs, seed, model, (samples, length), rows)
        say("load")
        loaded = load_model(model, weights, seed=seed)
        held = shared(held, processes)
        example = job.example_inputs(loaded, held, given)
        done = job.masked(loaded, example, how, data=held, out=out if processes.rank == 0 else None, entropy=entropy, progress=say)
        job.write_report(done, settings={"command": command_line(context)})
    if processes.rank:
        return
    if as_json:
        show(done.to_json())
    else:
        terminal.job(done)


def _streamed(model: str, how: Sparse, given: tuple[str | None, int, int, bool], out: str | None, as_json: bool) -> None:
    with working(as_json) as say:
        streamed = job.streamed(model, how, given, out, say)
    if as_json:
        show(streamed.to_json())
    else:
        terminal.streamed(streamed, how.by)


def verify(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", show_default=False, help="What `mask -o` or `prune -o` wrote.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a saved model: hashes of its files, exactly the zeros of its plan, legal patterns, no -0."""
    found = verify_stream(folder) if is_stream(folder) else verified(folder)
    if as_json:
        show(found.to_json())
    else:
        terminal.verified(found)
    if found.problems:
        raise typer.Exit(1)
