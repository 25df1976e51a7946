"""Algebra on parameter pytrees: sums, random vectors, stored bases, orthogonalization, selection.

How a vector lies in memory is decided in this wing and nowhere else.
"""
