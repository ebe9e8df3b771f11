"""Native kernels, reached only from the engines."""
