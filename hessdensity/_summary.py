"""A spectral density in words: what ``print(density)`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .density import SpectralDensity


def in_words(density: SpectralDensity) -> str:
    """The main figures, each with its error, and what they cost."""
    extremes, zero = density.extremes(), 1e-3 * max(map(abs, density.extent))
    near_zero = density.mass(-zero, zero)
    about = density.description
    operator = about.get("operator", {})
    examples = operator.get("num_examples")
    probes = f"{len(density.rules)} probe{'s' * (len(density.rules) > 1)}"
    rows = {
        "largest node": f"{extremes.largest:.6g} (residual)",
        "smallest node": f"{extremes.smallest:.6g} (residual)",
        "trace": f"{density.trace():.6g}",
        "Frobenius norm": f"{density.frobenius_norm():.6g}",
        f"share in ±{zero:.2g}": f"{near_zero.value:.4f} (between {near_zero.lower:.4f} and {near_zero.upper:.4f})",
        "mean loss": f"{operator['loss']:.6g} over {examples:,.6g} examples" if "loss" in operator else None,
        "spent": f"{density.num_matvecs} products"
        + (f", {about['seconds']:.1f} s" if "seconds" in about else "")
        + f"; {probes} of {density.nodes.shape[1]} steps",
        "stopped": about.get("stopped"),
    }
    lines = [f"  {name:<17} {text}" for name, text in rows.items() if text]
    return "\n".join([f"Spectral density of a {operator.get('kind', 'operator')}, n = {density.dimension:,}", *lines])
