"""One file per question; run each from the project's root as `python -m benchmarks.NAME`."""
