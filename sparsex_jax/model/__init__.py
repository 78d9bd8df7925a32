"""The decoder: its weights, its layers, the kernels as it calls them, and where its arrays live.

Which kind of record to use, here and in the rest of the package:

- `flax.struct.dataclass` for records of arrays that cross `jit`: arguments, results and loop state. Each field is
  annotated with its shape (`Int[Array, "rows"]`); the fields of `Params` carry logical axes instead.
- a frozen `dataclasses.dataclass` for static configuration. It is hashable, so it can be a static argument of a jitted
  function. Records of the host alone, which no jitted function sees, are dataclasses too.
- `typing.NamedTuple` for a small record inside one jitted function, which may mix arrays with static values, and for
  what a host function returns as several values.
"""
