"""Flax models as ``loss(params, batch)``. A plain JAX function needs no adapter.

A batch is ``(inputs, targets)``, or ``(inputs, targets, mask)``: ``criterion(outputs, *rest)`` is
called with all but the inputs and returns a mean or a `Total`. `hessdensity.losses` has the usual
criteria.

Batch normalization. A model that carries statistics must be told what they are, for the Hessian
depends on it and neither is a detail (one small network: largest eigenvalue 1.38 with stored
statistics, 1.06 with the batch's):

- ``batch_statistics="stored"``: evaluation mode, the running averages held fixed;
- ``batch_statistics="batch"``: training mode, differentiated through. The Hessian then depends on
  how the data are cut into batches, and is that of the mean over these batches.

Statistics are never written.
"""

from .linen import from_linen as from_linen
from .nnx import from_nnx as from_nnx
