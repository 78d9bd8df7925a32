"""Every error that the package raises on purpose. Each message names the field and its limit."""


class SparsexError(Exception):
    """Base class of all errors that the package raises on purpose."""


class InvalidRequestError(SparsexError, ValueError):
    """An argument of a request is wrong: an empty prompt, a wrong type, too many tokens, a value out of range."""


class ContextLengthError(InvalidRequestError):
    """Prompt and answer together are longer than the model takes, or than an empty store can hold."""


class UnknownAdapterError(InvalidRequestError):
    """No adapter of that name is loaded."""


class AdapterInUseError(InvalidRequestError):
    """An adapter cannot be unloaded while requests run, wait or are held with it."""


class StructureError(InvalidRequestError):
    """What an answer must be cannot be expressed: it is wrong, needs what is not supported, or is too complex."""


class StoreFullError(SparsexError):
    """The KV store cannot hold the request now, even after evicting everything evictable. Later it may."""


class NoRoomError(StoreFullError):
    """Frozen texts and pins leave too little of the KV store for the request. Waiting does not help, unless for the end
    of a pin's time; forgetting a text or releasing a pin may."""


class FrozenLimitError(NoRoomError):
    """A text cannot be frozen: frozen texts fill as much of the KV store as they may, or as requests leave."""


class PinLimitError(StoreFullError):
    """A prompt's pages cannot be pinned: pins have as much of the KV store as they may, or others need these pages."""


class LinkError(SparsexError):
    """KV could not be moved between the devices and host memory. What it was copied from is unharmed."""


class OverloadedError(SparsexError):
    """The queue of waiting requests is full.

    Attributes:
      retry_after_s: an estimate of the seconds until the queue has room again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DiskStoreError(SparsexError):
    """Blocks of KV cannot be kept in, or moved to or from, that directory or file: the disk is full or fails, it is not
    permitted, another process uses it, or it is of another model."""


class DigestError(SparsexError):
    """What a replica is said to hold cannot be read, or contradicts itself."""


class NoReplicaError(SparsexError):
    """No replica is there to take a request."""


class AddressError(SparsexError):
    """An address cannot be listened at: it is in use, unknown or not permitted."""


class NonFiniteLogitsError(SparsexError):
    """A request's logits have NaN or infinities, because of broken weights, an overflow, or a fault of the device."""


class UnknownModelError(SparsexError, ValueError):
    """No embedded model, directory, GGUF file, configuration or model on the hub has that name."""


class HubError(SparsexError):
    """A model cannot be fetched by its name: the hub cannot be reached or refuses access, or the disk is full."""


class UnsupportedModelError(SparsexError, ValueError):
    """The checkpoint was found, but needs something that this decoder does not implement."""


class UnknownHandleError(SparsexError, KeyError):
    """`remember` never returned that handle, or its entry was forgotten or evicted since."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError's own `__str__` would quote the message


class UnknownPinError(SparsexError, KeyError):
    """The namespace has no pin of that key: it was never made, was released, or its time is over."""

    __str__ = UnknownHandleError.__str__


class ResultFileError(SparsexError):
    """Figures cannot be written to that folder."""


class GroupError(SparsexError):
    """The processes of a group cannot go on together: one did not come, differs, hangs, failed alone or has ended."""
