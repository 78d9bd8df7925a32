"""The serving loop: which sequence is next, its pages, its prefill in chunks, and what becomes of failures."""
