"""Flax models as ``loss(params, batch)``. A plain JAX function needs no adapter."""

from .linen import from_linen as from_linen
from .linen import from_nnx as from_nnx
