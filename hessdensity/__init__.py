"""hessdensity: the spectrum of a trained model's Hessian, from Hessian-vector products alone."""

from importlib.metadata import version as _version

from .comparison import distance as distance
from .data import batches as batches
from .density import SpectralDensity as SpectralDensity
from .hessian import Hessian as Hessian
from .losses import Total as Total
from .operators import FunctionOperator as FunctionOperator
from .operators import Matrix as Matrix
from .operators import Restricted as Restricted
from .operators import dense as dense
from .operators import to_scipy as to_scipy
from .quadrature import Rule as Rule
from .results import Estimate as Estimate
from .slq import spectral_density as spectral_density
from .verify import verify_operator as verify_operator

__version__ = _version("hessdensity")
