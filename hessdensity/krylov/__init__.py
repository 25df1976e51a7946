"""The two Lanczos engines, by reverse communication."""
