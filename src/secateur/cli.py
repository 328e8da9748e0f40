"""The command line. No logic: each command reads its options, calls one public function and prints what it returns.

Exit codes: 0 done; 1 refused (a model, data, budget or folder that cannot be used; nothing was changed);
2 a command that cannot be meant (an unknown option, target or criterion); 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from secateur import cli_generalise, cli_masks, cli_recover, cli_run, explore, job, terminal
from secateur import demo as the_demo
from secateur.budget import parse, parse_points
from secateur.errors import InputError, SecateurError
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
    Repair,
    Score,
    Seed,
    Source,
    Weights,
    command_line,
    given_data,
    show,
    working,
)
from secateur.trace import trace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=(
    "Pruning of PyTorch networks, structures and single weights, that proves what it did. "
    "Exit codes: 0 done, 1 refused and nothing changed, 2 wrong usage."
))  # fmt: skip

@app.command()
def prune(  # noqa: PLR0913  # a command's parameters are its options
    context: typer.Context,
    model: Model,
    at_most: Annotated[list[str], typer.Option(help=(
        "macs=50%, params=1M, bytes=2MiB, peak_memory=50% or latency=60%@onnxruntime,batch=1,threads=1; repeatable, all are met."
    ))],
    data: Source = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the result.")] = None,
    score: Score = "auto",
    allocation: Allocation = "auto",
    repair: Repair = "auto",
    ignore: Ignore = None,
    depth: Depth = False,
    seed: Seed = 0,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut a model down to a budget, prove the cut, repair it from DATA without training, and save it."""
    targets = [parse(text) for text in at_most]
    with working(as_json) as say:
        held, given = given_data(data, inputs, seed, model)
        say("load")
        loaded = load_model(model, weights, seed=seed)
        example = job.example_inputs(loaded, held, given)
        options = job.Options(score, allocation, repair, tuple(ignore or ()), seed, depth)
        done = job.run(loaded, example, targets, options, data=held, out=out, progress=say)
        job.write_report(done, settings={"command": command_line(context)})
    if as_json:
        show(done.to_json())
    else:
        terminal.job(done)


@app.command()
def sweep(  # noqa: PLR0913  # as above
    context: typer.Context,
    model: Model,
    at_most: Annotated[list[str], typer.Option(help=(
        "macs=80%,60%,40%, or latency=80%,60%@torch,threads=1; a second list is met together with the first, point by point."
    ))],
    data: Source = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the report, with one folder for each point.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a sweep: points that lie whole in the folder stay.")] = False,
    latency: Annotated[bool, typer.Option("--latency", help="Time every point on torch, in turns with the dense model.")] = False,
    score: Score = "auto",
    allocation: Allocation = "auto",
    repair: Repair = "auto",
    ignore: Ignore = None,
    depth: Depth = False,
    seed: Seed = 0,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune to several budgets with one set of statistics, and show what each costs in quality."""
    points = parse_points(at_most)
    with working(as_json) as say:
        held, given = given_data(data, inputs, seed, model)
        say("load")
        loaded = load_model(model, weights, seed=seed)
        example = job.example_inputs(loaded, held, given)
        options = job.Options(score, allocation, repair, tuple(ignore or ()), seed, depth)
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
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for a report.")] = None,
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
            terminal.out().print(f"written: {out}", markup=False, soft_wrap=True)


@app.command()
def measure(  # noqa: PLR0913  # as above
    model: Model,
    factory: Annotated[str | None, typer.Option(help="Builds the dense model of a folder without a graph.")] = None,
    data: Source = None,
    threads: Annotated[int, typer.Option(help="Threads of the timed runs.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed runs.")] = 20,
    runtime: Annotated[str, typer.Option(help="What the latency is taken on: torch, torch.compile, onnxruntime or openvino.")] = "torch",
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
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the result.")] = None,
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
    terminal.out().print(f"written: {page}", markup=False, soft_wrap=True)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one message on standard error, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)  # torch's own
    try:
        app(given, prog_name="secateur", obj=given)
        return 0
    except SystemExit as stop:  # how typer ends: done, wrong usage, interrupted
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if "--debug" in given:
            raise
        terminal.error(_message(error))
        return 2 if isinstance(error, InputError) else 1


def _message(error: Exception) -> str:
    if isinstance(error, SecateurError):
        return str(error)
    return (
        f"{type(error).__name__}: {error}\n  This is a fault of secateur, not of the command. "
        "Run it again with --debug and report what it prints."
    )



