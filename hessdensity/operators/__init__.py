"""Symmetric operators: ``operator @ block``, and nothing else."""
