"""The ImageNet networks by name, each with what it is fed."""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models import resnet, squeezenet
from benchmarks.models.imagenet_resnet import ImageNetResNet
from benchmarks.models.weights import check_fit, load_weights

Variables = Mapping[str, Any]


class Network(NamedTuple):
    """A network, images as bytes -> (batch, 1000) logits; its batch normalization uses stored
    statistics."""

    model: nn.Module
    normalize: Callable[[Any], jax.Array]  # on the device, so that bytes travel
    size: int  # pixels of a side
    crop: float  # share of the shorter side that is seen

    def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        return self.model.apply(variables, self.normalize(images))

    def initial(self, key: jax.Array) -> Variables:
        """Random variables."""
        return self.model.init(key, jnp.zeros((1, self.size, self.size, 3)))

    def load(self, path: str | PathLike) -> Variables:
        """Trained variables, from a safetensors file in PyTorch's names; ValueError if it is
        another network's."""
        variables = load_weights(path)
        check_fit(variables, jax.eval_shape(self.initial, jax.random.key(0)))
        return variables


NETWORKS = {
    "squeezenet1_1": Network(squeezenet.SqueezeNet(), squeezenet.normalize, 227, 1.0),
    "resnet18": Network(ImageNetResNet(18), resnet.normalize, 224, 0.875),
    "resnet50": Network(ImageNetResNet(50), resnet.normalize, 224, 0.875),
}
