"""The two Lanczos engines, which work by reverse communication."""
