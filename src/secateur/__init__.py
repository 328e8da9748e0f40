"""secateur: prune trained PyTorch networks, and prove it.

    graph  = sc.trace(model, (x,))
    result = sc.prune(model, (x,), sc.MACs(at_most="50%"), data=batches)
    sc.save(result, "out/");  model = sc.load("out/", factory)
"""

__version__ = "0.1.0"

from secateur import errors as errors
from secateur import runtime as runtime
from secateur import score as score
from secateur.plan import Cost, Plan  # isort: skip  # the module `plan` first, so that the function below keeps the name
from secateur.budget import Bytes as Bytes
from secateur.budget import Latency as Latency
from secateur.budget import MACs as MACs
from secateur.budget import Params as Params
from secateur.budget import PeakMemory as PeakMemory
from secateur.budget import plan as plan
from secateur.errors import SecateurError as SecateurError
from secateur.masks.hold import hold as hold
from secateur.masks.hold import merge_low_rank as merge_low_rank
from secateur.measure import measure as measure
from secateur.measure.proof import Proof as Proof
from secateur.measure.proof import prove as prove
from secateur.mend import mend as mend
from secateur.models import load as load
from secateur.models import save as save
from secateur.pattern import NM as NM
from secateur.pattern import Block as Block
from secateur.pattern import Free as Free
from secateur.pattern import Kernels as Kernels
from secateur.prune import Result as Result
from secateur.prune import prune as prune
from secateur.recipes import alps as alps
from secateur.recipes import magnitude as magnitude
from secateur.recipes import obc as obc
from secateur.recipes import sparsegpt as sparsegpt
from secateur.recipes import wanda as wanda
from secateur.recover import Gradual as Gradual
from secateur.recover import Schedule as Schedule
from secateur.recover import Training as Training
from secateur.recover import recover as recover
from secateur.sparsify import Sparse as Sparse
from secateur.sparsify import mask as mask
from secateur.sparsify import sparsify as sparsify
from secateur.surgery import Cut as Cut
from secateur.surgery import cut as cut
from secateur.sweep import sweep as sweep
from secateur.trace import Graph as Graph
from secateur.trace import Group as Group
from secateur.trace import parts as parts
from secateur.trace import trace as trace

__all__ = [
    "NM",
    "Block",
    "Bytes",
    "Cost",
    "Cut",
    "Free",
    "Gradual",
    "Graph",
    "Group",
    "Kernels",
    "Latency",
    "MACs",
    "Params",
    "PeakMemory",
    "Plan",
    "Proof",
    "Result",
    "Schedule",
    "SecateurError",
    "Sparse",
    "Training",
    "alps",
    "cut",
    "errors",
    "hold",
    "load",
    "magnitude",
    "mask",
    "measure",
    "mend",
    "merge_low_rank",
    "obc",
    "parts",
    "plan",
    "prove",
    "prune",
    "recover",
    "runtime",
    "save",
    "score",
    "sparsegpt",
    "sparsify",
    "sweep",
    "trace",
    "wanda",
]
