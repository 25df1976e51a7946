"""The transformer of `gpt.py` as those are written that do not fit one device."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.models.gpt import Attention


class Block(nn.Module):
    """A layer: (batch, length, width) -> the same, and nothing, as `nn.scan` wants it."""

    width: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x += Attention(self.num_heads, name="attention")(nn.LayerNorm(name="norm_a")(x))
        hidden = nn.Dense(4 * self.width, name="expand")(nn.LayerNorm(name="norm_b")(x))
        return x + nn.Dense(self.width, name="contract")(nn.gelu(hidden)), None


class StackedGPT(nn.Module):
    """Pre-norm transformer: tokens (batch, length) -> logits (batch, length, vocab_size).

    The layers are stacked and scanned, so that the program does not grow with them, and
    rematerialized. Each gathers its own weights from the mesh, just before it uses them. Left to
    itself, XLA would now and then rather send the activations: with sharded weights and sharded
    batches somebody has to say which of them travel."""

    mesh: Mesh
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    max_length: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = self._gathered(nn.Embed)
        x = embed(self.vocab_size, self.width, name="tokens")(tokens)
        x += embed(self.max_length, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        layer = nn.remat(self._gathered(Block), prevent_cse=False)
        layers = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        x, _ = layers(self.width, self.num_heads, name="blocks")(x, None)
        head = self._gathered(nn.Dense)(self.vocab_size, use_bias=False, name="head")
        return head(nn.LayerNorm(name="norm")(x))

    def _gathered(self, module: Any) -> Any:
        """The module with its weights on every device while it runs."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def gather(weights: Any) -> Any:
            return jax.tree.map(
                lambda leaf: jax.lax.with_sharding_constraint(leaf, everywhere), weights
            )

        return nn.map_variables(module, "params", trans_in_fn=gather, init=True)
