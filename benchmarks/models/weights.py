"""Weights trained in PyTorch as Flax variables. Submodules bear PyTorch's names, so that reading
them is a renaming."""

import re
from collections.abc import Mapping
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict


def from_torch(state: Mapping[str, np.ndarray]) -> dict:
    """Variables {"params": ..., "batch_stats": ...} from a state dict in PyTorch's names and
    layouts.

    A number in a name is joined to what is before it: `layer1.0.downsample.1.bias` becomes
    `layer1_0/downsample_1/bias`.
    """
    flat = {}
    for name, array in state.items():
        *modules, kind = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split(".")
        match kind, array.ndim:
            case "weight", 4:  # OIHW -> HWIO
                leaf, array = ("params", *modules, "kernel"), array.transpose(2, 3, 1, 0)
            case "weight", 2:  # (out, in) -> (in, out)
                leaf, array = ("params", *modules, "kernel"), array.T
            case "weight", 1:
                leaf = ("params", *modules, "scale")
            case "bias", 1:
                leaf = ("params", *modules, "bias")
            case "running_mean" | "running_var", 1:
                leaf = ("batch_stats", *modules, kind.removeprefix("running_"))
            case "num_batches_tracked", _:  # a counter of PyTorch's training loop
                continue
            case _:
                raise ValueError(f"{name} of shape {array.shape} is no part of a layer known here")
        flat[leaf] = jnp.asarray(array)
    return unflatten_dict(flat)


def load_weights(path: str | PathLike) -> dict:
    """Trained variables {"params": ..., "batch_stats": ...} from a safetensors file in PyTorch's
    names and layouts."""
    from safetensors.numpy import load_file

    return from_torch(load_file(path))


def check_fit(variables: Mapping, expected: Mapping) -> None:
    """Refuse weights of another network than the one whose variables, or their shapes, are
    `expected`."""

    def shapes(tree: Mapping) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(dict(tree))
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in leaves
        }

    given, wanted = shapes(variables), shapes(expected)
    wrong = [
        f"{name} is {given.get(name, 'missing')}, expected {wanted.get(name, 'none of that name')}"
        for name in sorted(given.keys() | wanted.keys())
        if given.get(name) != wanted.get(name)
    ]
    if wrong:
        raise ValueError(
            f"the weights are another network's, {len(wrong)} arrays do not fit: "
            f"{'; '.join(wrong[:3])}. Give the file of this network, or name the network that the "
            "file was made for."
        )
