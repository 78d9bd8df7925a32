"""How a request reuses KV: `ReuseConfig`, the base class of all methods, which makes each by its name.

The methods themselves are in `sparsex_jax.reuse.methods`; importing `sparsex_jax` registers them.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

from sparsex_jax.config.calibration import Calibrated
from sparsex_jax.config.checks import Flag, at_least, checked, require
from sparsex_jax.config.model import ModelConfig
from sparsex_jax.errors import InvalidRequestError

METHODS: dict[str, type[ReuseConfig]] = {}  # filled by the definitions of their classes


def find_method(name: str) -> type[ReuseConfig]:
    """The class that is registered under a name.

    Raises:
      InvalidRequestError: there is none; the message lists the names there are.
    """
    known = isinstance(name, str) and name in METHODS
    require(known, f"method={name!r} is unknown; there are: {', '.join(METHODS)}")
    return METHODS[name]


def methods_by_option() -> dict[str, list[str]]:
    """All options of all methods, each with the names of the methods that have it."""
    found: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for option in _options_of(method):
            found.setdefault(option, []).append(name)
    return found


def _options_of(method: type[ReuseConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(method)]


class _Called(abc.ABCMeta):
    """What calling `ReuseConfig` and the methods' classes does.

    `ReuseConfig(...)` returns what its `__new__` returns, an instance of a method's class that is initialised already.
    A method's class takes its options by name, and checks names and values before its `__init__` sees them.
    """

    def __call__(cls, /, *values: Any, **options: Any) -> Any:
        if cls is ReuseConfig:
            return cls.__new__(cls, *values, **options)
        if values:
            raise TypeError(f"{cls.__name__}() takes its options by name")
        _check_names(cast(type[ReuseConfig], cls), options)
        return super().__call__(**checked(cls, options))


def _check_names(method: type[ReuseConfig], options: dict[str, Any]) -> None:
    own = _options_of(method)
    for name, value in options.items():
        refusal = f"{name}={value!r} has no meaning for method {method.method!r}; its options: {', '.join(own)}"
        require(name in own, refusal)


@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class ReuseConfig(metaclass=_Called):
    """How a request uses the KV that is in the store.

    `ReuseConfig("sparsex", boundary_layer=5)` is `SparseX(boundary_layer=5)`: an instance of the class that is
    registered under that name. Requests, files and the command line make their methods by this call.

    Attributes:
      min_segment_tokens: shorter segments are not worth pasting and are computed. At least 16: the index finds every
        run of 15 tokens, and not every shorter one.
      only_if_faster: recompute what was found where that takes less time, as `sparsex_jax.reuse.cost` predicts it for
        the engine's devices. The answer is full recompute's then. False: reuse what was found in any case.
      method: the name of the class.
      uses_prefix: whether an exact prefix is looked up.
      uses_segments: whether segments are looked up.

    Raises:
      InvalidRequestError: no method has the name, the method does not have an option, or an option's value is wrong.
    """

    method: ClassVar[str]
    uses_prefix: ClassVar[bool] = True
    uses_segments: ClassVar[bool] = True

    min_segment_tokens: Annotated[int, at_least(16)] = 16
    only_if_faster: Flag = True

    def __new__(cls, /, method: str = "sparsex", **options: Any) -> Self:
        if cls is ReuseConfig:
            return cast(Self, find_method(method)(**options))
        return super().__new__(cls)

    def __init_subclass__(cls, /, name: str | None = None, **options: Any) -> None:
        """A class that is defined with a name is registered under it: `class SparseX(Method, name="sparsex")`."""
        super().__init_subclass__(**options)
        if name is not None:
            taken = name in METHODS and METHODS[name].__module__.startswith(f"{__package__.partition('.')[0]}.")
            require(not taken, f"name={name!r} is a method of this package; another one needs a name of its own")
            cls.method = name
            METHODS[name] = cls

    def updated(self, **given: Any) -> ReuseConfig:
        """A copy with these options. If they name another `method`, it keeps the options that all methods have, and its
        own have their defaults. Options that `sparsex` has and this method does not name that one."""
        name = given.pop("method", self._method_with(given))
        if name == self.method:
            return dataclasses.replace(self, **given)
        shared = {option: getattr(self, option) for option in _options_of(ReuseConfig)}
        return ReuseConfig(name, **shared | given)

    def _method_with(self, options: Mapping[str, Any]) -> str:
        own, others = (set(_options_of(METHODS.get(name, type(self)))) for name in (self.method, "sparsex"))
        return "sparsex" if options.keys() <= others and not options.keys() <= own else self.method

    def to_dict(self) -> dict[str, Any]:
        """The method's name and its options: `ReuseConfig(**config.to_dict()) == config`."""
        return {"method": self.method} | dataclasses.asdict(self)

    def spec(self) -> str:
        """The method and the options that differ from its defaults, as the command line takes them.

        For example `sparsex:boundary_layer=5:recompute_ratio=0.3`.
        """
        values = [(field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)]
        return ":".join(
            [self.method, *(f"{name}={json.dumps(value)}" for name, value, usual in values if value != usual)]
        )

    @staticmethod
    def fitting(method: str, **options: Any) -> ReuseConfig:
        """A method with those of the options that it has: for several methods side by side that share options.

        Raises:
          InvalidRequestError: no method has one of the options, or as `ReuseConfig`.
        """
        known, own = methods_by_option(), _options_of(find_method(method))
        for name in options:
            require(name in known, f"no method has the option {name!r}; there are: {', '.join(known)}")
        return ReuseConfig(method, **{name: value for name, value in options.items() if name in own})

    @staticmethod
    def load(path: str | Path, model: ModelConfig | None = None, *, company: bool = False) -> ReuseConfig:
        """Read a file such as `sparsex calibrate` writes. Options that it does not name have their defaults.

        Args:
          model: the model it is to be used with. It must have the file's `architecture`, if the file has one.
          company: donors are made in company, for which the file may have options of their own.

        Raises:
          InvalidRequestError: the file cannot be read or is another model's, or what it says is wrong.
        """
        found = Calibrated.read(Path(path))
        if model is not None:
            found.check_model(model)
        try:
            return ReuseConfig(**found.options_for(company=company))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{path}: {error}") from error
