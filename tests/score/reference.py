"""The criteria once more, slowly: loops over units and weights of the plain module, with hooks and autograd. Nothing of the
library is used."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F


def numbers(model, entries, unit, values=None):
    """Every weight of one unit, as Python floats; `values` stand in for the parameters."""
    values = dict(model.named_parameters()) if values is None else values
    for name, dim, places in entries:
        for place in places(unit):
            yield from values[name].detach().select(dim, place).flatten().tolist()


def matrices(model, entries):
    parameters = dict(model.named_parameters())
    large = [e for e in entries if parameters[e[0]].dim() > 1]
    return large or entries


def by_mean(scores):
    mean = sum(abs(s) for s in scores) / len(scores)
    return [s / mean for s in scores]


def each(model, score):
    """{group: score(known, unit) for every unit}."""
    return {name: [score(known, u) for u in range(known.size)] for name, known in type(model).known.items()}


def averaged(found):
    return {name: by_mean(scores) for name, scores in found.items()}


# ---------------------------------------------------------------- weights
def l1(model, _):
    return averaged(each(model, lambda k, u: sum(abs(w) for w in numbers(model, matrices(model, k.weights), u))))


def squares(model):
    return each(model, lambda k, u: sum(w * w for w in numbers(model, matrices(model, k.weights), u)))


def l2(model, _):
    return averaged({name: [math.sqrt(s) for s in row] for name, row in squares(model).items()})


def lamp(model, _):
    return {name: [s / sum(t for t in row if t >= s) for s in row] for name, row in squares(model).items()}


def bn_scale(model, _):
    gammas = dict(model.named_parameters())
    out = {}
    for name, k in type(model).known.items():
        places = {n: p for n, _, p in k.weights}
        rows = [sum(abs(float(gammas[n][i])) for n in k.norms for i in places[n](u)) for u in range(k.size)]
        out[name] = rows if k.norms else [math.inf] * k.size
    return out


def fpgm(model, _):
    out = {}
    for name, k in type(model).known.items():
        vectors = [list(numbers(model, k.makes, u)) for u in range(k.size)]
        out[name] = [sum(math.dist(a, b) for b in vectors) for a in vectors]
    return averaged(out)


def synflow(model, _):
    other = copy.deepcopy(model).eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    for p in other.parameters():
        p.data = p.data.abs()
    other(torch.ones(type(model).example, dtype=torch.float64)).sum().backward()
    flow = {n: p.detach() * (p.grad if p.grad is not None else 0) for n, p in other.named_parameters()}
    return averaged(each(model, lambda k, u: sum(numbers(model, matrices(model, k.weights), u, flow))))


# ---------------------------------------------------------------- gradients
def batch_gradients(model, data):
    """[(rows, {parameter: gradient of the mean loss})] by backward() on a copy."""
    out = []
    for x, y in data:
        other = copy.deepcopy(model).eval()
        F.cross_entropy(other(x), y).backward()
        out.append((len(x), {n: p.grad for n, p in other.named_parameters()}))
    return out


def _expected(model, data, of_sum):
    found = batch_gradients(model, data)
    rows = sum(n for n, _ in found)

    def score(k, u):
        total = 0.0
        for n, gradient in found:
            pairs = zip(numbers(model, k.weights, u), numbers(model, k.weights, u, gradient), strict=True)
            total += n * of_sum(list(pairs))
        return total / rows

    return averaged(each(model, score))


def taylor(model, data):
    return _expected(model, data, lambda pairs: abs(sum(w * g for w, g in pairs)))


def taylor_squared(model, data):
    return _expected(model, data, lambda pairs: sum(w * g for w, g in pairs) ** 2)


def fisher(model, data):
    return _expected(model, data, lambda pairs: sum(w * w * g * g for w, g in pairs) / 2)


def snip(model, data):
    x, y = (torch.cat(column) for column in zip(*data, strict=True))
    ((_, gradient),) = batch_gradients(model, [(x, y)])

    def score(k, u):
        entries = matrices(model, k.weights)
        return sum(abs(w * g) for w, g in zip(numbers(model, entries, u), numbers(model, entries, u, gradient), strict=True))

    return averaged(each(model, score))


def grasp(model, data):
    """The Hessian row by row, on all data at once."""
    x, y = (torch.cat(column) for column in zip(*data, strict=True))
    other = copy.deepcopy(model).eval()
    names, parameters = zip(*other.named_parameters(), strict=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(F.cross_entropy(other(x), y), parameters, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradient])
        product = []
        for entry in flat:
            row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            full = torch.cat([torch.zeros_like(p).flatten() if r is None else r.flatten() for r, p in zip(row, parameters, strict=True)])
            product.append(float(full @ flat.detach()))
    at, curved = 0, {}
    for name, p in zip(names, parameters, strict=True):
        curved[name] = torch.tensor(product[at : at + p.numel()], dtype=torch.float64).reshape(p.shape)
        at += p.numel()

    def score(k, u):
        entries = matrices(model, k.weights)
        return sum(w * h for w, h in zip(numbers(model, entries, u), numbers(model, entries, u, curved), strict=True))

    return averaged(each(model, score))


# ---------------------------------------------------------------- activations
def outputs(model, data):
    """{module: its output on all the data}."""
    other, seen = copy.deepcopy(model).eval(), {}
    for name, module in other.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(out.detach().clone()))
    with torch.no_grad():
        for x, _ in data:
            other(x)
    return {name: torch.cat(values) for name, values in seen.items()}


def arriving(model, data):
    """{module: its input on all the data}."""
    other, seen = copy.deepcopy(model).eval(), {}
    for name, module in other.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0].detach().clone()))
    with torch.no_grad():
        for x, _ in data:
            other(x)
    return {name: torch.cat(values) for name, values in seen.items()}


def of_outputs(model, data, reduce):
    """Mean over the places a group is looked at of `reduce(all numbers of the unit there)`."""
    seen = outputs(model, data)

    def score(k, u):
        each_place = []
        for name, dim, places in k.gives:
            values = torch.cat([seen[name].select(dim, p).flatten() for p in places(u)]).tolist()
            each_place.append(reduce(values))
        return sum(each_place) / len(each_place)

    return each(model, score)


def activation_mean(model, data):
    return averaged(of_outputs(model, data, lambda values: sum(abs(v) for v in values) / len(values)))


def apoz(model, data):
    zeros = of_outputs(model, data, lambda values: sum(v == 0 for v in values) / len(values))
    return {n: by_mean([1 - z for z in row]) if any(row) else [math.inf] * len(row) for n, row in zeros.items()}


def columns(module):
    """For every input channel of a layer all the weights that multiply it."""
    w = module.weight.detach()
    groups = getattr(module, "groups", 1)
    found = {c: [] for c in range(w.shape[1] * groups)}
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            channel = (o // (w.shape[0] // groups)) * w.shape[1] + i
            found[channel] += w[o, i].flatten().tolist()
    return found


def _by_columns(model, data, of, alone):
    seen, here, modules = arriving(model, data), outputs(model, data), dict(model.named_modules())

    def values(tensor, dim, place):
        return tensor.select(dim, place).flatten().tolist()

    def score(k, u):
        total = 0.0
        for name, places in k.eats:
            dim = 1 if isinstance(modules[name], nn.Conv2d) else -1
            weights = columns(modules[name])
            total += sum(of(weights[p], values(seen[name], dim, p)) for p in places(u))
        if not k.eats:  # nothing contracts it: by what it gives
            rows = [[v for p in places(u) for v in values(here[name], dim, p)] for name, dim, places in k.gives]
            total = alone(rows)
        return total

    return averaged(each(model, score))


def _mean(values):
    return sum(values) / len(values)


def wanda(model, data):
    def of(weights, x):
        return sum(abs(w) for w in weights) * math.sqrt(_mean([v * v for v in x]))

    return _by_columns(model, data, of, lambda rows: math.sqrt(_mean([_mean([v * v for v in row]) for row in rows])))


def flap(model, data):
    def variance(second, first):
        return second - first * first

    def of(weights, x):
        return sum(w * w for w in weights) * variance(_mean([v * v for v in x]), _mean(x))

    def alone(rows):
        return variance(_mean([_mean([v * v for v in row]) for row in rows]), _mean([_mean(row) for row in rows]))

    return _by_columns(model, data, of, alone)
