"""Sparse weights that run faster: kernels for ordinary CPUs, layers, and a model converted to them where they are quicker."""

from secateur.runtime.build import NoKernels, build
from secateur.runtime.convert import Choice, Converted, convert
from secateur.runtime.decode import DecodeLinear
from secateur.runtime.fold import fold
from secateur.runtime.layers import SparseConv1d, SparseConv2d, SparseLinear, sparse

__all__ = ["Choice", "Converted", "DecodeLinear", "NoKernels", "SparseConv1d", "SparseConv2d", "SparseLinear", "build", "convert", "fold", "sparse"]
