"""The values that a loss may return, common criteria, and sums over all the data."""

from .criteria import cross_entropy as cross_entropy
from .criteria import mean_squared_error as mean_squared_error
from .criteria import next_token_cross_entropy as next_token_cross_entropy
from .risk import EmpiricalRisk as EmpiricalRisk
from .total import Loss as Loss
from .total import Total as Total
from .total import batch_total as batch_total
