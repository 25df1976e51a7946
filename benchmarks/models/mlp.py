"""A fully connected network."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Dense layers of the given widths (the last is the number of outputs) with ReLU between them.

    Maps (batch, ...) to (batch, widths[-1]); images are flattened. With `normalize`, BatchNorm goes
    before each ReLU."""

    widths: Sequence[int]
    normalize: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = True) -> jax.Array:
        x = x.reshape(len(x), -1)
        for width in self.widths[:-1]:
            x = nn.Dense(width)(x)
            if self.normalize:
                x = nn.BatchNorm(use_running_average, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(self.widths[-1])(x)
