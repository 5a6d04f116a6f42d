"""What the code of others says of itself, without the values of its URL's options."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from kvlayer.errors import BackendError, ConfigError, KVLayerError
from kvlayer.runtime.foreign import words
from kvlayer.urls import BackendURL, parse_bool, parse_bytes

__all__ = ["Mask"]

_TELLING = 6  # shorter ones are found in the middle of words


class Mask:
    """Hides what may be a secret in one URL: every option's value that no number or size is.

    A name does not tell what is a secret, and an error of a backend may say with what it connects.
    ``public``: values that are names of things installed here.
    """

    def __init__(self, url: str | BackendURL = "", *, public: frozenset[str] = frozenset()) -> None:
        parsed = BackendURL.parse(url) if isinstance(url, str) and url else url
        options: Mapping[str, str] = parsed.options if isinstance(parsed, BackendURL) else {}
        self._hidden = [
            value
            for value in sorted(options.values(), key=len, reverse=True)
            if len(value) >= _TELLING and value not in public and not _is_plain(value)
        ]

    def __bool__(self) -> bool:
        """Whether there is anything to hide."""
        return bool(self._hidden)

    def text(self, said: str) -> str:
        """``said`` with ``***`` in the place of what is hidden."""
        for value in self._hidden:
            said = said.replace(value, "***")
        return said

    def cleaned(self, answer: object) -> object:
        """An answer; where it is an error that says too much, another one that does not."""
        if isinstance(answer, Exception) and self._tells(answer):
            return self._clean(answer)
        return answer

    @contextmanager
    def hiding(self) -> Generator[None]:
        """Raise a clean error for one that says too much, also in what led to it."""
        try:
            yield
        except Exception as exc:  # foreign code: whatever it raises may tell
            if not self._tells(exc):
                raise
            raise self._clean(exc) from None

    def _tells(self, exc: BaseException) -> bool:
        """Whether an error, a note of it or what led to it says what is hidden."""
        at: BaseException | None = exc
        seen: set[int] = set()
        while self._hidden and at is not None and id(at) not in seen:
            seen.add(id(at))
            said = "\n".join((_text(at), *getattr(at, "__notes__", ())))
            if self.text(said) != said:
                return True
            at = at.__cause__ or at.__context__
        return False

    def _clean(self, exc: Exception) -> Exception:
        hint = self.text(exc.hint or "") if isinstance(exc, KVLayerError) else ""
        if isinstance(exc, ConfigError):
            return ConfigError(self.text(_text(exc)), hint=hint or None)
        if not isinstance(exc, BackendError):
            return BackendError(self.text(words(exc)))
        try:
            clean = type(exc)(self.text(_text(exc)), hint=hint or None)
        except TypeError:  # a class of the backend's own
            clean = BackendError(self.text(words(exc)), hint=hint or None)
        clean.transient = exc.transient
        return clean


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception:  # noqa: BLE001  # foreign code, too
        return ""


def _is_plain(value: str) -> bool:
    """Whether a value is a size, a number or a yes: said in messages, and no secret."""
    for parse in (parse_bytes, parse_bool, float):
        try:
            parse(value)
        except ValueError:
            continue
        return True
    return False
