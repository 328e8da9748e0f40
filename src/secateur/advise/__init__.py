"""Which way of pruning pays on this machine: weights, neurons, structures, patterns, and int8 beside them.

    found = advise(load_model("my.py:net"), inputs, data, source, Settings(minutes=15), out="advice")
    print(found.verdict)
"""

from secateur.advise.candidates import Candidate, Source, candidates
from secateur.advise.front import front
from secateur.advise.run import Advice, Settings, advise

__all__ = ["Advice", "Candidate", "Settings", "Source", "advise", "candidates", "front"]
