"""``hessdensity demo`` and ``hessdensity run module:problem``."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from hessdensity.errors import needs_extra
from hessdensity.estimators.density_settings import DensitySettings

try:
    with needs_extra("cli", "the command line"):
        import click
except ModuleNotFoundError as missing:
    raise SystemExit(str(missing)) from None


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hessdensity")
def main() -> None:
    """The spectrum of a trained model's Hessian, from Hessian-vector products."""


@main.command()
@click.option(
    "--plot",
    default="hessdensity_demo.png",
    type=click.Path(dir_okay=False),
    help="File to which the figure is saved.",
)
@click.option(
    "--num-steps",
    default=60,
    type=click.IntRange(min=1),
    help="Lanczos steps for each probe. They set the resolution.",
)
@click.option(
    "--num-probes",
    default=4,
    type=click.IntRange(min=1),
    help="Random starting vectors. They set the precision.",
)
@click.option(
    "--deflation-steps",
    default=60,
    type=click.IntRange(min=0),
    help="Lanczos steps for deflation. The outliers they find have no probe noise.",
)
@click.option("--seed", default=0, help="Seed of the probes.")
def demo(plot: str, num_steps: int, num_probes: int, deflation_steps: int, seed: int) -> None:
    """Estimate the density of a small network's Hessian, and compare it with the exact one.

    The network is trained on handwritten digits.
    """
    import jax
    import numpy as np

    import hessdensity as hd
    from hessdensity import demo as demonstration

    _check_targets(None, plot)
    start = time.perf_counter()
    click.echo(
        f"Training a {'-'.join(map(str, demonstration.WIDTHS))} network on scikit-learn's digits "
        "..."
    )
    try:
        hessian = hd.Hessian(*demonstration.problem())
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from error
    key = jax.random.key(seed)
    density = hd.spectral_density(
        hessian, key, num_steps=num_steps, num_probes=num_probes, deflation_steps=deflation_steps
    )
    click.echo(
        f"\n{density}\n\nComputing the dense Hessian for comparison, {density.dimension:,} "
        "products ..."
    )
    eigenvalues = np.linalg.eigvalsh(hd.dense(hessian))
    click.echo(demonstration.comparison(density, eigenvalues))
    _save_figure(density, plot, eigenvalues=eigenvalues, label=f"{density.num_matvecs} products")
    click.echo(f"\nFigure: {plot}   ({time.perf_counter() - start:.0f} s in all)")


@main.command()
@click.argument("problem")
@click.option(
    "--num-steps",
    default=DensitySettings.num_steps,
    type=click.IntRange(min=1),
    help="Lanczos steps for each probe. They set the resolution.",
)
@click.option(
    "--num-probes",
    default=DensitySettings.num_probes,
    type=click.IntRange(min=1),
    help="Random starting vectors. They set the precision.",
)
@click.option(
    "--deflation-steps",
    default=DensitySettings.deflation_steps,
    type=click.IntRange(min=0),
    help="Lanczos steps for deflation. The outliers they find have no probe noise.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Continue until the estimated W1 error, divided by the range, is below this.",
)
@click.option(
    "--basis",
    type=click.Choice(["device", "host", "none"]),
    help="Where the basis vectors are kept. By default it is chosen to fit into memory.",
)
@click.option("--checkpoint", type=click.Path(), help="Folder from which a killed run resumes.")
@click.option("--seed", default=0, help="Seed of the probes.")
@click.option("--out", type=click.Path(dir_okay=False), help="File to save the density to (npz).")
@click.option(
    "--plot", type=click.Path(dir_okay=False), help="File to save a figure to (png, pdf, svg)."
)
@click.option(
    "--x-scale",
    default="linear",
    type=click.Choice(["linear", "symlog"]),
    help="Scale of the figure's x axis.",
)
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def run(
    problem: str,
    num_steps: int,
    num_probes: int,
    deflation_steps: int,
    tolerance: float | None,
    basis: str | None,
    checkpoint: str | None,
    seed: int,
    out: str | None,
    plot: str | None,
    x_scale: str,
    progress: bool,
) -> None:
    """Estimate the density of PROBLEM, given as package.module:function.

    The function takes no argument and returns (loss, params, data), or an operator. Its module may
    be in the current folder.
    """
    import jax

    import hessdensity as hd

    _check_targets(out, plot)
    operator = _operator(problem)
    density = hd.spectral_density(
        operator,
        jax.random.key(seed),
        num_steps=num_steps,
        num_probes=num_probes,
        deflation_steps=deflation_steps,
        tolerance=tolerance,
        basis=basis,
        checkpoint=checkpoint,
        progress=progress,
    )
    click.echo(str(density))
    if out:
        density.save(out)
        click.echo(f"Density: {out}")
    if plot:
        _save_figure(density, plot, x_scale=x_scale)
        click.echo(f"Figure: {plot}")


def _operator(problem: str) -> Any:
    """The operator that ``package.module:function`` returns or defines."""
    import hessdensity as hd

    module, separator, function = problem.partition(":")
    if not separator:
        raise click.BadParameter(
            f"{problem!r} names no function; expected package.module:function."
        )
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise click.BadParameter(
            f"module {error.name!r} is neither in the current folder nor installed."
        ) from error
    if not hasattr(found, function):
        raise click.BadParameter(f"module {module!r} has no function {function!r}.")
    make = getattr(found, function)
    if not callable(make):
        raise click.BadParameter(
            f"{problem!r} is a {type(make).__name__}; expected a function without arguments."
        )
    made = make()
    if isinstance(made, tuple) and len(made) == 3:
        return hd.Hessian(*made)
    if not hasattr(made, "like"):
        raise click.BadParameter(
            f"{problem!r} returned a {type(made).__name__}; expected (loss, params, data), or an "
            "operator."
        )
    return made


def _check_targets(out: str | None, plot: str | None) -> None:
    """Refuse, before a long computation, a folder that does not exist or an unknown suffix."""
    for target in filter(None, (out, plot)):
        folder = Path(target).absolute().parent
        if not folder.is_dir():
            raise click.BadParameter(f"{target!r}: the folder {str(folder)!r} does not exist.")
    if plot is not None:
        from hessdensity.plots import formats

        suffix = Path(plot).suffix.lstrip(".")
        if suffix not in formats():
            raise click.BadParameter(
                f"{plot!r}: figures cannot be saved as {suffix!r}; expected one of "
                f"{', '.join(formats())}."
            )


def _save_figure(density: Any, path: str, **options: Any) -> None:
    density.plot(**options).figure.savefig(path, dpi=150)
