"""A keyword spotter for a microcontroller: so many bytes of flash for the weights, so much RAM for what lives at once, then int8."""

from tempfile import TemporaryDirectory

import torch
from show import show
from spotter import trained

import secateur as sc
from secateur.errors import ModelError
from secateur.quantise import How, quantise

FLASH, RAM = 16 * 1024, 24 * 1024  # bytes in int8: weights, and what else lives at once; in float32, counted here, four times as many

torch.manual_seed(0)
model, data = trained()
(x,), _ = data.example(1)

# peak memory is that of a computer: the weights are in it
result = sc.prune(model, (x,), sc.Bytes(at_most=4 * FLASH), sc.PeakMemory(at_most=4 * (FLASH + RAM)), data=data.train)

show("keyword spotter, one second of speech", model, result.model, (x,), result.proof)
for name, one in (("dense", model), ("pruned", result.model)):
    found = sc.measure(one, (x,), rounds=2)
    with torch.no_grad():
        right = torch.cat([one(rows).argmax(1) == labels for rows, labels in data.test])
    print(f"  {name}: {found.cost.bytes:,} bytes, peak memory {found.peak_bytes:,} bytes, {100 * right.float().mean():.1f} % right")

with TemporaryDirectory() as folder:
    try:
        done = quantise(result.model, ((x,), {}), data, f"{folder}/int8", dense=model, how=How(rounds=2))
    except ModelError as error:  # what it needs is not installed
        print(f"  no int8: {error}")
    else:
        for row in done.rows:
            print(f"  {row.name}: {row.bytes:,} bytes of file, {100 * (row.accuracy or 0):.1f} % right, {1e3 * row.seconds.median:.3f} ms")
