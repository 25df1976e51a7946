"""Networks and data for the benchmarks and notebooks; nothing here knows the package they measure."""
