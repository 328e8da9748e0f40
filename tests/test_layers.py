"""Imports point down: a file may import from layers below its own, and from its own package, in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "secateur"

# Lowest first. A part is a file of src/secateur or a folder.
LAYERS = [
    ["errors", "figures", "screen"],
    ["axes", "plan", "pack", "processes"],
    ["trace", "pattern"],
    ["calibrate", "measure"],
    ["score", "budget", "surgery"],
    ["repair"],
    ["masks"],
    ["models", "export", "runtime"],
    ["recover", "report", "reach", "quantise", "mend"],
    ["prune", "sparsify", "retrace", "testing"],
    ["recipes"],
    ["sweep", "stream"],
    ["job"],
    ["explore", "layer_tables", "advise", "live"],
    [
        "terminal", "cli", "cli_advise", "cli_export", "cli_masks", "cli_generalise", "cli_quantise",
        "cli_recover", "cli_run", "shell", "demo", "endings", "cli_help",
    ],
    ["__main__"],
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")

# Pairs of parts in one layer that may still see each other; each needs its reason here.
SIDEWAYS = {
    ("calibrate", "measure"): "statistics are gathered by running the model as measurements do, and leaving it as it was",
    ("cli", "terminal"): "the command line prints its tables with the terminal's functions",
    ("cli", "cli_masks"): "its commands for single weights",
    ("cli", "shell"): "options that commands share",
    ("cli_masks", "shell"): "options that commands share",
    ("cli", "cli_run"): "its command for sparse layers",
    ("cli", "cli_recover"): "its command for training",
    ("cli", "cli_quantise"): "its command for int8",
    ("cli_quantise", "shell"): "options that commands share",
    ("cli_quantise", "terminal"): "as the command line",
    ("cli", "cli_generalise"): "its command for the gap",
    ("cli", "cli_advise"): "its command that tries all ways",
    ("cli_advise", "endings"): "an interrupted search prints what it has, and then ends as one",
    ("export", "models"): "folders are replaced whole, programs captured and inputs described as for a saved model",
    ("cli", "cli_export"): "its command for other runtimes",
    ("cli_export", "shell"): "options that commands share",
    ("cli_export", "terminal"): "as the command line",
    ("cli_advise", "shell"): "options that commands share",
    ("cli_advise", "terminal"): "as the command line",
    ("cli_generalise", "shell"): "options that commands share",
    ("cli_generalise", "terminal"): "a command prints with the terminal's functions",
    ("cli_recover", "shell"): "options that commands share",
    ("cli_recover", "terminal"): "a command prints with the terminal's functions",
    ("cli_run", "shell"): "options that commands share",
    ("cli_run", "terminal"): "as the command line",
    ("cli_masks", "terminal"): "as the command line",
    ("shell", "terminal"): "the stages of the work are shown on the terminal",
    ("cli", "endings"): "how a command ends",
    ("cli", "cli_help"): "examples for every command's help",
    ("endings", "terminal"): "what went wrong is said by the terminal's functions",
    ("cli", "demo"): "`secateur demo` is one of the commands",
    ("demo", "terminal"): "the demo prints with the terminal's functions",
}


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def for_types_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node):
    """All nodes that run; what stands under ``if TYPE_CHECKING`` does not."""
    for child in ast.iter_child_nodes(node):
        if not for_types_only(child):
            yield child
            yield from walk(child)


def imported(path):
    """(dotted name below secateur, line, whether at module level) of every import of our own code in a file."""
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(ROOT).parent.parts)
    top = set(map(id, tree.body))
    for node in walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "secateur"]
            found = [name.removeprefix("secateur").removeprefix(".") for name in names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "secateur":
            found = [".".join([*node.module.split(".")[1:], alias.name]) for alias in node.names]
        else:
            continue
        for name in found:
            yield name, node.lineno, id(node) in top


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    mine = part_of(path)
    assert mine in LEVEL, f"{mine} has no layer: give it one in LAYERS, and say why in docs/decisions"
    for name, line, _ in imported(path):
        theirs = name.split(".")[0]
        if theirs in ("__version__", mine):
            continue
        assert theirs in LEVEL, f"{path.name}:{line} imports {name or 'the package itself'}, not one of its parts"
        below = LEVEL[theirs] < LEVEL[mine]
        assert below or (mine, theirs) in SIDEWAYS, f"{path.name}:{line}: {mine} may not import {theirs}"


def test_no_circles_between_files():
    known = {module_of(path) for path in FILES}

    def target(name):
        """The file an imported name lives in: the longest prefix that is one."""
        parts = name.split(".")
        return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), None)

    edges = {module_of(path): {target(name) for name, _, top in imported(path) if top} for path in FILES}
    graph = {module: {dep for dep in deps if dep and dep != module} for module, deps in edges.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # raises CycleError on a circle


def test_optional_packages_are_imported_late():
    optional = {
        "sklearn", "torchvision", "timm", "transformers", "PIL", "torch_pruning", "onnx",
        "onnxscript", "onnxruntime", "openvino", "executorch", "nncf",
    }  # fmt: skip
    for path in [*FILES, ROOT / "__init__.py"]:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            late = {name.split(".")[0] for name in names} & optional
            assert not late, f"{path.name}:{node.lineno} imports {late} at the top; import it where it is used"
