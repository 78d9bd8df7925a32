"""Every error the package raises on purpose. Each message names the field and the limit."""


class SparsexError(Exception):
    """Base class: catching it catches whatever this package raises on purpose."""


class InvalidRequestError(SparsexError, ValueError):
    """A request's argument is wrong: empty prompt, wrong type, too long, a value out of range."""


class StoreFullError(SparsexError):
    """The KV store cannot hold the request, even after evicting all it may evict."""


class OverloadedError(SparsexError):
    """Too many requests wait already.

    Attributes:
      retry_after_s: when there may be room again, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NonFiniteLogitsError(SparsexError):
    """A request's logits have NaN or infinities: broken weights, an overflow, or a fault of the device."""


class UnknownModelError(SparsexError, ValueError):
    """No embedded model, directory, GGUF file or configuration goes by that name."""


class UnsupportedModelError(SparsexError, ValueError):
    """The checkpoint was found but asks for something this decoder does not implement."""


class UnknownHandleError(SparsexError, KeyError):
    """A handle that `remember` never returned, or that was forgotten or evicted since."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would show the repr
