"""The command line. No logic: each command reads its options, calls one public function and prints what it returns.

Exit codes: `secateur.endings`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from secateur import (
    __version__,
    cli_advise,
    cli_export,
    cli_generalise,
    cli_masks,
    cli_quantise,
    cli_recover,
    cli_run,
    explore,
    job,
    terminal,
)
from secateur import demo as the_demo
from secateur.budget import parse, parse_points
from secateur.cli_help import helped
from secateur.endings import CODES, ending
from secateur.masks import METHODS
from secateur.measure import measure as measured
from secateur.measure.run import batch_of
from secateur.models import load_model
from secateur.report import rewrite
from secateur.score import CRITERIA, find
from secateur.shell import (
    Allocation,
    Debug,
    Depth,
    Ignore,
    Inputs,
    Json,
    Model,
    Only,
    Repair,
    Rows,
    Score,
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
from secateur.trace import trace

app = typer.Typer(
    pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True, epilog=CODES,
    help="Pruning of PyTorch networks, structures and single weights, that proves what it did.",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        print(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def every(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
    debug: Debug = False,
) -> None:
    """What holds for every command."""


@app.command()
def prune(  # noqa: PLR0913  # a command's parameters are its options
    context: typer.Context,
    model: Model,
    at_most: Annotated[list[str], typer.Option(metavar="BUDGET", help=(
        "macs=50%, params=1M, bytes=2MiB, peak_memory=50% or latency=60%@onnxruntime,batch=1,threads=1; repeatable, all are met."
    ))],
    data: Source = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the result.")] = None,
    score: Score = "auto",
    allocation: Allocation = "auto",
    repair: Repair = "auto",
    ignore: Ignore = None,
    only: Only = None,
    depth: Depth = False,
    rows: Rows = None,
    seed: Seed = 0,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut a model down to a budget, prove the cut, repair it from DATA without training, and save it; torchrun shares the work."""
    targets = [parse(text) for text in at_most]
    with sharing(as_json) as (say, processes):
        held, given = given_data(data, inputs, seed, model, rows=rows)
        say("load")
        loaded = load_model(model, weights, seed=seed)
        held = shared(held, processes)
        example = job.example_inputs(loaded, held, given)
        options = job.Options(score, allocation, repair, tuple(ignore or ()), seed, depth, tuple(only or ()))
        done = job.run(loaded, example, targets, options, data=held, out=out if processes.rank == 0 else None, progress=say)
        job.write_report(done, settings={"command": command_line(context)})
    if processes.rank:
        return
    if as_json:
        show(done.to_json())
    else:
        terminal.job(done)


