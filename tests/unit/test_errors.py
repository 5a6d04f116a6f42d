"""One base for every error, a hint that reaches the reader, builtin bases that mean something."""

from __future__ import annotations

import traceback

import pytest

from kvlayer import errors
from kvlayer.errors import BackendError, KVLayerError

OURS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_every_error_has_the_one_base(cls):
    assert issubclass(cls, KVLayerError)
    assert cls.__name__.endswith("Error")
    assert cls.__doc__


def test_every_public_exception_of_the_module_is_exported():
    found = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert found == set(errors.__all__)


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_a_hint_is_an_attribute_and_is_shown_in_a_traceback(cls):
    error = cls("the disk is full", hint="free some room")
    assert error.hint == "free some room"
    assert "the disk is full" in str(error)
    assert "hint: free some room" in "".join(traceback.format_exception(error))


def test_without_a_hint_nothing_is_added():
    error = KVLayerError("the disk is full")
    assert error.hint is None
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("LayoutError", ValueError),
        ("TokensError", TypeError),
        ("UnknownSchemeError", LookupError),
        ("ClosedError", RuntimeError),
        ("ForkedError", RuntimeError),
        ("BackendUnavailableError", ConnectionError),
        ("BackendTimeoutError", TimeoutError),
    ],
)
def test_code_that_knows_only_builtin_exceptions_still_catches_ours(name, builtin):
    assert issubclass(getattr(errors, name), builtin)


def test_only_backend_errors_that_may_pass_are_transient():
    transient = {cls.__name__ for cls in OURS if issubclass(cls, BackendError) and cls.transient}
    assert transient == {"BackendUnavailableError", "BackendTimeoutError"}
