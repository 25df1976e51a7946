"""hessdensity: the spectrum of a trained model's Hessian, from Hessian-vector products alone."""

from importlib.metadata import version as _version

from .block_lanczos import top_eigenspace as top_eigenspace
from .comparison import distance as distance
from .data import batches as batches
from .data_error import DataEstimate as DataEstimate
from .data_error import eigenvalue_data_error as eigenvalue_data_error
from .density import SpectralDensity as SpectralDensity
from .eigenspaces import Eigenspace as Eigenspace
from .eigenspaces import overlap as overlap
from .eigenspaces import principal_angles as principal_angles
from .gradient_noise import GradientCovariance as GradientCovariance
from .gradient_noise import gradient_covariance as gradient_covariance
from .gradients import gradient as gradient
from .gradients import gradient_concentration as gradient_concentration
from .gradients import rayleigh_quotient as rayleigh_quotient
from .gradients import spectral_measure as spectral_measure
from .hessian import Hessian as Hessian
from .losses import Total as Total
from .operators import FunctionOperator as FunctionOperator
from .operators import Matrix as Matrix
from .operators import Restricted as Restricted
from .operators import dense as dense
from .operators import to_scipy as to_scipy
from .parts import PartDensities as PartDensities
from .parts import part_densities as part_densities
from .planning import Choice as Choice
from .planning import Plan as Plan
from .planning import plan as plan
from .quadrature import Rule as Rule
from .results import Estimate as Estimate
from .slq import spectral_density as spectral_density
from .traces import trace as trace
from .tracking import Tracker as Tracker
from .tracking import track as track
from .tracks import Measurement as Measurement
from .tracks import Track as Track
from .tracks import zeta as zeta
from .verify import verify_operator as verify_operator

__version__ = _version("hessdensity")
