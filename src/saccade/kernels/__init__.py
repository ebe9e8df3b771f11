"""Native kernels, reached only through `saccade.ops`."""
