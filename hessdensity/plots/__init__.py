"""Draw results on a matplotlib ``Axes``. Only this wing imports matplotlib."""

from hessdensity.errors import needs_extra

with needs_extra("plot", "drawing"):
    import matplotlib as _matplotlib  # noqa: F401

from .axes import formats as formats
from .density import plot_cumulative as plot_cumulative
from .density import plot_density as plot_density
from .gradient import plot_concentration as plot_concentration
from .gradient import plot_measure as plot_measure
from .layers import plot_correspondence as plot_correspondence
from .layers import plot_eigenvalues as plot_eigenvalues
from .layers import plot_layer_densities as plot_layer_densities
from .layers import plot_overlap as plot_overlap
from .layers import plot_singular_values as plot_singular_values
from .track import plot_track as plot_track
