"""Algebra on parameter pytrees: sums of bounded length, random vectors, bases, orthogonalization,
selection."""
