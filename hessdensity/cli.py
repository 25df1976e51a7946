"""``hessdensity demo`` and ``hessdensity run module:problem``."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hessdensity.errors import needs_extra
from hessdensity.estimators.density_settings import DensitySettings

try:
    with needs_extra("cli", "the command line"):
        import click
except ModuleNotFoundError as missing:
    raise SystemExit(str(missing)) from None


def _steps(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that set the numbers of products of a density."""
    block, probes = DensitySettings(), DensitySettings(basis="none")
    steps = f"{block.num_steps}, or {probes.num_steps} for probes"
    options = {
        "--num-steps": (1, f"Lanczos steps, which set the resolution. {steps}."),
        "--block-size": (
            2,
            f"Starts of a block, in which each is deflated by the others. {block.block_size}.",
        ),
        "--num-probes": (
            1,
            f"Random starts behind a deflation run, instead of a block. {probes.num_probes}.",
        ),
        "--deflation-steps": (
            0,
            f"Lanczos steps of a deflation run, instead of a block. {probes.deflation_steps}.",
        ),
    }
    for name, (least, help_text) in reversed(options.items()):
        command = click.option(name, type=click.IntRange(min=least), help=help_text)(command)
    return command


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
@_steps
@click.option("--seed", default=0, help="Seed of the probes.")
def demo(plot: str, seed: int, **steps: int | None) -> None:
    """Estimate the density of a small network's Hessian, and compare it with the exact one.

    The network is trained on handwritten digits.
    """
    import jax
    import numpy as np

    import hessdensity as hd
    from hessdensity import demo as demonstration

    _check_targets(None, plot)
    settings = _agreeing(**steps)
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
    density = hd.spectral_density(hessian, key, **settings)
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
@_steps
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
    tolerance: float | None,
    basis: str | None,
    checkpoint: str | None,
    seed: int,
    out: str | None,
    plot: str | None,
    x_scale: str,
    progress: bool,
    **steps: int | None,
) -> None:
    """Estimate the density of PROBLEM, given as package.module:function.

    The function takes no argument and returns (loss, params, data), or an operator. Its module may
    be in the current folder.
    """
    import jax

    import hessdensity as hd

    _check_targets(out, plot)
    settings = _agreeing(**steps, tolerance=tolerance, basis=basis)
    operator = _operator(problem)
    density = hd.spectral_density(
        operator,
        jax.random.key(seed),
        **settings,
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


def _agreeing(**settings: Any) -> dict[str, Any]:
    """The settings of a density, if they belong together."""
    try:
        DensitySettings(**settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return settings


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
