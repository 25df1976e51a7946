"""What does each device hold, and what does it send, when a model is sharded over 1 to 64 devices?

    python -m benchmarks.sharding

A transformer of 1 B weights, 16 layers of width 2048, fully sharded over fake devices, as is its
batch of 64 x 512 tokens. All is traced from shapes and compiled for N devices by N's own process;
nothing is allocated or run. Bytes per device come from XLA's memory analysis, bytes sent from its
program (`_hlo` says how they are counted). The sum of a sharded gradient is an all-reduce for XLA's
CPU compiler, a reduce-scatter for those of GPUs and TPUs: both are given.

Answer (2026-11-21, JAX 0.10.2; 1,012,830,208 weights in 15 sharded leaves), GB per device:

      devices   weights  one vector  of a basis   temporaries: gradient    1 H v    2 H v    4 H v
            1    4.0513      4.0513      4.0513                   29.06    48.39   235.97   260.18
            8    0.5064      0.5064      0.5064                    4.81     8.80    35.56    40.80
           64    0.0633      0.0633      0.0633                    1.66     2.49    10.08    12.91

Vectors and basis fall 8.000 times from 1 to 8 devices. An update of Lanczos with the default
settings sends scalars alone, 490 for every sharded leaf, k (num_steps + 2 deflation_steps) and a
few: 57.9 kB a device of 64. A gradient sends 13.45 GB a device of 8; a program of 1, 2 and 4
products 1.95, 1.92 and 1.80 gradients a vector (1.96, 1.93, 1.77 with reduce-scatters), the same on
2 to 64 devices. The programs of 2 and 4 use `jax.linearize`, which keeps gathered weights and what
rematerialization was to save whole between its loops: hence their temporaries, and hence `Hessian`
multiplies vector by vector where parameters are sharded. (One vector by `jax.linearize`: 2.16
gradients and 32.70 GB on 8.)

Computed from the measured ratios, not run: with its basis (200 vectors and more) the default fits
141 GB for 7 B weights on 64 devices and for 70 B on 512; without, 80 GB for 7 B on 8, 70 B on 64
and 120 B on 64."""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks._harness import ROOT, save

DEVICES = (1, 2, 4, 8, 16, 32, 64)
SIZES = {"vocab_size": 50304, "width": 2048, "depth": 16, "num_heads": 16, "max_length": 512}
BATCH = 64
BLOCKS = (1, 2, 4)  # vectors that go through the data together
STEPS, PROBES, DEFLATION = 45, 2, 90  # the defaults of spectral_density
KEPT = 4  # vectors a probe beside its basis: the last two, the product, and what is left of it
PAPER = {"7 B": 7e9, "70 B": 70e9, "120 B": 120e9}
CARDS = (80, 141)  # GB


def one(count: int) -> dict[str, Any]:
    """Everything that is known of ``count`` devices; to be called in a process that has as many."""
    import jax

    from benchmarks import _programs
    from benchmarks._hlo import collectives, memory, sent
    from hessdensity.distributed import make_mesh
    from hessdensity.krylov import lanczos
    from hessdensity.vectors import trees

    loss, params, tokens = _programs.transformer(make_mesh(), BATCH, **SIZES)
    kernels = _programs.kernels(params, PROBES)
    gradient = _programs.gradient(loss, params, tokens)
    products = {vectors: _programs.product(loss, params, tokens, vectors) for vectors in BLOCKS}
    found = {name: collectives(kernel) for name, kernel in kernels.items()}
    update: dict[str, list] = {"device": [], "none": []}
    for basis, steps in update.items():
        for name, times in _programs.calls(STEPS, DEFLATION, basis).items():
            steps += found[name] * times
    vector = memory(kernels["normalize"]).outputs / PROBES
    return {
        "devices": count,
        "num_params": trees.size(params),
        "sharded_leaves": sum(
            not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params)
        ),
        "bytes": {
            "weights": memory(gradient).outputs,
            "vector": vector,
            "basis vector": memory(kernels["new chunk"]).outputs / PROBES / lanczos.CHUNK,
            "temporaries of an update": max(
                memory(kernel).temporaries for kernel in kernels.values()
            ),
            "temporaries of the gradient": memory(gradient).temporaries,
            "temporaries of a product": {
                k: memory(program).temporaries for k, program in products.items()
            },
        },
        "update": {
            basis: {
                "kinds": sorted({each.kind for each in steps}),
                "scalars": sum(each.elements * each.times for each in steps),
                "largest": max((each.elements for each in steps), default=0),
                "sent": sent(steps),
            }
            for basis, steps in update.items()
        },
        "sent": {
            name: {
                "gradient": sent(collectives(gradient), scatter=scatter),
                "product": {
                    k: sent(collectives(program), scatter=scatter)
                    for k, program in products.items()
                },
            }
            for name, scatter in {"compiled": False, "scattered": True}.items()
        },
    }


