"""The operations on a GPU in Triton, and how their work is cut into programs."""
