"""Which sequence is next: admission, chunks, the serving loop."""
