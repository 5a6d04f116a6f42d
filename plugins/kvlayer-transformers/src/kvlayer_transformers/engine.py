"""The one file through which the adapter reaches transformers, and the versions it was tested with.

transformers' own types change between releases and are partly unknown to type checkers, so its
names are handed on untyped; what the adapter makes of them is typed where it is used.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import safetensors
import transformers
from transformers import cache_utils, masking_utils, modeling_utils

from kvlayer.errors import IdentityError, UnsupportedError

__all__ = [
    "ATTENTION",
    "CACHES",
    "MASKS",
    "TESTED",
    "VERSION",
    "AutoConfig",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationConfig",
    "Model",
    "Past",
    "check_version",
    "has_adapter",
    "open_tensors",
    "quiet",
]

Model: TypeAlias = Any
"""A ``transformers.PreTrainedModel`` that generates."""

Past: TypeAlias = Any
"""A ``transformers.DynamicCache`` of plain ``DynamicLayer``: every key and value of every layer."""

VERSION: Final[str] = transformers.__version__
TESTED: Final = ((5, 16), (5, 23))
"""First and last minor version the tests have passed with."""

AutoConfig: Final[Any] = transformers.AutoConfig
DynamicCache: Final[Any] = transformers.DynamicCache
GenerationConfig: Final[Any] = transformers.GenerationConfig
DynamicLayer: Final[Any] = cache_utils.DynamicLayer
DynamicSlidingWindowLayer: Final[Any] = cache_utils.DynamicSlidingWindowLayer

CACHES: Final[tuple[Any, ...]] = (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer)
ATTENTION: Final[Any] = modeling_utils.ALL_ATTENTION_FUNCTIONS
"""Ways to compute attention by their names in a configuration."""
MASKS: Final[Any] = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS


def check_version(version: str = VERSION) -> None:
    """Raise ``UnsupportedError`` outside the tested range.

    How a past is kept and masked has changed between minor versions without an error to show for
    it; wrong KV would look like a worse model.
    """
    major, minor, *_ = version.split(".")
    first, last = TESTED
    if not (major.isdigit() and minor.isdigit() and first <= (int(major), int(minor)) <= last):
        tested = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
        raise UnsupportedError(
            f"transformers {version} is outside the tested range, {tested}",
            hint="install a tested version, or a newer kvlayer-transformers",
        )


def open_tensors(path: Path) -> Any:
    """A ``safetensors`` file as a context: ``keys()``, and ``get_tensor(name)``, which is mapped.

    Raises ``IdentityError`` for a file that cannot be read.
    """
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as exc:
        raise IdentityError(
            f"the weights file {path.name} cannot be read: {exc}",
            hint="download it again, or pass weights= as a digest",
        ) from exc


def has_adapter(model: Model) -> bool:
    """Whether a PEFT adapter (LoRA) is loaded into the model or wrapped around it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"))


@contextmanager
def quiet() -> Generator[None]:
    """Without what transformers logs of models and calls that are ours, not the user's."""
    logging: Any = transformers.logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
