"""What the command line prints: tables on standard output, progress and errors on standard error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from secateur.figures import joules, number, percent, seconds, size
from secateur.layer_tables import masks, repairs
from secateur.screen import Screen

if TYPE_CHECKING:
    from secateur.explore import Sweep
    from secateur.job import Job
    from secateur.measure import Measurement
    from secateur.models.verify import Verified
    from secateur.plan import Cost
    from secateur.runtime import Converted
    from secateur.stream import Streamed
    from secateur.trace import Graph

REPAIRED = {
    "gauss_newton": "repaired by least squares, branches as a whole", "least_squares": "repaired by least squares",
    "bias": "biases corrected", "batch_norm": "BatchNorm re-estimated",
}  # fmt: skip
MOST_ROWS = 40  # of a table; the rest is counted, and in --json


def out() -> Screen:
    """Standard output, as it is now."""
    return Screen()


def error(message: str) -> None:
    """One message on standard error, as it was written, without wrapping."""
    Screen(stderr=True).print(f"secateur: {message}", soft_wrap=True)


@contextmanager
def stages() -> Iterator[Any]:
    """A function that names the stage at work; on a terminal each stage has a spinner and its seconds."""
    console = Screen(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=1, visible=False)

        def say(stage: str | None) -> None:
            """What is done stays on the terminal as a line; only the stage at work moves, however many there are."""
            done = progress.tasks[0]
            if done.visible and console.is_terminal:
                progress.print(Text("✓", style="green"), done.description, Text(f"{done.elapsed or 0:.0f} s", style="dim"))
            progress.reset(task, description=stage or "", visible=stage is not None)

        yield say
        say(None)


@contextmanager
def bar(title: str) -> Iterator[Any]:
    """A function (done, total) that moves a bar on a terminal."""
    console = Screen(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def recovered(to: str, facts: dict[str, Any]) -> None:
    """What `recover` has to say: the loss of the first and the last epoch, and the accuracy on the test part."""
    console, rows = out(), facts["history"]
    if rows:
        console.print(f"{rows[-1]['step']:.0f} steps in {seconds(rows[-1]['seconds'])}: loss {rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}")
    if facts["accuracy"]:
        console.print("accuracy: " + ", ".join(f"{name} {percent(value)}" for name, value in facts["accuracy"].items()))
    for note in facts["notes"]:
        console.print(f"note: {note}")
    console.print(f"saved in {to}")


# ---------------------------------------------------------------- tables
def job(done: Job) -> None:
    """Everything `prune` has to say."""
    console, result = out(), done.result
    if result.masks:
        console.print(masks(result.masks, result.plan.why))
    else:
        console.print(_groups(done.to_json()["groups"]))
    console.print(costs({"dense": result.before, "pruned": result.after}, done.rows))
    if result.masks:
        whole, gone = result.plan.why["of_parameters"], result.plan.why["of_weights"] - result.plan.why["kept"]
        console.print(f"{gone:,} of {whole:,} parameters are zeroed ({percent(gone / max(1, whole))}); zeros are stored as such")
    for row in result.plan.why.get("achieved", ()):
        console.print(asked(row))
    if result.repairs:
        console.print(repairs(result.repairs))
    if done.accuracy:
        console.print(accuracies(done.accuracy, result.plan.why.get("repair", "")))
    proof = result.proof
    console.print(f"proof: largest deviation from the masked original {proof.max_error:.1e} in float64, relative "
                  f"(at most {proof.tolerance:.0e} is accepted)")  # fmt: skip
    own = "its own class, weights set to zero" if result.masks else "its own class, tensors and attributes resized"
    how = own if result.cut.how == "attributes" else "the captured graph"
    console.print(f"model: {how}")
    for note in result.notes:
        console.print(f"note: {note}")
    if done.folder is not None:
        console.print(f"saved: {done.folder}", soft_wrap=True)


def streamed(done: Streamed, by: str) -> None:
    """What became of a model that was made sparse block by block."""
    console = out()
    console.print(masks(done.masks, {"score": "sparsegpt" if by == "auto" else by}))
    if done.blocks < done.depth:
        console.print(f"{done.depth - done.blocks} of {done.depth} blocks were there from a run before")
    for note in done.notes:
        console.print(f"note: {note}")
    console.print(f"saved: {done.folder}", soft_wrap=True)


def verified(found: Verified) -> None:
    """What `verify` looked at, and what it found wrong."""
    console = out()
    console.print(f"{found.folder}: {found.files} files with the hashes they were written with", soft_wrap=True)
    if found.weights:
        console.print(f"{found.zeros:,} of {found.size:,} weights of {found.weights} layers are zero")
    if 0 < found.stored < found.dense:
        console.print(f"{size(found.stored)} of tensors on disk, {size(found.dense)} dense ({found.dense / found.stored:.2f} times smaller)")
    for problem in found.problems:
        console.print(f"wrong: {problem}", soft_wrap=True)
    console.print("nothing is wrong" if not found.problems else f"{len(found.problems)} things are wrong")


def _groups(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("group", "kind", title="groups that lost units")
    for name in ("units", "left", "MACs saved", "parameters saved"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda r: -r["macs_saved"])[:MOST_ROWS]:
        table.add_row(
            row["name"], row["kind"], f"{row['units_before']:,}", f"{row['units_after']:,}",
            number(row["macs_saved"]), number(row["params_saved"]),
        )  # fmt: skip
    if len(rows) > MOST_ROWS:
        table.caption = f"and {len(rows) - MOST_ROWS} more (--json lists all)"
    return table


def costs(models: Mapping[str, Cost], rows: int) -> Table:
    """One column per model; the first is what the percentages are of."""
    table = Table("cost")
    first = next(iter(models.values()))
    for name in models:
        table.add_column(name, justify="right")
        if models[name] is not first:
            table.add_column("of it", justify="right")
    lines = ((f"MACs (batch of {rows})", "macs", number), ("parameters", "params", number), ("bytes", "bytes", size))
    for label, figure, form in lines:
        cells = [label]
        for cost in models.values():
            value = getattr(cost, figure)
            cells.append(form(value))
            if cost is not first:
                cells.append(percent(value / max(1, getattr(first, figure))))
        table.add_row(*cells)
    return table


def asked(row: Mapping[str, Any]) -> str:
    """One target, asked and achieved."""
    form = {"latency": seconds, "bytes": size, "peak_memory": size}.get(row["figure"], number)
    text = f"asked {row['target']}: {percent(row['ratio'])}, {form(row['achieved'])} of {form(row['dense'])}"
    return f"{text}, at most {form(row['limit'])}"


def accuracies(measured: Mapping[str, float], repair: str = "batch_norm") -> Table:
    """Accuracy on the test rows, stage by stage."""
    names = {"dense": "dense", "cut": "as cut", "batch_norm": "BatchNorm re-estimated", "repaired": REPAIRED.get(repair, "repaired")}
    table = Table("accuracy on the test rows")
    table.add_column("", justify="right")
    for name, value in measured.items():
        table.add_row(names.get(name, name), percent(value))
    return table


def inspection(name: str, graph: Graph, rows: int) -> None:
    """What can be cut, what cannot and why, and what the model costs."""
    console = out()
    table = Table("group", "kind", "lives in", title=f"{name}: {len(graph.groups)} groups")
    for column in ("units", "MACs a unit", "parameters a unit"):
        table.add_column(column, justify="right")
    found = graph.describe()
    for row in found[:MOST_ROWS]:
        held = row["tensors"]
        where = f"{held[0]}{f' and {len(held) - 1} more' if len(held) > 1 else ''}"
        table.add_row(row["name"], row["kind"], where, f"{row['units']:,}", number(row["macs_per_unit"]),
                      number(row["params_per_unit"]))  # fmt: skip
    if len(found) > MOST_ROWS:
        table.caption = f"and {len(found) - MOST_ROWS} more (--json lists all)"
    console.print(table)
    if graph.blocks:
        shown = ", ".join(list(graph.blocks)[:4]) + (" ..." if len(graph.blocks) > 4 else "")
        console.print(f"{len(graph.blocks)} residual blocks can go as a whole with --depth: {shown}")
    if graph.frozen:
        console.print(_frozen(graph))
    console.print(costs({"dense": graph.cost()}, rows))
    for note in graph.notes:
        console.print(f"note: {note}")


def _frozen(graph: Graph) -> Table:
    reasons: dict[str, list[Any]] = defaultdict(list)
    for frozen in graph.frozen:
        reasons[frozen.reason].append(frozen)
    table = Table("why it stays", "axes", "of sizes", "for example", title="frozen")
    for reason, axes in sorted(reasons.items(), key=lambda item: -len(item[1])):
        sizes = sorted({axis.size for axis in axes})
        shown = ", ".join(map(str, sizes[:4])) + (" ..." if len(sizes) > 4 else "")
        table.add_row(reason, str(len(axes)), shown, next((w for axis in axes for w in axis.where), ""))
    return table


def sensitivity(rows: Sequence[Mapping[str, Any]], groups: int, batch: int) -> None:
    """Error of each group, and divergence of the output, with about 75, 50 and 25 % of its units; worst first."""
    table = Table("group", "kind", title="sensitivity: error of the layers that read a group, and divergence of the output")
    for name in ("units", *(f"{share} % kept" for share in (75, 50, 25)), f"MACs at 50 % (batch of {batch})"):
        table.add_column(name, justify="right")
    picked = [(row, [_nearest(row["points"], share) for share in (0.75, 0.5, 0.25)]) for row in rows]
    for row, three in sorted(picked, key=lambda pair: -pair[1][1]["error"])[:MOST_ROWS]:
        cells = [f"{p['error']:.2g}" + (f" / {p['divergence']:.2g}" if p["divergence"] is not None else "") for p in three]
        table.add_row(row["group"], row["kind"], f"{row['units']:,}", *cells, number(three[1]["macs"]))
    said = "error, of the variance of what is fed / divergence, of the output"
    said += f"; {groups - len(rows)} groups have no curve, because something else than linear layers sums over them" if groups > len(rows) else ""
    table.caption = said + ("; --json lists all" if len(rows) > MOST_ROWS else "")
    out().print(table)


def _nearest(points: Sequence[Mapping[str, Any]], kept: float) -> Mapping[str, Any]:
    """The point nearest to that share of the units; of two equally near ones, one with a divergence."""
    return min(points, key=lambda p: (abs(p["kept"] - kept), p["divergence"] is None))


def sweep(done: Sweep) -> None:
    """One row per point."""
    console, dense = out(), done.dense
    table = Table("budget", title=f"{done.name}: {len(done.points)} budgets")
    labelled = any(row.get("accuracy") is not None for row in done.points)
    timed = any(row.get("seconds") is not None for row in done.points)
    heads = [f"MACs (batch of {done.rows})", "of it", "parameters", *(["as cut", "accuracy"] if labelled else []), "divergence"]
    for name in heads + (["time", "of it"] if timed else []):
        table.add_column(name, justify="right")
    first = [number(dense["macs"]), percent(1), number(dense["params"]), *(["", _percent(dense["accuracy"])] if labelled else []), ""]
    first += [seconds(dense["seconds"]), percent(1)] if dense.get("seconds") else []
    table.add_row("dense", *first)
    for row in done.points:
        cells = [number(row["macs"]), percent(row["share"]), number(row["params"])]
        cells += [_percent(row["stages"].get("cut")), _percent(row["accuracy"])] if labelled else []
        cells += [f"{row['kl']:.2g}" if row.get("kl") is not None else ""]
        cells += [seconds(row["seconds"]), percent(row["ratio"])] if timed else []
        table.add_row(row["label"], *cells)
    console.print(table)
    chosen = done.settings
    console.print(f"score {chosen['score']}, allocation {chosen['allocation']}, repair {chosen['repair']}")
    if done.folder is not None:
        console.print(f"saved: {done.folder}", soft_wrap=True)


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def measurement(name: str, found: Measurement) -> None:
    """One model's figures, with the conditions they hold under."""
    table = Table("figure", title=name)
    table.add_column("", justify="right")
    table.add_row(f"MACs (batch of {found.batch})", number(found.cost.macs))
    table.add_row("parameters", number(found.cost.params))
    table.add_row("bytes", size(found.cost.bytes))
    table.add_row(f"peak memory (batch of {found.batch})", size(found.peak_bytes))
    if found.seconds is not None:
        timed = found.seconds
        table.add_row("latency, median", seconds(timed.median))
        table.add_row("latency, interquartile range", seconds(timed.spread))
        table.caption = f"{found.runtime}, {timed.rounds} rounds, {timed.threads} threads, {found.device}, {found.dtype}"
    used = found.energy
    if used is not None and used.joules is not None:
        table.add_row(f"energy, {used.kind} (batch of {found.batch})", joules(used.joules))
        if used.above_idle is not None:
            table.add_row("energy above that of the idle machine", joules(used.above_idle))
    console = out()
    console.print(table)
    if used is not None:
        console.print(f"energy, {used.kind}: {used.source}. Not in it: {used.leaves_out}.")


