"""A small decoder-only transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """Causal self-attention: (batch, length, width) -> the same.

    Written out, because fused attention kernels come with a custom VJP, which forward-over-reverse
    differentiation refuses.
    """

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        heads = nn.Dense(3 * width, name="qkv")(x).reshape(
            batch, length, 3, self.num_heads, width // self.num_heads
        )
        query, key, value = jnp.moveaxis(heads, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1])
        causal = jnp.tril(jnp.ones((length, length), bool))
        attention = nn.softmax(jnp.where(causal, scores, -jnp.inf))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, value).reshape(batch, length, width)
        return nn.Dense(width, name="out")(mixed)


class GPT(nn.Module):
    """Pre-norm transformer with learned positions: tokens (batch, length) -> logits (batch, length,
    vocab_size)."""

    vocab_size: int = 65
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    max_length: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        # Flax would answer positions beyond the table with NaN, later and without a reason.
        if length > self.max_length:
            raise ValueError(
                f"sequences of {length} tokens: at most max_length={self.max_length} have a "
                "position"
            )
        positions = nn.Embed(self.max_length, self.width, name="positions")(jnp.arange(length))
        x = nn.Embed(self.vocab_size, self.width, name="tokens")(tokens) + positions
        for index in range(self.depth):
            normal = nn.LayerNorm(name=f"norm_a_{index}")(x)
            x += Attention(self.num_heads, name=f"attention_{index}")(normal)
            normal = nn.LayerNorm(name=f"norm_b_{index}")(x)
            hidden = nn.Dense(4 * self.width, name=f"expand_{index}")(normal)
            x += nn.Dense(self.width, name=f"contract_{index}")(nn.gelu(hidden))
        return nn.Dense(self.vocab_size, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))
