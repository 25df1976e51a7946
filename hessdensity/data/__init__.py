"""One pass over batches: re-iterable data, placement on the mesh, agreement between processes."""
