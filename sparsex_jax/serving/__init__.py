"""Serving many requests at once: `loop` is the scheduler, and `detokenize` turns tokens into text as they come."""
