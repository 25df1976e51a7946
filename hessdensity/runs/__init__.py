"""The life of a long computation: plan, memory, steps on disk, progress, failures."""
