"""The layouts of docs/format.md again, one weight at a time and with nothing of the library's."""

import itertools
import math


def packed_bits(bits):
    """The first bit is the least significant of the first byte."""
    out = [0] * -(-len(bits) // 8)
    for i, bit in enumerate(bits):
        out[i // 8] |= bool(bit) << i % 8
    return out


def view(shape):
    """Outputs, inputs, places of the kernel."""
    shape = list(shape)
    return [*shape[:2], math.prod(shape[2:])] if len(shape) > 2 else [*shape, 1, 1, 1][:3]


def at(shape, place):
    """Where a weight (output, input, place) lies in the flat tensor."""
    _, inputs, places = view(shape)
    return (place[0] * inputs + place[1]) * places + place[2]


def walk(shape, axis, size):
    """(flat places of each whole group, flat places of what is left over), each in the order of the format."""
    three = view(shape)
    count = three[axis] // size
    groups = []
    heads = [range(count) if d == axis else range(three[d]) for d in range(3)]
    for head in itertools.product(*heads):
        groups.append([at(shape, [head[d] * size + j if d == axis else head[d] for d in range(3)]) for j in range(size)])
    rest = [range(count * size, three[d]) if d == axis else range(three[d]) for d in range(3)]
    return groups, [at(shape, place) for place in itertools.product(*rest)]


def bitmask(mask, shape, how):
    return packed_bits(mask), list(mask)


def index(mask, shape, how):
    out, zeros = [], 0
    for stays in mask:
        if stays:
            out.append(zeros)
            zeros = 0
        else:
            zeros += 1
            if zeros == 255:
                out.append(255)
                zeros = 0
    return out, list(mask)


def codes(n, m, exact):
    """Patterns as tuples, in the order of the numbers whose bits they are."""
    found = [p for p in itertools.product((0, 1), repeat=m) if (sum(p) == n if exact else sum(p) <= n)]
    return sorted(found, key=lambda p: sum(bit << i for i, bit in enumerate(p)))


def nm(mask, shape, how):
    known = codes(how["n"], how["m"], how["exact"])
    each = math.ceil(math.log2(len(known)))
    groups, rest = walk(shape, how["axis"], how["m"])
    bits = []
    for group in groups:
        code = known.index(tuple(int(mask[i]) for i in group))
        bits += [code >> b & 1 for b in range(each)]
    return packed_bits(bits + [mask[i] for i in rest]), list(mask)


def blocks(mask, shape, how):
    groups, rest = walk(shape, how["axis"], how["size"])
    stored = list(mask)
    bits = []
    for group in groups:
        bits.append(any(mask[i] for i in group))
        for i in group:
            stored[i] = bits[-1]
    return packed_bits(bits + [mask[i] for i in rest]), stored


LAYOUTS = {"bitmask": bitmask, "index": index, "nm": nm, "blocks": blocks}
