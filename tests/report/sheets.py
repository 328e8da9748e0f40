"""Facts to draw: a whole report as a ResNet-56 might give it, its numbers invented, and the ways to spoil one."""

import math
import random

from secateur import report

ATTACK = "<script>alert(1)</script>\"'&<!--</script>\u2028"


def layers(count):
    return [f"layer{1 + n * 3 // max(1, count)}.{n}.conv1:out" for n in range(count)]


def groups(count, rng):
    rows = []
    for n, name in enumerate(layers(count)):
        before = 16 * 2 ** (n * 3 // max(1, count))
        after = max(1, before - int(before * rng.random() * 0.75)) if n % 5 else before
        kind = rng.choice(["channel", "head", "neuron"])
        rows.append({"name": name, "kind": kind, "before": before, "after": after, "macs_saved": (before - after) * 46_080,
                     "params_saved": (before - after) * 297})  # fmt: skip
    return rows


def repairs(count, rng):
    rows = []
    for n, name in enumerate(layers(count)):
        plain = 0.05 + 0.5 * rng.random()
        kept = "repair would hurt on held-out data: 0.31 against 0.29" if n % 7 == 3 else None
        rows.append({"layer": name.removesuffix(":out"), "kind": "conv2d", "rows": 2048 * 64, "error_cut": plain,
                     "error_repaired": plain if kept else plain * (0.2 + 0.3 * rng.random()), "held_out": True, "kept_plain": kept})  # fmt: skip
    return rows


def sensitivity(count, rng):
    rows = []
    for name in layers(count):
        steep = 0.5 + 3 * rng.random()
        points = [{"kept": k / 8, "macs": int(1.25e8 * (0.95 + 0.05 * k / 8)), "error": 0.25 * steep * (1 - k / 8) ** (4.2 - steep)}
                  for k in range(1, 9)]  # fmt: skip
        rows.append({"group": name, "kind": "channel", "points": points})
    return rows


def pareto():
    kept = [1.0, 0.8, 0.667, 0.5, 0.389, 0.333, 0.25]
    scores = [0.9339, 0.9331, 0.9323, 0.9264, 0.9071, 0.8893, 0.8102]
    return [
        {"label": f"macs={100 * share:.0f}%", "macs": int(125_485_696 * share), "params": int(853_018 * share ** 0.9),
         "seconds": 0.0121 * (0.3 + 0.7 * share), "accuracy": score, "kl": 0.9339 - score + 1e-4, "chosen": share == 0.5}
        for share, score in zip(kept, scores, strict=True)
    ]  # fmt: skip


def latency(rng):
    def rounds(middle):
        return [middle * (1 + abs(rng.gauss(0, 0.03))) for _ in range(30)]

    return [
        {"runtime": "onnxruntime", "threads": 1, "batch": 1, "dtype": "float32", "dense": rounds(8.1e-3), "pruned": rounds(4.4e-3)},
        {"runtime": "torch", "threads": 1, "batch": 1, "dtype": "float32", "dense": rounds(12.1e-3), "pruned": rounds(8.3e-3)},
    ]


JOB = {
    "model": "cifar10_resnet56",
    "batch": 1,
    "before": {"macs": 125_485_696, "params": 853_018, "bytes": 3_437_992},
    "after": {"macs": 62_703_104, "params": 401_233, "bytes": 1_622_140},
    "proof": {"max_error": 3.3e-15, "tolerance": 1e-9, "outputs": [3.3e-15], "all_zero": False, "passed": True},
    "how": "attributes",
    "notes": ["batch_norm of 3 layers was not re-estimated: they kept all units"],
    "accuracy": {"dense": 0.9339, "cut": 0.3071, "batch_norm": 0.7267, "repaired": 0.9264},
    "why": {
        "targets": ["MACs(at_most='50%')", "Params(at_most='450k')"], "limits": [62_742_848, 450_000], "allocation": "curves", "score": "obs",
        "repair": "least_squares", "seed": 0, "versions": {"secateur": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    },
}  # fmt: skip
FROZEN = [
    {"reason": "the model's output", "axes": 1, "sizes": [10], "where": ["fc.bias:0", "fc.weight:0"]},
    {"reason": "padding of a shortcut ties it (op aten.constant_pad_nd.default)", "axes": 4, "sizes": [16, 32], "where": ["layer2.0.conv2:out"]},
    {"reason": "ignore=", "axes": 1, "sizes": [16], "where": ["conv1.weight:0"]},
]


ENERGY = {
    "kind": "estimate", "source": "Horowitz, ISSCC 2014: 4.6 pJ a float32 multiply-accumulate, 162.5 pJ a byte of DRAM", "leaves_out": "caches",
    "dense": {"joules": 2.9e-3, "kind": "estimate"}, "pruned": {"joules": 1.6e-3, "kind": "estimate"},
}  # fmt: skip


def training(through, epochs=10):
    """A training back of so many epochs, of which some are through."""
    rows = [{"epoch": n, "step": 391 * n, "lr": 0.02 * (1 - n / epochs), "loss": 2.1 / n ** 0.5, "seconds": 61.25 * n,
             "valid_loss": 1.9 / n ** 0.4, "valid": 0.9371 - 0.3 / n} for n in range(1, through + 1)]  # fmt: skip
    return {"epochs": epochs, "steps": 391 * epochs, "rows": rows}


def full(count=27, seed=0, **other):
    """A report with every section; `count` groups, layers and curves."""
    rng = random.Random(seed)
    sections = {
        "groups": groups(count, rng), "frozen": FROZEN, "repairs": repairs(count, rng), "sensitivity": sensitivity(count, rng),
        "pareto": pareto(), "latency": latency(rng), "energy": ENERGY, "training": training(10),
        "settings": {"command": "secateur prune resnet.py:build --data npz:calibration.npz --at-most macs=50% --at-most params=450k -o out/"},
        "accuracy": {"metric": "accuracy", "rows": 10_000, "stages": [{"stage": s, "value": v} for s, v in JOB["accuracy"].items()]},
    }  # fmt: skip
    return report.facts(JOB, **{**sections, **other})


def attacked():
    """Every string of a full report is an attack."""

    def spoil(value, key=None):
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, key) for v in value]
        return ATTACK + value if isinstance(value, str) and key not in ("format", "figure", "stage") else value

    sheet = spoil(full(5))
    sheet["settings"][ATTACK] = ATTACK
    sheet["versions"][ATTACK] = "\x00\ud800"
    return sheet


def unmeasured():
    """Every number that may be missing is NaN, or null."""

    def lose(value, key=None):
        if isinstance(value, dict):
            return {k: lose(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [lose(v, key) for v in value]
        return math.nan if isinstance(value, float) else value

    return lose(full(5))
