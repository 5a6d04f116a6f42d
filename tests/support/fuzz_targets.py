"""Every parser of bytes from outside, as a function of bytes that a fuzzer may call for ever.

A target parses its input and returns whether it was accepted. It lets through only what is wrong
with the parser: an exception that the parser does not document, or a value that does not come back
when it is written out and parsed again. :func:`examine` adds that memory and time stay bounded.
"""

from __future__ import annotations

import difflib  # noqa: F401  # what parsers import when they need it must not count as theirs
import json
import signal
import tempfile
import tracemalloc
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

from xxhash import xxh3_64_intdigest

from kvlayer._pack import pack, unpack
from kvlayer.codec.frame import (
    HEADER_NBYTES,
    MAGIC,
    VERSION,
    FrameError,
)
from kvlayer.config.local_directory import local_directory
from kvlayer.config.model import CacheConfig
from kvlayer.config.source import load_config
from kvlayer.doctor.cgroup import cpu_quota, memory_limit
from kvlayer.doctor.machine import Machine
from kvlayer.doctor.memory import commit, group_memory, locking, machine_memory
from kvlayer.doctor.system import cpus
from kvlayer.errors import ConfigError, IdentityError, MessageError
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.identity.namespace import Namespace
from kvlayer.identity.weights_cache import DigestCache, _line
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.tier.messages import Completion, Greeting, Task
from kvlayer.tier.transfer.coding import encode, verify, write_scratch
from kvlayer.urls import BackendURL, format_bytes, parse_bytes
from kvlayer_backends.cpu import CpuOptions
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.paths import Paths, Shard

__all__ = ["CPU_SECONDS", "TARGETS", "HangError", "Target", "UnboundedError", "examine"]

CPU_SECONDS = 5.0
"""What one input of a few KiB may take at the very most; they take about a hundred microseconds."""

_MIB = 1 << 20


class HangError(AssertionError):
    """A parser computed for longer than any input of its size is worth."""


class UnboundedError(AssertionError):
    """A parser allocated out of proportion to its input."""


@dataclass(frozen=True, slots=True)
class Target:
    """``parse`` one input. At its peak it may allocate ``nbytes`` and ``per_byte`` of input."""

    parse: Callable[[bytes], bool]
    nbytes: int = 4 * _MIB
    per_byte: int = 512
    max_len: int = 4096


def examine(target: Target, given: bytes) -> bool:
    """Parse ``given`` within bounds; whether it was accepted. ``tracemalloc`` must be tracing.

    Raises ``HangError``, ``UnboundedError`` or whatever the target lets through.
    """
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        accepted = target.parse(given)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    _, peak = tracemalloc.get_traced_memory()
    allowed = target.nbytes + target.per_byte * len(given)
    if peak - before > allowed:
        raise UnboundedError(f"{peak - before} bytes for an input of {len(given)}, not {allowed}")
    return accepted


def _hang(*_: object) -> None:
    raise HangError(f"still parsing after {CPU_SECONDS} CPU seconds")


signal.signal(signal.SIGVTALRM, _hang)


# -- objects -------------------------------------------------------------------------------------

_GROUP = KVGroup(AttentionKind.MHA, (0, 1, 2), "float16", 2, 8)
_PAYLOAD = Payload.of(_GROUP, Part(0, (0, 3), (0, 2)), 16)
_KEY = ObjectKey.of("ab" * 32, "0", bytes(range(32)), 16, _PAYLOAD.part)
_FIRST = 32
_BODY_AT = 24


