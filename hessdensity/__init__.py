"""hessdensity: the spectrum of a trained model's Hessian, from Hessian-vector products alone."""

from importlib.metadata import version as _version

from .data.batches import batches as batches
from .errors import LostProcessError as LostProcessError
from .errors import NonFiniteProductError as NonFiniteProductError
from .errors import RunTerminated as RunTerminated
from .estimators.data_error import eigenvalue_data_error as eigenvalue_data_error
from .estimators.part_densities import PartDensities as PartDensities
from .estimators.part_densities import part_densities as part_densities
from .estimators.plan import plan as plan
from .estimators.spectral_density import spectral_density as spectral_density
from .estimators.spectral_measure import spectral_measure as spectral_measure
from .estimators.top_eigenspace import top_eigenspace as top_eigenspace
from .estimators.trace import TraceEstimate as TraceEstimate
from .estimators.trace import trace as trace
from .krylov import lanczos as lanczos
from .layers.find import Layer as Layer
from .layers.find import Layers as Layers
from .layers.find import find_layers as find_layers
from .losses.composed import ComposedLoss as ComposedLoss
from .losses.composed import compose as compose
from .losses.risk import EmpiricalRisk as EmpiricalRisk
from .losses.total import Total as Total
from .operators.algebra import Restricted as Restricted
from .operators.conversions import dense as dense
from .operators.conversions import to_scipy as to_scipy
from .operators.hessian import Hessian as Hessian
from .operators.matrices import FunctionOperator as FunctionOperator
from .operators.matrices import Matrix as Matrix
from .operators.verify import verify_operator as verify_operator
from .runs.plan import MemoryLayout as MemoryLayout
from .runs.plan import Plan as Plan
from .spectra.density import SpectralDensity as SpectralDensity
from .spectra.distance import distance as distance
from .spectra.eigenspace import Eigenspace as Eigenspace
from .spectra.estimate import BoundedEstimate as BoundedEstimate
from .spectra.estimate import DataEstimate as DataEstimate
from .spectra.estimate import Estimate as Estimate
from .spectra.measure import SpectralMeasure as SpectralMeasure
from .spectra.quadrature import Rule as Rule
from .spectra.subspaces import overlap as overlap
from .spectra.subspaces import principal_angles as principal_angles
from .training.gradient import gradient as gradient
from .training.gradient import gradient_concentration as gradient_concentration
from .training.gradient import rayleigh_quotient as rayleigh_quotient
from .training.gradient_noise import GradientCovariance as GradientCovariance
from .training.gradient_noise import gradient_covariance as gradient_covariance
from .training.track import Track as Track
from .training.track import TrackPoint as TrackPoint
from .training.track import zeta as zeta
from .training.tracker import Tracker as Tracker
from .training.tracker import track as track

__version__ = _version("hessdensity")
