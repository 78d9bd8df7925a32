"""Measures quality: generated tasks, caching regimes, scores, and the bench that compares reuse methods."""
