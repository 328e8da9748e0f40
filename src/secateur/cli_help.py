"""What `--help` says of every command beside its options: a line for the list of commands, and an example to begin with."""

from __future__ import annotations

import typer

# command: (its line in the list, an example that can be typed as it stands once MODEL and DATA are yours)
COMMANDS = {
    "advise": ("Try every way of pruning here and say which pays.", "advise my.py:net --data my.py:rows -o advice"),
    "prune": ("Cut a model down to a budget, repair and save it.", "prune my.py:net --at-most macs=50% --data digits -o out"),
    "sweep": ("Prune to several budgets and show what each costs.", "sweep my.py:net --at-most macs=80%,50% --data digits -o s"),
    "inspect": ("Show what can be cut together, and what stays and why.", "inspect timm/vit_base_patch16_224"),
    "measure": ("Count MACs and bytes; take latency, memory, energy.", "measure out --threads 2"),
    "demo": ("Train, halve and repair a small network on digits.", "demo -o out"),
    "report": ("Write report.html again from report.json.", "report out"),
    "explain": ("Say what a criterion or a method computes.", "explain taylor"),
    "mask": ("Make single weights zero, in a pattern.", "mask my.py:net --keep 20% --data my.py:rows -o out"),
    "verify": ("Check a saved model: hashes, zeros, patterns.", "verify out"),
    "run": ("Time a model with zeros, dense and with sparse layers.", "run out --threads 2"),
    "export": ("Write a model for another runtime, check and time it.", "export out --to onnx --data digits"),
    "quantise": ("Make int8 files, beside float32 and the dense model.", "quantise out --data digits --dense my.py:net"),
    "recover": ("Train a pruned model back.", "recover out --data digits --epochs 5 --teacher my.py:net"),
    "generalise": ("Measure whether pruning helps on new rows.", "generalise my.py:net --data digits --seeds 3"),
}  # fmt: skip


def helped(app: typer.Typer) -> None:
    """Give every command of `app` its line and its example; to be called when all are there."""
    for command in app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        if name in COMMANDS:
            command.short_help, example = COMMANDS[name]
            command.epilog = f"Example: secateur {example}"
