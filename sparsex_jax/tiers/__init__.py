"""What the device store has no room for: blocks of KV in host memory and on disk.

Nothing here imports JAX. `blocks` says what a block is. The disk tier is `disk`, with `block_file` (a block as bytes),
`order` (which block goes first; `demand`: which ones come in) and `fingerprint` (whose KV it is); `archive` moves
blocks between machines.
"""
