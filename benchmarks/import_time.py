"""What does `import hessdensity` add to `import jax`, and does it load anything heavy?

    python -m benchmarks.import_time

Answer (2026-11-21, 2 cores of an AMD EPYC, Python 3.11, JAX 0.10.2): import jax 0.36 s, import
hessdensity 0.38 s, 0.03 s more; 17 more modules, none of the heavy ones among them."""

import json
import statistics
import subprocess
import sys

from benchmarks._harness import ROOT, save

HEAVY = ("matplotlib", "flax", "optax", "orbax", "scipy", "tqdm", "sklearn", "click")
PROGRAM = """
import time, json, sys
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(sys.modules)]))
"""


def fresh_import(module: str) -> tuple[float, set[str]]:
    """Seconds that the import takes in a new process, and the modules that it loads."""
    command = [sys.executable, "-c", PROGRAM.format(module=module)]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    seconds, modules = json.loads(run.stdout)
    return seconds, set(modules)


if __name__ == "__main__":
    seconds: dict[str, list[float]] = {"jax": [], "hessdensity": []}
    # These imports, which are not timed, also fill the caches of the file system.
    modules = {module: fresh_import(module)[1] for module in seconds}
    for _ in range(9):
        for module, samples in seconds.items():
            samples.append(fresh_import(module)[0])
    jax, hessdensity = (statistics.median(samples) for samples in seconds.values())
    added = modules["hessdensity"] - modules["jax"]
    heavy = [module for module in HEAVY if module in added]
    more = hessdensity - jax
    print(f"import jax {jax:.2f} s, import hessdensity {hessdensity:.2f} s: {more:.2f} s more")
    print(f"{len(added)} more modules; heavy ones among them: {', '.join(heavy) or 'none'}")
    result = {
        "seconds": seconds,
        "added_seconds": more,
        "added_modules": len(added),
        "heavy": heavy,
    }
    print(f"saved in {save('import_time', result).name}")
