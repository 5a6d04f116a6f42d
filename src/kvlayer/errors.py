"""Every error kvlayer raises on purpose, with one base. A cache miss is a value, never an error."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendError",
    "BackendTimeoutError",
    "BackendUnavailableError",
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "ForeignError",
    "ForkedError",
    "IdentityError",
    "KVLayerError",
    "LayoutError",
    "MessageError",
    "NoRoomError",
    "PendingError",
    "PluginError",
    "TokensError",
    "UnknownSchemeError",
    "UnsupportedError",
]


class KVLayerError(Exception):
    """Base of every exception kvlayer raises on purpose.

    ``hint`` says what to do next; it is also attached as a note, so a traceback shows it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint is not None:
            self.add_note(f"hint: {hint}")


class ArgumentError(KVLayerError, TypeError, ValueError):
    """A call got a value of the wrong type, or one that is out of range. Nothing was done."""


class ConfigError(KVLayerError, ValueError):
    """The configuration is wrong; the message names the source, the key and the value."""


class IdentityError(KVLayerError, ValueError):
    """The model's identity is unknown or unusable, so sharing its KV would be unsafe."""


class LayoutError(KVLayerError, ValueError):
    """Tensors or slots do not match the declared KV layout (shape, dtype, device, count)."""


class MessageError(KVLayerError, ValueError):
    """What came from another process is no message of this version, or not meant for this one."""


class TokensError(KVLayerError, TypeError):
    """Tokens are not integers in a shape kvlayer can name."""


class CapacityError(KVLayerError, ValueError):
    """A tier is too small for what it is asked to hold."""


class PluginError(KVLayerError):
    """An installed plugin cannot be used; the message names its distribution."""


class UnknownSchemeError(PluginError, LookupError):
    """No installed plugin answers to this name."""


class ClosedError(KVLayerError, RuntimeError):
    """The object was used after it was closed, or before it was opened."""


class PendingError(KVLayerError, TimeoutError):
    """What was waited for is not there yet. It goes on: wait again, poll, or cancel it."""


class ForkedError(KVLayerError, RuntimeError):
    """The object was opened in another process and used in a forked child."""


class UnsupportedError(KVLayerError):
    """The backend, engine, model or environment does not offer what this call needs."""


class ForeignError(KVLayerError):
    """Other people's code raised what must not reach an event loop: ``SystemExit``, for example."""


class BackendError(KVLayerError):
    """A storage backend failed. ``transient`` says whether trying again may help."""

    transient: bool = False


class BackendUnavailableError(BackendError, ConnectionError):
    """The backend cannot be reached now."""

    transient = True


class NoRoomError(BackendError):
    """The backend is full of what is worth more than this object. It is well, and takes others."""


class BackendTimeoutError(BackendError, TimeoutError):
    """The backend missed its deadline."""

    transient = True
