"""A spectral density in words: what ``print(density)`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .density import SpectralDensity

_SHOWN = 5  # outliers, from the largest in size


def in_words(density: SpectralDensity) -> str:
    """The main figures, each with its error, and what they cost."""
    extremes, zero = density.extremes(), 1e-3 * max(map(abs, density.extent))
    near_zero = density.mass(-zero, zero)
    about = density.description
    operator = about.get("operator", {})
    kind, error = operator.get("kind", "operator"), about.get("error")
    rows = {
        "largest node": f"{extremes.largest:.6g} (residual)",
        "smallest node": f"{extremes.smallest:.6g} (residual)",
        "outliers": _outliers(density),
        "Rayleigh quotient": f"{density.moment(1).value:.6g}" if density.given else None,
        "trace": f"{density.trace():.6g}" if not density.given else None,
        "Frobenius norm": f"{density.frobenius_norm():.6g}" if not density.given else None,
        f"share in ±{zero:.2g}": f"{near_zero.value:.4f} (between {near_zero.lower:.4f} and {near_zero.upper:.4f})",
        "mean loss": f"{operator['loss']:.6g} over {operator['num_examples']:,.6g} examples"
        if "loss" in operator
        else None,
        "error, W1 / range": f"about {error['total']:.1e}: quadrature {error['quadrature']:.1e}, "
        f"probes {error['probes']:.1e}, coupling {error['coupling']:.1e}"
        if error
        else None,
        "spent": _spent(density),
        "stopped": about.get("stopped"),
    }
    lines = [f"  {name:<17} {text}" for name, text in rows.items() if text]
    of = f"of {'an' if kind == 'operator' else 'a'} {kind}"
    title = (
        f"Measure of a vector over the spectrum {of}" if density.given else f"Spectral density {of}"
    )
    return "\n".join([f"{title}, n = {density.dimension:,}", *lines])


def _outliers(density: SpectralDensity) -> str | None:
    """The eigenvalues that deflation has found."""
    values = sorted(density.outliers[:, 0], key=abs, reverse=True)
    if not values:
        return None
    shown = ", ".join(f"{value:.4g}" for value in values[:_SHOWN])
    return f"{len(values)} eigenvalues found: {shown}" + (", ..." if len(values) > _SHOWN else "")


def _spent(density: SpectralDensity) -> str:
    """Products, time, and what they went into."""
    about, parts = density.description, []
    spent = about.get("spent", {})
    if spent.get("deflation"):
        parts.append(f"{spent['deflation']} steps of deflation")
    groups = spent.get("probes", [])
    for num_steps in sorted({num_steps for _, num_steps in groups}):
        count = sum(group[0] for group in groups if group[1] == num_steps)
        parts.append(f"{count} probe{'s' * (count > 1)} of {num_steps} steps")
    seconds = f", {about['seconds']:.1f} s" if "seconds" in about else ""
    return f"{density.num_matvecs} products{seconds}" + (f": {', '.join(parts)}" if parts else "")
