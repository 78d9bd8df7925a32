"""The decoder: weights, layers, the kernels as it calls them, and where arrays live."""
