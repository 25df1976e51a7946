"""Long computations: their plans, memory, steps on disk, progress bars and failures."""
