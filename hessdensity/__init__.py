"""hessdensity: the spectrum of a trained model's Hessian, from Hessian-vector products alone."""

from importlib.metadata import version as _version

from .data.passes import batches as batches
from .estimators.data_error import DataEstimate as DataEstimate
from .estimators.data_error import eigenvalue_data_error as eigenvalue_data_error
from .estimators.part_densities import PartDensities as PartDensities
from .estimators.part_densities import part_densities as part_densities
from .estimators.spectral_density import spectral_density as spectral_density
from .estimators.top_eigenspace import top_eigenspace as top_eigenspace
from .estimators.trace import trace as trace
from .krylov import lanczos as lanczos
from .losses.total import Total as Total
from .operators.hessian import Hessian as Hessian
from .operators.protocol import FunctionOperator as FunctionOperator
from .operators.protocol import Matrix as Matrix
from .operators.protocol import Restricted as Restricted
from .operators.protocol import dense as dense
from .operators.protocol import to_scipy as to_scipy
from .operators.verify import verify_operator as verify_operator
from .runs.plan import Choice as Choice
from .runs.plan import Plan as Plan
from .runs.plan import plan as plan
from .spectra.density import SpectralDensity as SpectralDensity
from .spectra.distance import distance as distance
from .spectra.eigenspace import Eigenspace as Eigenspace
from .spectra.eigenspace import overlap as overlap
from .spectra.eigenspace import principal_angles as principal_angles
from .spectra.estimate import Estimate as Estimate
from .spectra.quadrature import Rule as Rule
from .training.gradient import gradient as gradient
from .training.gradient import gradient_concentration as gradient_concentration
from .training.gradient import rayleigh_quotient as rayleigh_quotient
from .training.gradient import spectral_measure as spectral_measure
from .training.gradient_noise import GradientCovariance as GradientCovariance
from .training.gradient_noise import gradient_covariance as gradient_covariance
from .training.track import Measurement as Measurement
from .training.track import Track as Track
from .training.track import zeta as zeta
from .training.tracker import Tracker as Tracker
from .training.tracker import track as track

__version__ = _version("hessdensity")
