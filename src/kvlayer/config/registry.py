"""Finds plugins by entry point: lists them without importing, imports one when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeGuard, TypeVar

from kvlayer.abc.backend import Backend
from kvlayer.abc.codec import Codec
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.errors import ConfigError, KVLayerError, PluginError, UnknownSchemeError
from kvlayer.identity.keys import RAW, Encoding
from kvlayer.urls import BackendURL, nearest

if TYPE_CHECKING:
    import click  # at run time only the command line needs it

__all__ = [
    "ADAPTERS",
    "BACKENDS",
    "CODECS",
    "COMMANDS",
    "POLICIES",
    "Plugin",
    "Registry",
    "make_codec",
    "open_backend",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plugin:
    """An installed plugin, known from metadata alone: nothing of it has been imported."""

    name: str
    target: str
    """``module:attribute`` as the distribution declares it."""
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


class Registry(Generic[T]):
    """What one entry-point group offers, by name.

    ``noun`` names one entry in messages; ``expected`` says what an entry must be and ``check``
    whether a loaded object is that. ``entries`` are given by hand, for tests and applications:
    they are used as they are and come before an installed plugin of the same name. A registry is
    immutable; every call reads the metadata of ``sys.path`` as it is then.
    """

    def __init__(
        self,
        group: str,
        *,
        noun: str,
        expected: str,
        check: Callable[[object], TypeGuard[T]],
        entries: Mapping[str, T] = MappingProxyType({}),
    ) -> None:
        self.group = group
        self.noun = noun
        self._expected = expected
        self._check = check
        self._entries = dict(entries)

    def extended(self, entries: Mapping[str, T]) -> Registry[T]:
        """A registry that also offers ``entries``; this one is unchanged."""
        return Registry(
            self.group,
            noun=self.noun,
            expected=self._expected,
            check=self._check,
            entries={**self._entries, **entries},
        )

    def installed(self) -> list[Plugin]:
        """Every plugin of the group, sorted by name; imports none of them.

        Names that several distributions claim are listed once for each.
        """
        found = [_plugin(entry) for entry in entry_points(group=self.group)]
        return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))

    def names(self) -> list[str]:
        """Every name :meth:`load` may be called with, sorted."""
        return sorted({*self._entries, *(entry.name for entry in entry_points(group=self.group))})

    def load(self, name: str) -> T:
        """Import the plugin called ``name`` and return what it declares.

        Raises ``UnknownSchemeError`` for a name nobody offers, and ``PluginError`` for one that
        several distributions claim, that fails to import or that is not what the group holds.
        """
        if name in self._entries:
            return self._entries[name]
        claims = list(entry_points(group=self.group, name=name))
        if not claims:
            raise self._unknown(name)
        if len(claims) > 1:
            raise self._contested(name, claims)
        return self._import(claims[0])

    def load_option(self, option: str, name: str) -> T:
        """:meth:`load` for a name that a URL's option gives: no message repeats it."""
        if name not in self.names():
            raise UnknownSchemeError(
                f"the option {option!r} names no {self.noun}",
                hint=f"installed: {', '.join(self.names())}",
            )
        return self.load(name)

    def _unknown(self, name: str) -> UnknownSchemeError:
        plugins = self.installed()
        near = nearest(name, self.names())
        offers = [f"{plugin.name} ({plugin.distribution})" for plugin in plugins]
        offers += [f"{entry} (given by hand)" for entry in self._entries]
        if not offers:
            hint = (
                f"nothing is installed in the group {self.group!r}: install what offers one; run "
                "from a checkout, kvlayer itself needs `pip install -e .`"
            )
        else:
            hint = f"installed: {', '.join(offers)}"
        return UnknownSchemeError(
            f"no {self.noun} is called {name!r}" + (f"; did you mean {near!r}?" if near else ""),
            hint=hint,
        )

    def _contested(self, name: str, claims: Iterable[EntryPoint]) -> PluginError:
        owners = sorted(f"by {plugin} ({plugin.target})" for plugin in map(_plugin, claims))
        return PluginError(
            f"the {self.noun} {name!r} is claimed more than once: {' and '.join(owners)}",
            hint="uninstall all but one; which of them would win is not left to chance",
        )

    def _import(self, entry: EntryPoint) -> T:
        plugin = _plugin(entry)
        try:
            loaded: object = entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # foreign code: whatever it raises has one owner
            raise PluginError(
                f"the {self.noun} {entry.name!r} of {plugin} failed to import: "
                f"{type(exc).__name__}: {exc}",
                hint=f"repair or uninstall {plugin.distribution}",
            ) from exc
        if not self._check(loaded):
            raise PluginError(
                f"the {self.noun} {entry.name!r} of {plugin} must be {self._expected}, found "
                f"{entry.value} = {loaded!r}",
                hint=f"correct the entry point in the group {self.group!r}",
            )
        return loaded


