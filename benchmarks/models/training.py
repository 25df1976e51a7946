"""Training with Optax, for networks with and without batch normalization."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Variables = Mapping[str, Any]


class Checkpoint(NamedTuple):
    """A network after `step` steps."""

    step: int
    variables: Variables


def train(
    model: nn.Module,
    variables: Variables,
    arrays: tuple[Any, Any],
    key: jax.Array,
    *,
    num_steps: int,
    schedule: float | optax.Schedule,
    batch_size: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    statistics: Literal["batch", "population"] = "batch",
    refresh_every: int = 1,
    checkpoints: Collection[int] = (),
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Iterator[Checkpoint]:
    """SGD with momentum on the mean cross-entropy + weight_decay x half the squared kernels; yields
    the checkpoints.

    An epoch goes through all whole batches in an order of its own. A model with `batch_stats` is
    called with `use_running_average`, and normalizes in training by

    - `statistics="batch"`: the batch's statistics, differentiated through, as usual; the running
      averages are kept.
    - `statistics="population"`: those of all the inputs, constants for the gradient, taken anew
      before every `refresh_every`-th step and at each checkpoint.

    The loop over steps is the host's: on a CPU, XLA runs the backward pass of a convolution some
    thirty times slower inside a loop of its own.

    Args:
      model: a linen module, inputs -> logits.
      variables: what `model.init` gave.
      arrays: (inputs, labels); both are kept on the device.
      key: decides the order of the examples, and the augmentation.
      num_steps: steps in all; the last is a checkpoint.
      schedule: learning rate, or a function of the step.
      batch_size: examples a step.
      momentum: of SGD.
      weight_decay: coefficient of `half_squared_kernels`.
      statistics: see above.
      refresh_every: see above.
      checkpoints: steps (0: before training) after which to yield.
      augment: (key, inputs of a batch) -> inputs.
    """
    inputs, labels = (jnp.asarray(array) for array in arrays)
    if not 1 <= batch_size <= len(inputs):
        raise ValueError(f"batch_size={batch_size}: there are {len(inputs)} examples")
    optimizer = optax.sgd(schedule, momentum)
    population = statistics == "population" and "batch_stats" in variables
    update = jax.jit(partial(_update, model, optimizer, weight_decay, population, augment))
    state = optimizer.init(variables["params"])
    order_key, augment_key = jax.random.split(key)
    per_epoch = len(inputs) // batch_size
    order: Any = None
    for step in range(num_steps + 1):
        at_checkpoint = step in checkpoints or step == num_steps
        if population and (step % refresh_every == 0 or at_checkpoint):
            variables = population_statistics(model, variables, inputs)
        if at_checkpoint:
            yield Checkpoint(step, variables)
        if step == num_steps:
            return
        if step % per_epoch == 0:
            epoch_key = jax.random.fold_in(order_key, step)
            order = np.asarray(jax.random.permutation(epoch_key, len(inputs)))
        chosen = order[step % per_epoch * batch_size :][:batch_size]
        batch = inputs[chosen], labels[chosen]
        variables, state = update(variables, state, batch, jax.random.fold_in(augment_key, step))


def _update(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    weight_decay: float,
    population: bool,
    augment: Callable | None,
    variables: Variables,
    state: Any,
    batch: tuple[jax.Array, jax.Array],
    key: jax.Array,
) -> tuple[Variables, Any]:
    inputs, labels = batch
    if augment is not None:
        inputs = augment(key, inputs)

    def loss(params: Any) -> tuple[jax.Array, Variables]:
        current = {**variables, "params": params}
        logits, written = _forward(model, current, inputs, train=not population)
        error = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return error + weight_decay * half_squared_kernels(params), written

    gradient, written = jax.grad(loss, has_aux=True)(variables["params"])
    updates, state = optimizer.update(gradient, state, variables["params"])
    params = optax.apply_updates(variables["params"], updates)
    return {**variables, **written, "params": params}, state


def _forward(
    model: nn.Module, variables: Variables, inputs: jax.Array, train: bool
) -> tuple[jax.Array, Variables]:
    """Logits, and the collections that the call wrote."""
    if "batch_stats" not in variables:
        return model.apply(variables, inputs), {}
    if not train:
        return model.apply(variables, inputs, use_running_average=True), {}
    return model.apply(variables, inputs, use_running_average=False, mutable=["batch_stats"])


def train_with_adam(
    loss: Callable[[Any, Any], jax.Array], params: Any, arrays: tuple[Any, Any], num_steps: int
) -> Any:
    """The parameters after some steps of Adam with a rate of 1e-3, on 32 random examples each."""
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any]:
        gradient = jax.grad(loss)(params, tuple(array[rows] for array in arrays))
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for index in range(num_steps):
        rows = jax.random.randint(jax.random.key(index), (32,), 0, len(arrays[0]))
        params, state = step(params, state, rows)
    return params


def half_squared_kernels(params: Any) -> jax.Array:
    """Half the sum of squares of all kernels: neither biases nor the parameters of normalization
    layers decay."""
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"]
    return 0.5 * sum(jnp.sum(kernel**2) for kernel in kernels)


@partial(jax.jit, static_argnames="model")
def population_statistics(model: nn.Module, variables: Variables, inputs: jax.Array) -> Variables:
    """The variables with the statistics of all `inputs`, every layer's under the normalization of
    those before it.

    All inputs are one batch: no average of batches' statistics has the means and the variances of
    the whole. That takes the memory of one layer's outputs for all of them."""
    momentum = 0.9  # of the models' BatchNorm: new = momentum x old + (1 - momentum) x the batch's
    _, written = model.apply(variables, inputs, use_running_average=False, mutable=["batch_stats"])
    old, new = variables["batch_stats"], written["batch_stats"]
    return {
        **variables,
        "batch_stats": jax.tree.map(lambda a, b: (b - momentum * a) / (1 - momentum), old, new),
    }


def accuracy(
    model: nn.Module, variables: Variables, arrays: tuple[Any, Any], batch_size: int = 500
) -> float:
    """Share of the examples classified right, by the stored statistics where there are any."""
    inputs, labels = arrays
    batches = [slice(start, start + batch_size) for start in range(0, len(inputs), batch_size)]
    right = [int(_num_right(model, variables, inputs[rows], labels[rows])) for rows in batches]
    return sum(right) / len(inputs)


@partial(jax.jit, static_argnames="model")
def _num_right(
    model: nn.Module, variables: Variables, inputs: jax.Array, labels: jax.Array
) -> jax.Array:
    logits, _ = _forward(model, variables, inputs, train=False)
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)


def crop_and_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """CIFAR's usual augmentation: each image moved by up to 4 pixels, zeros moving in, and mirrored
    or not."""
    count, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)])
    corners = jax.random.randint(crop_key, (count, 2), 0, 9)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    mirrored = jax.random.bernoulli(flip_key, 0.5, (count, 1, 1, 1))
    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)
