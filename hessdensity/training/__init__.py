"""Spectra over training: gradients in the spectrum, tracking."""