def in_fresh_process(count: int) -> dict[str, Any]:
    """`one`, where there are ``count`` devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.sharding", "--devices", str(count)]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | flags, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout)


def on_paper(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Larger models by the measured ratios, in GB per device, vectors in float32; activations are
    not counted."""
    alone = measured[0]
    most = measured[-1]
    # Small leaves are on every device: bytes fall a little slower than the number of devices rises.
    surplus = most["bytes"]["vector"] * most["devices"] / alone["bytes"]["vector"]
    ring = (most["devices"] - 1) / most["devices"]
    units = {
        name: each["product"]["1"] / alone["bytes"]["weights"] / ring
        for name, each in most["sent"].items()
    }
    kept = PROBES * KEPT
    basis = -(-DEFLATION // 8) * 8 + PROBES * -(-STEPS // 8) * 8
    rows = []
    for model, weights in PAPER.items():
        for count in (8, 64, 512):
            vector = 4e-9 * weights / count * surplus
            need = {"device": vector * (1 + kept + basis), "none": vector * (1 + kept)}
            around = 4e-9 * weights * (count - 1) / count
            row = {
                "model": model,
                "devices": count,
                "weights": vector,
                "vectors": vector * kept,
                "basis": vector * basis,
                "sent": {name: around * unit for name, unit in units.items()},
                "fits": {
                    name: {str(card): gb <= card for card in CARDS} for name, gb in need.items()
                },
            }
            rows.append(row)
    return rows


def print_held(measured: list[dict[str, Any]]) -> None:
    print("GB per device:             weights  one vector  of a basis   temporaries of")
    head = [f"{'devices':>9}{'':40}", f"{'an update':>20}", f"{'the gradient':>14}"]
    head += [f"{f'{k} H v':>9}" for k in BLOCKS]
    print("".join(head))
    kinds = ("weights", "vector", "basis vector")
    for each in measured:
        held = {name: 1e-9 * size for name, size in _flat(each["bytes"]).items()}
        cells = [f"{each['devices']:>9}{'':16}"]
        cells += [f"{held[name]:>10.4f}" for name in kinds]
        cells.append(f"{held['temporaries of an update']:>14.4f}")
        cells.append(f"{held['temporaries of the gradient']:>14.2f}")
        cells += [f"{held[f'temporaries of a product, {k}']:>9.2f}" for k in BLOCKS]
        print("".join(cells))
    alone, eight = (next(each for each in measured if each["devices"] == count) for count in (1, 8))
    ratios = [f"{name} {alone['bytes'][name] / eight['bytes'][name]:.3f}" for name in kinds]
    print(f"1 device over 8: {', '.join(ratios)} (wanted: 7.5)")


def _flat(sizes: dict[str, Any]) -> dict[str, float]:
    """The bytes with one level of names."""
    flat = {}
    for name, size in sizes.items():
        if isinstance(size, dict):
            flat |= {f"{name}, {part}": each for part, each in size.items()}
        else:
            flat[name] = size
    return flat


def print_sent(measured: list[dict[str, Any]]) -> None:
    print(
        f"\nThe last Lanczos update of {PROBES} probes of {STEPS} steps, deflated by {DEFLATION}; "
        "with no basis:"
    )
    head = [f"{'devices':>9}", f"{'scalars':>10}", f"{'per leaf':>10}", f"{'largest':>9}"]
    head += [f"{'kB sent':>9}", f"{'scalars':>12}", f"{'kB sent':>9}", "  kinds"]
    print("".join(head))
    for each in measured[1:]:
        update = each["update"]["device"]
        bare = each["update"]["none"]
        cells = [
            f"{each['devices']:>9}",
            f"{update['scalars']:>10,}",
            f"{update['scalars'] / each['sharded_leaves']:>10.0f}",
            f"{update['largest']:>9,}",
            f"{update['sent'] / 1e3:>9.1f}",
            f"{bare['scalars']:>12,}",
            f"{bare['sent'] / 1e3:>9.1f}",
            f"  {', '.join(update['kinds'])}",
        ]
        print("".join(cells))
    print("\nSent per device: the gradient in GB, products in gradients per vector (wanted: 2.1)")
    head = [f"{'gradient':>12}", *(f"{f'{k} H v':>8}" for k in BLOCKS)]
    print(f"{'devices':>9}{''.join(2 * head)}   the second time with reduce-scatters")
    for each in measured[1:]:
        cells = [f"{each['devices']:>9}"]
        for name in ("compiled", "scattered"):
            part = each["sent"][name]
            cells.append(f"{1e-9 * part['gradient']:>12.2f}")
            ratios = [part["product"][str(k)] / k / part["gradient"] for k in BLOCKS]
            cells += [f"{ratio:>8.2f}" for ratio in ratios]
        print("".join(cells))


def print_paper(rows: list[dict[str, Any]]) -> None:
    cards = " and ".join(map(str, CARDS))
    print(
        "\nComputed from the measured ratios, not run. GB per device, all in float32, without "
        "activations."
    )
    print(
        f"{PROBES} probes of {STEPS} steps, deflated by {DEFLATION}, {KEPT} vectors a probe beside "
        "the basis. Does it"
    )
    print(f"fit devices of {cards} GB, with the basis and with none?")
    head = [f"{'weights':>9}", f"{'devices':>9}", f"{'weights':>10}", f"{'vectors':>10}"]
    head += [f"{'basis':>10}", f"{'fits':>12}", f"{'no basis':>12}", f"{'sent per H v':>16}"]
    print("".join([*head, f"{'with reduce-scatters':>22}"]))
    for row in rows:
        cells = [
            f"{row['model']:>9}",
            f"{row['devices']:>9}",
            f"{row['weights']:>10.2f}",
            f"{row['vectors']:>10.1f}",
            f"{row['basis']:>10.1f}",
            f"{_yes_or_no(row['fits']['device']):>12}",
            f"{_yes_or_no(row['fits']['none']):>12}",
            f"{row['sent']['compiled']:>16.0f}",
            f"{row['sent']['scattered']:>22.0f}",
        ]
        print("".join(cells))


def _yes_or_no(fits: dict[str, bool]) -> str:
    """One answer for each of `CARDS`."""
    return "/".join("yes" if fits[str(card)] else "no" for card in CARDS)


def main() -> None:
    measured = [in_fresh_process(count) for count in DEVICES]
    print(f"{measured[0]['num_params']:,} weights, {measured[-1]['sharded_leaves']} sharded leaves")
    print_held(measured)
    print_sent(measured)
    rows = on_paper(measured)
    print_paper(rows)
    settings = {
        "sizes": SIZES,
        "batch": BATCH,
        "steps": STEPS,
        "probes": PROBES,
        "deflation": DEFLATION,
    }
    result = {"settings": settings, "measured": measured, "paper": rows}
    print(f"saved in {save('sharding', result).name}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["--devices", count]:
            print(json.dumps(one(int(count))))
        case unknown:
            sys.exit(
                f"{' '.join(unknown)}: expected no arguments, or --devices N for one number of "
                "devices as JSON"
            )