@app.command()
def sweep(  # noqa: PLR0913  # as above
    context: typer.Context,
    model: Model,
    at_most: Annotated[list[str], typer.Option(metavar="BUDGET", help=(
        "macs=80%,60%,40%, or latency=80%,60%@torch,threads=1; a second list is met together with the first, point by point."
    ))],
    data: Source = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the report, with one folder for each point.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a sweep: points that lie whole in the folder stay.")] = False,
    latency: Annotated[bool, typer.Option("--latency", help="Time every point on torch, in turns with the dense model.")] = False,
    score: Score = "auto",
    allocation: Allocation = "auto",
    repair: Repair = "auto",
    ignore: Ignore = None,
    only: Only = None,
    depth: Depth = False,
    rows: Rows = None,
    seed: Seed = 0,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune to several budgets with one set of statistics, and show what each costs in quality."""
    by_one("sweep")
    points = parse_points(at_most)
    with working(as_json) as say:
        held, given = given_data(data, inputs, seed, model, rows=rows)
        say("load")
        loaded = load_model(model, weights, seed=seed)
        example = job.example_inputs(loaded, held, given)
        options = job.Options(score, allocation, repair, tuple(ignore or ()), seed, depth, tuple(only or ()))
        around = explore.Around(held, out, resume, latency, command_line(context))
        done = explore.run(loaded, example, points, options, around, say)
    if as_json:
        show(done.to_json())
    else:
        terminal.sweep(done)


@app.command()
def inspect(  # noqa: PLR0913  # as above
    context: typer.Context,
    model: Model,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Error of each group at every count of its units, from DATA.")] = False,
    ignore: Ignore = None,
    data: Source = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for a report.")] = None,
    seed: Seed = 0,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which units can be cut together, what is frozen and why, and what each unit costs."""
    with working(as_json) as say:
        held, given = given_data(data, inputs, seed, model)
        say("load")
        loaded = load_model(model, weights, seed=seed)
        args, kwargs = job.example_inputs(loaded, held, given)
        say("trace")
        graph = trace(loaded.model, args, kwargs, ignore=tuple(ignore or ()))
        curves = explore.sensitivity(loaded.model, graph, held, seed, say) if sensitivity else []
    rows = batch_of(args, kwargs)
    facts = {
        "model": model, "batch": rows, "cost": asdict(graph.cost()), "groups": graph.describe(),
        "blocks": list(graph.blocks), "frozen": [asdict(frozen) for frozen in graph.frozen], "notes": list(graph.notes),
        **({"sensitivity": curves} if sensitivity else {}),
    }  # fmt: skip
    if out is not None:
        explore.write_inspection(out, graph, facts, {"command": command_line(context), "seed": seed, "data": data})
    if as_json:
        show(facts)
    else:
        terminal.inspection(model, graph, rows)
        if sensitivity:
            terminal.sensitivity(curves, len(graph.groups), rows)
        if out is not None:
            terminal.out().print(f"written: {out}", soft_wrap=True)


@app.command()
def measure(  # noqa: PLR0913  # as above
    model: Model,
    factory: Annotated[str | None, typer.Option(metavar="FUNCTION", help="Builds the dense model of a folder without a graph.")] = None,
    data: Source = None,
    threads: Annotated[int, typer.Option(help="Threads of the timed runs.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed runs.")] = 20,
    runtime: Annotated[str, typer.Option(metavar="NAME", help=(
        "What the latency is taken on: torch, torch.compile, onnxruntime or openvino."
    ))] = "torch",
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count MACs, parameters and bytes; measure peak memory and latency, one batch as the inputs say."""
    with working(as_json) as say:
        held, given = given_data(data, inputs, 0, model)
        say("load")
        loaded = load_model(model, weights, factory=factory)
        args, kwargs = job.example_inputs(loaded, held, given)
        say("measure")
        found = measured(loaded.model, args, kwargs, threads=threads, rounds=rounds, runtime=runtime)
    if as_json:
        show({"model": model, **found.to_json()})
    else:
        terminal.measurement(model, found)


@app.command()
def demo(
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the result.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small network on real digits, halve its MACs, repair it without training, and show what that did."""
    facts = the_demo.run(out, seed=seed, quiet=as_json)
    if as_json:
        show(facts)


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", show_default=False, help="Folder with a report.json, or that file.")],
    debug: Debug = False,
) -> None:
    """Write report.html again from the report.json of a saved folder."""
    page = rewrite(folder)
    terminal.out().print(f"written: {page}", soft_wrap=True)


@app.command()
def explain(
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False, help="A criterion; without it, a table of all.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a criterion computes, what it needs and costs, when to use it, and where it comes from."""
    if name:
        found = find(name) if name in CRITERIA or name not in METHODS else METHODS[name]
        if as_json:
            show(found.facts())
        else:
            terminal.criterion(found.facts())
        return
    criteria, methods = ([each.facts() for each in table] for table in (CRITERIA.values(), METHODS.values()))
    if as_json:
        show({"criteria": criteria, "methods": methods})
    else:
        terminal.criteria(criteria)
        terminal.criteria(methods, "methods for single weights (`secateur mask --by`): what scores lowest becomes zero")


app.command()(cli_masks.mask)
app.command()(cli_masks.verify)
app.command()(cli_run.run)
app.command()(cli_recover.recover)
app.command()(cli_generalise.generalise)
app.command()(cli_advise.advise)
app.command()(cli_quantise.quantise)
app.command()(cli_export.export)
helped(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one message on standard error, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)  # torch's own
    return ending(lambda: app(given, prog_name="secateur", obj=given), "--debug" in given, last=arguments is None)
