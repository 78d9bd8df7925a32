"""Quality: generated tasks, caching regimes, metrics, and the bench that puts reuse methods side by side."""