def _plugin(entry: EntryPoint) -> Plugin:
    owner = entry.dist
    if owner is None:  # an entry point built by hand, never one found on sys.path
        return Plugin(entry.name, entry.value, "(no distribution)", "")
    return Plugin(entry.name, entry.value, owner.name, owner.version)


def _is_backend(found: object) -> TypeGuard[type[Backend]]:
    return isinstance(found, type) and issubclass(found, Backend)


def _is_policy(found: object) -> TypeGuard[type[EvictionPolicy]]:
    return isinstance(found, type) and issubclass(found, EvictionPolicy)


def _is_codec(found: object) -> TypeGuard[type[Codec]]:
    return isinstance(found, type) and issubclass(found, Codec)


def _is_command(found: object) -> TypeGuard[click.Command]:
    import click

    return isinstance(found, click.Command)


def _is_class(found: object) -> TypeGuard[type[object]]:
    return isinstance(found, type)


BACKENDS: Registry[type[Backend]] = Registry(
    "kvlayer.backends",
    noun="backend",
    expected="a subclass of kvlayer.abc.backend.Backend",
    check=_is_backend,
)
"""Storage backends; the name is the URL scheme."""

POLICIES: Registry[type[EvictionPolicy]] = Registry(
    "kvlayer.policies",
    noun="eviction policy",
    expected="a subclass of kvlayer.abc.policy.EvictionPolicy",
    check=_is_policy,
)
"""Eviction policies; the name is the configuration's ``policy``."""

CODECS: Registry[type[Codec]] = Registry(
    "kvlayer.codecs",
    noun="codec",
    expected="a subclass of kvlayer.abc.codec.Codec",
    check=_is_codec,
)
"""Codecs without loss; the name is the configuration's ``codec`` of a tier."""

COMMANDS: Registry[click.Command] = Registry(
    "kvlayer.commands", noun="command", expected="a click command", check=_is_command
)
"""Commands of the ``kvlayer`` program."""

ADAPTERS: Registry[type[object]] = Registry(
    "kvlayer.adapters", noun="engine adapter", expected="a class", check=_is_class
)
"""Engine adapters; the name is the engine's. What they have in common is their engine's to say."""


def open_backend(url: str | BackendURL, *, backends: Registry[type[Backend]] = BACKENDS) -> Backend:
    """Build the backend a URL names. It is not open yet: no file and no network was touched.

    Raises ``ConfigError`` for a bad URL or option, ``UnknownSchemeError`` for a scheme nobody
    offers and ``PluginError`` for a plugin that cannot be used.
    """
    parsed = BackendURL.parse(url) if isinstance(url, str) else url
    cls = backends.load(parsed.scheme)
    try:
        return cls.from_url(parsed)
    except KVLayerError as exc:
        said = parsed.masked(str(exc))
        if (said, exc.hint) == (str(exc), parsed.masked(exc.hint or "") or None):
            raise
        raise ConfigError(said, hint=parsed.masked(exc.hint or "")) from None
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # noqa: BLE001  # foreign code: whatever it raises has one owner
        said = parsed.masked(f"{type(exc).__name__}: {exc}")
        raise PluginError(
            f"the backend {parsed.scheme!r} could not be built from {parsed}: {said}",
            hint="correct the URL, or repair the plugin: it should raise ConfigError",
        ) from None


def make_codec(name: str, *, codecs: Registry[type[Codec]] = CODECS) -> Codec:
    """The codec of a name, to be called from any thread.

    Raises ``UnknownSchemeError`` for a name nobody offers and ``PluginError`` for a plugin that
    cannot be used.
    """
    cls = codecs.load(name)
    try:
        codec = cls()
        encoding = str(Encoding(RAW.frame, codec.name))
        if Encoding.parse(encoding) == RAW:
            raise ValueError("its own name is 'raw', which means no codec")
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # noqa: BLE001  # foreign code: whatever it raises has one owner
        raise PluginError(
            f"the codec {name!r} could not be made: {type(exc).__name__}: {exc}",
            hint="repair or replace the plugin: it takes no arguments, and has a name of its own",
        ) from None
    return codec
