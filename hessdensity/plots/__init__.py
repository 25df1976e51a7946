"""Draw results on a matplotlib ``Axes``. Nothing is computed, shown or saved here."""

from .density import formats as formats
from .density import plot_cumulative as plot_cumulative
from .density import plot_density as plot_density
from .track import plot_concentration as plot_concentration
from .track import plot_measure as plot_measure
from .track import plot_track as plot_track
