"""What a loss returns, the usual criteria, and sums over all the data."""

from .total import Loss as Loss
from .total import Total as Total
from .total import cross_entropy as cross_entropy
from .total import mean_squared_error as mean_squared_error
from .total import next_token_cross_entropy as next_token_cross_entropy
