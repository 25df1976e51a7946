"""What the processes of test_processes.py do; each function runs in every process, after
`distributed.start`."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import hessdensity as hd
from hessdensity import distributed

LENGTHS = {
    "even": [[8, 4], [8, 4], [8, 4], [8, 4]],
    "uneven": [[7, 3], [8, 2], [0, 3], [11, 4]],
    "fewer": [[7, 5, 3], [8], [6], [4, 4]],
    "large": [[64]],
}
"""Examples of each process's batches."""


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.logaddexp(jnp.tanh(x @ params["kernel"]).sum(1) + params["bias"], 0) * y)


def weights():
    rng = np.random.default_rng(0)
    return {"kernel": rng.standard_normal((8, 4)).astype(np.float32), "bias": np.float32(0.5)}


def dealt(deal, count):
    """The batches of each process, and those of all joined: the same in every process."""
    rng = np.random.default_rng(1)
    parts = [
        [
            (rng.standard_normal((size, 8)).astype(np.float32), rng.random(size).astype(np.float32))
            for size in sizes
        ]
        for sizes in LENGTHS[deal][:count]
    ]
    number = max(map(len, parts))
    joined = [
        jax.tree.map(
            lambda *leaves: np.concatenate(leaves),
            *(part[index] for part in parts if index < len(part)),
        )
        for index in range(number)
    ]
    return parts, joined


def results(params, data, *, more=False, **settings):
    """Numbers that do not depend on where they are computed."""
    hessian = hd.Hessian(loss, params, data, **settings)
    found = hd.spectral_density(
        hessian, jax.random.key(0), num_steps=8, deflation_steps=8, progress=False
    )
    numbers = {
        "rules": [[rule.nodes.tolist(), rule.weights.tolist()] for rule in found.rules],
        "batch_losses": hessian.describe()["batch_losses"],
        "num_examples": hessian.describe()["num_examples"],
        "fingerprint": hessian.describe()["params"],
    }
    if more:
        space = hd.top_eigenspace(hessian, jax.random.key(1), 2, block_size=2, progress=False)
        numbers["top"] = space.values.tolist()
        numbers["trace"] = hd.trace(hessian, jax.random.key(2), 40, progress=False).value
        numbers["gradient"] = hd.rayleigh_quotient(hessian, hessian.gradient())
    return numbers


def density(deal, layout="replicated", kind="host", **settings):
    """What all processes together find, each reading its own examples.

    Args:
      deal: of `LENGTHS`.
      layout: of the parameters.
      kind: "host" batches; "placed" ones; or "host" ones on a mesh where the processes' devices
        alternate.
      settings: for `results`.
    """
    devices = jax.devices()
    devices = [*devices[::2], *devices[1::2]] if kind == "alternating" else devices
    mesh = distributed.make_mesh(devices=devices)
    params = distributed.place(weights(), mesh, min_size={"replicated": 10**9, "fsdp": 8}[layout])
    parts, _ = dealt(deal, jax.process_count())
    data = parts[jax.process_index()]
    if kind == "placed":
        split = NamedSharding(mesh, PartitionSpec("data"))
        data = jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(split, leaf), data)
    return results(params, data, **settings)


def assert_same(ours, theirs):
    """To rounding relative to the norm of T: nodes, moments up to 2m - 1 in units of the largest
    node, and W1."""
    rules = [
        [hd.Rule(*map(np.array, rule), 0, np.zeros(len(rule[0]))) for rule in one["rules"]]
        for one in (ours, theirs)
    ]
    scale = max(float(np.abs(rule.nodes).max()) for rule in rules[0])
    for a, b in zip(*rules, strict=True):
        assert abs(a.nodes[-1] - b.nodes[-1]) < 1e-5 * scale
        for k in range(1, 8):
            assert (
                abs(a.weights @ (a.nodes / scale) ** k - b.weights @ (b.nodes / scale) ** k) < 1e-5
            )
    assert hd.distance(*(hd.SpectralDensity(tuple(one), 33, 0) for one in rules)) < 1e-4 * scale
    for name in ours.keys() & theirs.keys() - {"rules", "fingerprint"}:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)
    assert ours["fingerprint"] == theirs["fingerprint"]


def refused():
    """What a Hessian says to batches that cannot be joined, in every process."""
    params = distributed.place(weights(), distributed.make_mesh())
    good = np.ones((4, 8), np.float32), np.ones(4, np.float32)
    odd, said = (good[0][:3], good[1][:3]), []
    for bad in ([], [(good[0], good[1][:3])], [(good[0].astype(np.float16), good[1])], [good, odd]):
        hessian = hd.Hessian(
            mean_of_whole_batches, params, bad if jax.process_index() == 1 else [good]
        )
        try:
            hessian @ params
        except ValueError as error:
            said.append(str(error))
    return said


def mean_of_whole_batches(params, batch):
    return loss(params, batch)


mean_of_whole_batches.whole_batch = True


def rounds(stall=None, fail=None, **_):
    """Collectives for ever; in the tenth round process `stall` hangs in its loader, process `fail`
    raises."""

    def loader():
        for step in range(10**6):
            if step == 10:
                print("under way", flush=True)
            if step == 10 and stall == jax.process_index():
                time.sleep(10**6)
            if step == 10 and fail == jax.process_index():
                raise OSError("this disk is gone")
            time.sleep(0.05)
            yield np.ones(3, np.float32)

    for batch in distributed.watch(loader, 2):
        multihost_utils.process_allgather(batch)
