"""The linear layers of a model: their blocks of the Hessian, and its Kronecker factors."""