def converted(name: str, found: Converted, rows: int) -> None:
    """What was chosen for every layer, and the whole model both ways."""
    console = out()
    table = Table("layer", title=f"{name}, batch of {rows}, {found.threads} threads")
    for head in ("zeros", "dense", "sparse"):
        table.add_column(head, justify="right")
    table.add_column("taken")
    for c in sorted(found.choices, key=lambda c: c.dense, reverse=True):
        taken = f"{c.form}: {c.why}" if c.why else c.form
        table.add_row(c.layer, f"{c.zeros:.1%}", f"{c.dense * 1e3:.3f} ms", f"{c.sparse * 1e3:.3f} ms", taken)
    if found.choices:
        console.print(table)
        times = f"dense {found.dense * 1e3:.2f} ms, sparse {found.sparse * 1e3:.2f} ms, {found.dense / found.sparse:.2f} times as fast"
        console.print(f"the whole: {times}")
    elif not found.notes:
        console.print("no layer has zeros enough (30 %) to be timed")
    for note in found.notes:
        console.print(f"note: {note}")


def criteria(rows: Sequence[Mapping[str, str]], title: str = "criteria: what scores lowest goes first") -> None:
    """One line per criterion or method; `explain NAME` says the rest."""
    table = Table("name", "needs", "formula", title=title)
    for row in rows:
        table.add_row(row["name"], row["needs"], row["formula"])
    table.caption = "`secateur explain NAME` says what one costs, when to use it, and where it comes from"
    out().print(table)


def criterion(facts: Mapping[str, str]) -> None:
    """Everything there is to say about one criterion."""
    needs = {"weights": "the weights only", "inputs": "batches of inputs (data=)", "labels": "batches with labels (data=), or loss="}
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in {**facts, "needs": needs[facts["needs"]]}.items():
        table.add_row(Text(name, style="bold"), text)
    out().print(table)
