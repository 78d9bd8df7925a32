"""What runs on the device: jitted prefill and decode, sampling, and the runner that owns the store."""
