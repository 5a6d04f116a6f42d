"""What the configuration asks of the machine: host memory, and places on disks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvlayer.abc.backend import Backend, Capability
from kvlayer.abc.host import HostMemory
from kvlayer.config.local_directory import local_directory
from kvlayer.config.model import CacheConfig
from kvlayer.config.registry import POLICIES, make_codec, open_backend
from kvlayer.config.source import LoadedConfig, load_config
from kvlayer.doctor.finding import Check, Finding
from kvlayer.errors import ConfigError, KVLayerError
from kvlayer.urls import BackendURL, parse_bool, parse_bytes, shown_text, shown_url

__all__ = ["Configured", "Place", "configured"]

_CHECK = Check("configuration", "a cache that cannot be built as configured does not open")


@dataclass(frozen=True, slots=True)
class Place:
    """A directory objects are to lie in."""

    path: str
    capacity: int | None = None
    """Bytes it may hold; 0: no limit; None: nobody said."""
    threads: int = 8
    direct: str = "auto"
    readonly: bool = False

    @classmethod
    def of(cls, url: BackendURL) -> Place:
        """The place of a ``file://`` URL its backend has accepted."""
        said = url.options
        return cls(
            local_directory(url),
            capacity=parse_bytes(said.get("capacity", "0")),
            threads=int(said.get("threads", "8")),
            direct=said.get("direct", "auto"),
            readonly=parse_bool(said.get("readonly", "false")),
        )


@dataclass(frozen=True, slots=True)
class Configured:
    """What the checks need to know of a configuration."""

    host_nbytes: int
    """Bytes of host memory, in all cpu:// tiers."""
    places: tuple[Place, ...]
    tokens_per_chunk: int
    findings: tuple[Finding, ...]


def configured(path: Path | None) -> Configured:
    """Read the configuration as a cache would. A wrong one is a finding, and the default is used.

    No tier is opened: neither memory nor a disk is touched.
    """
    findings: list[Finding] = []
    try:
        loaded = load_config(path)
    except ConfigError as exc:
        findings.append(_CHECK.bad(str(exc), exc.hint or "correct it"))
        loaded = LoadedConfig(CacheConfig(), {})
    accepted: list[tuple[BackendURL, Backend]] = []
    for index, tier in enumerate(loaded.config.tiers):
        try:
            accepted.append((BackendURL.parse(tier.url), open_backend(tier.url)))
        except KVLayerError as exc:
            findings.append(_CHECK.bad(f"tier {index}: {exc}", exc.hint or "correct its URL"))
    findings += _complaints(loaded.config, [backend for _, backend in accepted])
    if not findings:
        findings.append(_fine(loaded))
    host = [backend for _, backend in accepted if isinstance(backend, HostMemory)]
    return Configured(
        host_nbytes=sum(getattr(backend, "capacity_nbytes", 0) for backend in host),
        places=tuple(Place.of(url) for url, _ in accepted if url.scheme == "file"),
        tokens_per_chunk=loaded.config.tokens_per_chunk,
        findings=tuple(findings),
    )


def _fine(loaded: LoadedConfig) -> Finding:
    tiers = [shown_url(tier.url) for tier in loaded.config.tiers]
    origins = sorted({origin for origin in loaded.origins.values() if origin != "default"})
    return _CHECK.ok(
        f"tiers {', '.join(tiers)}, from {', '.join(origins) or 'the defaults'}",
        tiers=tiers,
        origins=origins,
    )


def _complaints(config: CacheConfig, backends: list[Backend]) -> list[Finding]:
    """What ``Cache.open`` would refuse, found without opening."""
    found: list[Finding] = []
    if backends and not isinstance(backends[0], HostMemory):
        found.append(
            _CHECK.bad(
                f"the first tier is {shown_url(config.tiers[0].url)}, not host memory",
                'start the list with url = "cpu://?capacity=8GiB"',
            )
        )
    try:
        POLICIES.load(config.policy)
    except KVLayerError as exc:
        found.append(_CHECK.bad(str(exc), exc.hint or "name an installed policy"))
    for tier in config.tiers:
        try:
            _ = tier.codec and make_codec(tier.codec)
        except KVLayerError as exc:
            found.append(_CHECK.bad(str(exc), exc.hint or "name an installed codec"))
    weights = config.model.weights
    home = os.path.expanduser(weights)  # noqa: PTH111  # raises nothing, whoever "~nobody" is
    if weights and not weights.startswith("sha256:") and not Path(home).exists():
        found.append(
            _CHECK.bad(
                f"model.weights names {shown_text(weights)}, which does not exist",
                "name the model's folder or file, or give its digest as sha256:<64 hex digits>",
            )
        )
    beyond = {Capability.PERSISTENT, Capability.SHARED}
    if not weights and any(backend.capabilities & beyond for backend in backends):
        found.append(
            _CHECK.warn(
                "model.weights is empty, and a tier outlives or is shared beyond the process",
                "set model.weights; an engine adapter may name the model instead",
            )
        )
    return found