def _written() -> tuple[bytes, bytes]:
    body = bytes(range(256)) * (_PAYLOAD.nbytes // 256)
    stored = b"".join(
        encode(
            _KEY,
            _PAYLOAD,
            (memoryview(body),),
            memoryview(bytearray(write_scratch(_PAYLOAD, copies=False))),
            copies=False,
            first_token=_FIRST,
            created=1.5,
            build="test",
        )
    )
    return stored[:HEADER_NBYTES], stored[HEADER_NBYTES:]


_HEADER, _BODY = _written()


def frame(given: bytes) -> bool:
    """The first byte says what is damaged: the file, the header's map (with a checksum that fits,
    or nothing behind it would be reached), or bits of an object that was whole."""
    if not given:
        return False
    kind, rest = given[0] % 3, given[1:]
    header, body, filled = bytearray(_HEADER), bytearray(_BODY), HEADER_NBYTES + len(_BODY)
    if kind == 0:
        file = rest[: HEADER_NBYTES + len(body)]
        header[: len(file)], filled = file[:HEADER_NBYTES], len(file)
        body[: max(len(file) - HEADER_NBYTES, 0)] = file[HEADER_NBYTES:]
        header[HEADER_NBYTES:] = b""
    elif kind == 1:
        packed = rest[: HEADER_NBYTES - _BODY_AT]
        header[:8], header[8:10] = MAGIC, VERSION.to_bytes(2, "little")
        header[12:16] = len(packed).to_bytes(4, "little")
        header[16:24] = xxh3_64_intdigest(header[:16] + packed).to_bytes(8, "little")
        header[_BODY_AT : _BODY_AT + len(packed)] = packed
    else:
        for at in range(0, len(rest) - 2, 3):
            place = int.from_bytes(rest[at : at + 2], "little") % (filled)
            (header if place < HEADER_NBYTES else body)[place % HEADER_NBYTES] ^= rest[at + 2]
    refused: FrameError | None = None
    try:
        verify(
            _KEY,
            _PAYLOAD,
            memoryview(header),
            (memoryview(body),),
            filled,
            first_token=_FIRST,
        )
    except FrameError as exc:
        refused = exc
    if refused is not None:
        assert refused.cause.is_damage or refused.cause is Cause.FOREIGN_VERSION
        return False
    for segment in _PAYLOAD.segments():
        span = slice(segment.offset, segment.offset + segment.nbytes)
        told = kind == 1 or body[span] == _BODY[span]  # a map may bring its own checksums
        assert told, "other bytes passed for the object"
    return True


def _packed(given: bytes) -> bytes:
    """Bytes as they are, or JSON packed: what is flipped in text is still msgpack afterwards.

    ``{"u64": [1, 2]}`` are the bytes of a table of such numbers.
    """
    if given[:1] in (b"[", b"{"):
        with suppress(ValueError, TypeError, OverflowError, RecursionError):
            return pack(json.loads(given, object_hook=_table))
    return given


def _table(found: dict[str, Any]) -> Any:
    return array("Q", found["u64"]).tobytes() if found.keys() == {"u64"} else found


def namespace(given: bytes) -> bool:
    given = _packed(given)
    try:
        found = Namespace.from_canonical(given)
    except IdentityError:
        return False
    assert found.canonical() == given
    assert found.digest == sha256(given).hexdigest()
    assert Namespace.from_canonical(found.canonical()) == found
    assert not found.differences(found)
    return True


def messages(given: bytes) -> bool:
    given = _packed(given)
    accepted = False
    for kind in (Greeting, Task, Completion):
        try:
            found = kind.from_bytes(given)
        except MessageError:
            continue
        assert not accepted, "a message is of one kind"
        accepted = True
        _check_counts(found)
        again = kind.from_bytes(found.to_bytes())
        assert again == found
        assert unpack(again.to_bytes()) == unpack(found.to_bytes())
    return accepted


def _check_counts(found: Greeting | Task | Completion) -> None:
    """Numbers are counts: they are compared with sizes and used as offsets afterwards."""
    numbers: list[object] = []
    match found:
        case Greeting():
            numbers += found.slab
        case Task():
            numbers += [found.number, found.rank, found.start, found.stop]
            numbers += [number for slot in found.slots for number in slot[1:]]
        case Completion():
            numbers += [found.number, found.rank, found.asked, *(e.place for e in found.missed)]
    assert all(type(number) is int and number >= 0 for number in numbers)


# -- names ---------------------------------------------------------------------------------------

_PATHS = Paths("/root")


def names(given: bytes) -> bool:
    """A key, and (after the first NUL) the name of a file as a directory may hold it."""
    text = given.decode("utf-8", "surrogateescape")
    first, _, name = text.partition("\0")
    accepted = False
    with suppress(ValueError):
        key = ObjectKey.parse(first)
        assert str(key.part) == first.rsplit("/", 1)[1]
        assert ObjectKey.of(key.namespace, key.zone, key.end_hash, key.tokens, key.part) == first
        accepted = _as_file(ObjectName.raw(key))
    with suppress(ValueError):
        named = ObjectName.parse(first)
        assert ObjectName.made(named.key, named.encoding) == first
        accepted = _as_file(named)
    with suppress(ValueError):
        path = _PATHS.object(first)  # checks less than ``parse``: never out of its shard
        folder, _, file = path.rpartition("/")
        assert (
            folder.startswith(f"{_PATHS.folder}/")
            and folder.count("/") == _PATHS.folder.count("/") + 2
        )
        assert file not in ("", ".", "..") and "\0" not in path
    for shard in (Shard(first[:64], first[64:66]), Shard(first[:64], first[64:96])):
        if not (_PATHS.is_namespace(shard.namespace) and _PATHS.is_shard(shard.folder)):
            continue
        found = _PATHS.key(shard, name)
        if found is not None:
            assert _PATHS.object(found) == f"{_PATHS.shard(shard)}/{name}"
            assert _PATHS.text(shard, name) == found
            accepted = True
    return accepted


def _as_file(key: ObjectName) -> bool:
    path = _PATHS.object(key)
    folder, _, name = path.rpartition("/")
    assert len(name) <= 255 or len(str(key.part)) > 100
    assert folder == _PATHS.shard(Shard.of(key))
    assert _PATHS.key(Shard.of(key), name) == key
    return True


def shown_options(text: str) -> dict[str, str]:
    """The options of a URL's text, as written."""
    query = text.partition("?")[2]
    pairs = (pair.partition("=") for pair in query.split("&") if query)
    return {name: value for name, _, value in pairs}


def urls(given: bytes) -> bool:
    text = given.decode("utf-8", "surrogateescape")
    with suppress(ConfigError):
        nbytes = parse_bytes(text)
        assert nbytes >= 0 and format_bytes(nbytes)
    try:
        url = BackendURL.parse(text)
    except ConfigError:
        return False
    assert url.text == text
    again = BackendURL.parse(text)
    assert (again, again.options) == (url, url.options)
    assert shown_options(str(url)) == dict.fromkeys(shown_options(text), "***")
    assert not {"@", "#"} & {*url.host} and "#" not in text and "\0" not in url.path
    for options in (CpuOptions, FileOptions):
        with suppress(ConfigError):
            url.into(options)
    with suppress(ConfigError):
        assert local_directory(url).startswith("/")
    return True


# -- configuration -------------------------------------------------------------------------------

_FOLDER = Path(tempfile.mkdtemp(prefix="kvlayer-fuzz-", dir="/dev/shm"))
_NOT_FIELDS = ("path", "env")


def config(given: bytes) -> bool:
    """The first byte says which source the rest is: a file, the environment, or code."""
    if not given:
        return False
    kind, rest = given[0] % 3, given[1:]
    path, env, code = None, dict[str, str](), dict[str, Any]()
    if kind == 0:
        path = _FOLDER / "kvlayer.toml"
        path.write_bytes(rest)
    elif kind == 1:
        for line in rest.decode("utf-8", "surrogateescape").split("\n"):
            name, _, value = line.partition("=")
            env[f"KVLAYER_{name}"] = value
        env.pop("KVLAYER_CONFIG", None)
    else:
        try:
            tree = json.loads(rest)
        except (ValueError, RecursionError):
            return False
        if not isinstance(tree, dict):
            return False
        code = {name: value for name, value in tree.items() if name not in _NOT_FIELDS}
    try:
        loaded = load_config(path, env=env, **code)
    except ConfigError:
        return False
    found = loaded.config
    urls = {f"tiers.{index}.url": tier.url for index, tier in enumerate(found.tiers)}
    _comes_back(found, loaded.values() | urls)  # what is shown is masked
    assert loaded.origins.keys() == loaded.values().keys()
    return True


def _comes_back(found: CacheConfig, values: Mapping[str, object]) -> None:
    fields = ("model", "tiers", "policy", "tokens_per_chunk", "tokens_per_tail")
    same = load_config(env={}, **{name: getattr(found, name) for name in fields}).config
    assert all(getattr(same, name) == getattr(found, name) for name in fields)
    if found.model.overrides:  # their names may hold what a variable's name cannot
        return
    env = {
        f"KVLAYER_{key.replace('.', '__').upper()}": str(value).lower()
        if isinstance(value, bool)
        else str(value)
        for key, value in values.items()
    }
    assert load_config(env=env).config == found


def weights_cache(given: bytes) -> bool:
    (_FOLDER / "weights.sha256").write_bytes(given)
    found = DigestCache(_FOLDER)._load()
    rows = (line.rpartition(" ") for line in given.decode("ascii", "replace").splitlines())
    whole = [body for body, _, check in rows if check == f"{crc32(body.encode()):08x}"]
    assert {" ".join(digests) for digests in found.values()} <= {body[-129:] for body in whole}
    lines = (_line(key, *digests) for key, digests in found.items())
    (_FOLDER / "weights.sha256").write_text("".join(lines))
    assert DigestCache(_FOLDER)._load() == found
    return bool(found)


# -- what a system says of itself ----------------------------------------------------------------

_SYSTEM = (
    "proc/self/cgroup",
    "proc/self/mountinfo",
    "proc/meminfo",
    "proc/self/limits",
    "proc/self/status",
    "proc/sys/vm/overcommit_memory",
    "group/memory.max",
    "group/memory.current",
    "group/memory.stat",
    "group/cpu.max",
)
for _name in _SYSTEM:
    (_FOLDER / _name).parent.mkdir(parents=True, exist_ok=True)


def doctor(given: bytes) -> bool:
    """Files of ``/proc`` and of a control group, one after the other, between form feeds."""
    texts = given.split(b"\f")
    for name, text in zip(_SYSTEM, texts + [b""] * len(_SYSTEM), strict=False):
        (_FOLDER / name).write_bytes(text)
    machine = Machine(_FOLDER)
    found = [
        group_memory(machine, 1 << 30),
        machine_memory(machine, 1 << 30),
        commit(machine, 1 << 30),
        locking(machine),
        cpus(machine),
    ]
    assert all(finding.found for finding in found)
    limit, quota = memory_limit(machine), cpu_quota(machine)
    assert limit is None or limit.free_nbytes >= 0
    assert quota is None or quota >= 0
    for mount in machine.mounts():
        machine.mount_of(mount.point)
    return limit is not None or quota is not None


# A list's header of three bytes makes msgpack allocate 8 KiB, and 1,024 of them may be nested.
_NESTED = 16 * _MIB

TARGETS: Mapping[str, Target] = {
    "config": Target(config),
    "doctor": Target(doctor),
    "frame": Target(frame, nbytes=_NESTED, max_len=2 * HEADER_NBYTES),
    "messages": Target(messages, nbytes=_NESTED),
    "names": Target(names, max_len=512),
    "namespace": Target(namespace, nbytes=_NESTED),
    "urls": Target(urls, max_len=1024),
    "weights_cache": Target(weights_cache),
}
