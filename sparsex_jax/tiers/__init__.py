"""What the device store has no room for: blocks of KV in host memory and on disk."""
