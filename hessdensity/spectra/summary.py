"""The text that ``print`` shows for a spectral density and for the measure of a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hessdensity.text import named_rows, of_operator, plural

from .estimate import Estimate

if TYPE_CHECKING:
    from .measure import SpectralMeasure

_SHOWN = 5  # the number of outliers that are listed, starting with the largest in size


def summarize(measure: SpectralMeasure, title: str, own: Mapping[str, str | None]) -> str:
    """The main figures of a result, each with its error, and their cost.

    Args:
      measure: the result.
      title: the name of this type of result.
      own: further rows that only this type of result has.
    """
    extremes = measure.extremes()
    zero = 1e-3 * max(map(abs, measure.extent))
    near_zero = measure.mass(-zero, zero)
    about = measure.description
    rows = {
        "largest node": _end(extremes.largest, extremes.largest.upper),
        "smallest node": _end(extremes.smallest, extremes.smallest.lower),
        **own,
        f"share in ±{zero:.2g}": f"{near_zero:.4f}",
        "resolution": _resolution(measure),
        "mean loss": _loss(about.get("operator", {})),
        "error, W1 / range": _error(about.get("error")),
        "asymmetry": _asymmetry(about.get("asymmetry")),
        "spent": _spent(measure),
        "stopped": about.get("stopped"),
    }
    return "\n".join(
        [f"{title} {of_operator(about)}, n = {measure.dimension:,}", *named_rows(rows)]
    )


def found(outliers: np.ndarray) -> str | None:
    """The eigenvalues that deflation found, starting with the largest in size."""
    values = sorted(outliers[:, 0], key=abs, reverse=True)
    if not values:
        return None
    shown = ", ".join(f"{value:.4g}" for value in values[:_SHOWN])
    return f"{len(values)} eigenvalues found: {shown}" + (", ..." if len(values) > _SHOWN else "")


def _end(estimate: Estimate, beyond: float) -> str:
    """A node at an end of the spectrum, with its residual, and where the spectrum ends."""
    text = f"{estimate:.6g} (residual)"
    reach = max(estimate.standard_error, 1e-6 * abs(estimate.value))
    if abs(beyond - estimate.value) > 2 * reach:
        text += f", the spectrum ends at {beyond:.6g} at the latest"
    return text


def _resolution(measure: SpectralMeasure) -> str | None:
    """The bandwidth below which the density is not resolved, if the rules have one."""
    width = measure.resolved_from
    if not width:
        return None
    dominates = _quadrature_dominates(measure.description.get("error"))
    more = "; quadrature is the largest error: more steps lower it" if dominates else ""
    return f"bandwidths from {width:.2g}{more}"


def _quadrature_dominates(error: Mapping[str, float] | None) -> bool:
    return error is not None and error["quadrature"] > 0.5 * error["total"]


def _asymmetry(asymmetry: float | None) -> str | None:
    """How far the products are from symmetric, if that is more than rounding in float32."""
    if asymmetry is None or asymmetry < 1e-4:
        return None
    return f"the products are {asymmetry:.1%} from symmetric; see hd.verify_operator"


def _loss(operator: Mapping[str, Any]) -> str | None:
    if "loss" not in operator:
        return None
    return f"{operator['loss']:.6g} over {operator['num_examples']:,.6g} examples"


def _error(error: Mapping[str, float] | None) -> str | None:
    if not error:
        return None
    names = [name for name in ("quadrature", "probes", "coupling") if name in error]
    if error.get("rounding", 0) > 0.01 * error["total"]:
        names.append("rounding")
    parts = ", ".join(f"{name} {error[name]:.1e}" for name in names)
    return f"about {error['total']:.1e}: {parts}"


def _spent(measure: SpectralMeasure) -> str:
    """The number of products, the time, and the runs that the products were spent on."""
    about = measure.description
    parts = []
    spent = about.get("spent", {})
    if spent.get("deflation"):
        parts.append(f"{spent['deflation']} steps of deflation")
    groups = spent.get("probes", [])
    block = about.get("block_size") and about.get("basis") != "none"
    for num_steps in sorted({num_steps for _, num_steps in groups}):
        count = sum(group[0] for group in groups if group[1] == num_steps)
        parts.append(
            f"{num_steps} passes of a block of {count}"
            if block
            else f"{plural(count, 'probe')} of {num_steps} steps"
        )
    seconds = f", {about['seconds']:.1f} s" if "seconds" in about else ""
    details = f": {', '.join(parts)}" if parts else ""
    return f"{plural(measure.num_matvecs, 'product')}{seconds}{details}"
