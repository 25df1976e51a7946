"""Flax models as ``loss(params, batch)``. A plain JAX function needs no adapter.

A batch is ``(inputs, targets)`` or ``(inputs, targets, mask)``. The criterion is called as
``criterion(outputs, targets)`` or ``criterion(outputs, targets, mask)``, and returns a mean or a
`Total`. `hessdensity.losses` has common criteria.

Batch normalization. If a model has batch statistics, you must choose which ones it uses, because
the Hessian depends on them. The difference is not small: the largest eigenvalue of one small
network is 1.38 with the stored statistics, and 1.06 with those of the batch.

- ``batch_statistics="stored"`` is evaluation mode. The running averages are held fixed.
- ``batch_statistics="batch"`` is training mode. Derivatives go through the statistics. The Hessian
  then depends on how the data are cut into batches, and is that of the mean over these batches.

The adapters never change the stored statistics.
"""

from .linen import from_linen as from_linen
from .nnx import from_nnx as from_nnx
