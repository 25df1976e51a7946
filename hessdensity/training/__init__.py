"""Spectra over training: gradients in the spectrum, their noise, and tracking."""
