"""Networks and data for the benchmarks and notebooks. Nothing here knows the measured package."""
