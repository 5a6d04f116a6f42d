"""Golden vectors: names that stored KV already carries, and that no later release may change.

Each vector is recomputed twice: by the product, and by the straight-line code below, which shares
nothing with it (not even msgpack). A vector that must change means a new ``KEY_SCHEMA``.

Add cases to ``CHAINS``, ``KEYS`` or ``NAMESPACES`` and run ``python tests/unit/test_golden.py
--write``: it adds the new ones and refuses to change what is written.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kvlayer.identity.keys import ChunkChain, Content, ObjectKey, Part, Salt, Scope
from kvlayer.identity.namespace import KEY_SCHEMA, Namespace
from kvlayer.layout import AttentionKind, HitRule, KVGroup

GOLDEN = Path(__file__).parent.parent / "golden" / "keys.json"

A, B = "aa" * 32, "0b" * 32
IMAGE = sha256(b"an image").hexdigest()


def _chain(name: str, tokens: list[int], chunk: int, tail: int, **scope: Any) -> dict[str, Any]:
    return {"name": name, "tokens": tokens, "chunk": chunk, "tail": tail, "scope": scope}


# A scope: adapter (hex), contents [[digest in hex, first token]], salts [[value, first token]].
CHAINS = [
    _chain("plain", [*range(20)], 8, 1),
    _chain("plain, pages of one token", [7, 0, 2**30 - 1], 1, 1),
    _chain("plain, real ids in pages of 2", [128000 + 37 * i for i in range(50)], 16, 2),
    _chain("plain, real ids in pages of 16", [128000 + 37 * i for i in range(50)], 16, 16),
    _chain("plain, pages of 16, four a chunk", [128000 + 37 * i for i in range(150)], 64, 16),
    _chain("empty prompt", [], 8, 1),
    _chain("shorter than a tail", [1, 2, 3], 16, 4),
    _chain("shorter than a chunk", [*range(100, 111)], 16, 2),
    _chain("one whole chunk", [*range(16)], 16, 2),
    _chain("adapter", [*range(20)], 8, 1, adapter=A),
    _chain("content at the start", [*range(20)], 8, 1, contents=[[IMAGE, 0]]),
    _chain("content inside a chunk", [*range(20)], 8, 1, contents=[[IMAGE, 11]]),
    _chain("content in the tail", [*range(20)], 8, 1, contents=[[IMAGE, 18]]),
    _chain("content beyond the end", [*range(20)], 8, 1, contents=[[IMAGE, 20]]),
    _chain("two contents in a chunk", [*range(20)], 8, 1, contents=[[B, 12], [IMAGE, 9]]),
    _chain("two contents at one token", [*range(20)], 8, 1, contents=[[B, 9], [A, 9]]),
    _chain("salt from the start", [*range(20)], 8, 1, salts=[["tenant-7", 0]]),
    _chain("salt at a chunk's start", [*range(20)], 8, 1, salts=[["tenant-7", 8]]),
    _chain("salt inside a chunk", [*range(20)], 8, 1, salts=[["tenant-7", 13]]),
    _chain("salt at a chunk's last token", [*range(20)], 8, 1, salts=[["tenant-7", 15]]),
    _chain("salt of several bytes a letter", [*range(20)], 8, 1, salts=[["mieter-ü-借", 0]]),
    _chain("salt in salt", [*range(30)], 8, 1, salts=[["tenant-7", 0], ["session-1", 17]]),
    _chain("two salts at one token", [*range(20)], 8, 1, salts=[["b", 4], ["a", 4]]),
    _chain("salts listed backwards", [*range(20)], 8, 1, salts=[["late", 9], ["early", 2]]),
    _chain(
        "a mixture",
        [*range(1000, 1040)],
        8,
        2,
        adapter=B,
        contents=[[IMAGE, 3], [A, 30], [B, 30]],
        salts=[["tenant-7", 3], ["session-1", 30]],
    ),
    _chain(
        "a mixture at the start", [*range(20)], 8, 1,
        adapter=A, contents=[[IMAGE, 0]], salts=[["tenant-7", 0]],
    ),
]  # fmt: skip

KEYS: list[dict[str, Any]] = [
    {"group": 0, "layers": [0, 30], "heads": [0, 3], "form": "canonical"},
    {"group": 1, "layers": [8, 16], "heads": None, "form": "canonical"},
    {"group": 12, "layers": [0, 1], "heads": [7, 8], "form": "native:vllm-cpu_amx:b32"},
]

_LLAMA = {"rope_type": "llama3", "theta": 500000.0, "factor": 8, "scaled": True, "extra": None}
_MHA: dict[str, Any] = {
    "kind": "mha", "layers": [0, 1, 2], "dtype": "bfloat16", "num_kv_heads": 3, "head_size": 64,
    "v_head_size": None, "hit_rule": "every-chunk", "window_tokens": None, "rope": {},
    "state_nbytes": 0,
}  # fmt: skip
_MLA = _MHA | {"kind": "mla", "num_kv_heads": 1, "head_size": 576, "layers": [*range(200, 261)]}
_SWA = _MHA | {"hit_rule": "trailing", "window_tokens": 1024, "layers": [3, 4], "rope": _LLAMA}
_STATE = _MHA | {
    "kind": "state", "num_kv_heads": 1, "head_size": 0, "dtype": "float32", "layers": [5],
    "hit_rule": "trailing", "window_tokens": 1, "state_nbytes": 5_242_880,
}  # fmt: skip


def _space(name: str, *groups: dict[str, Any], **changed: Any) -> dict[str, Any]:
    fields = {
        "weights": f"sha256:{A}", "compute_dtype": "bfloat16", "tokens_per_chunk": 256,
        "tokens_per_tail": 32, "adapters": [], "overrides": {}, "kv_scales": "", "quality": "exact",
        "hash_scheme": "links", "numerics": "portable",
    }  # fmt: skip
    return {"name": name, "fields": fields | {"groups": list(groups)} | changed}


NAMESPACES = [
    _space("one group", _MHA),
    _space("v narrower than k", _MHA | {"v_head_size": 32, "dtype": "fp8_e4m3"}, kv_scales="v1"),
    _space("hybrid", _MHA, _SWA, _STATE, compute_dtype="float32"),
    _space("mla", _MLA | {"rope": _LLAMA}, numerics="engine:vllm-0.32.0+cpu"),
    _space(
        "overrides of every kind",
        _MHA,
        overrides={
            "z": None,
            "quantization": "fp8",
            "a": 1,
            "b": 1.0,
            "c": True,
            "d": -300,
            "ü": "",
        },
    ),
    _space("folded adapters", _MHA, adapters=[f"sha256:{B}", f"sha256:{A}"], quality="int8"),
    _space(
        "rows with their scales",
        _MHA | {"dtype": "int8", "head_size": 132, "quantisation": "fp8_per_token_head"},
    ),
    _space("private", _MHA, weights=f"process:{'5e' * 16}", tokens_per_chunk=16, tokens_per_tail=2),
]


# ---- The rule, straight down, from the standard library alone. ----


def msgpack_by_hand(value: Any) -> bytes:  # noqa: PLR0911  one line per type is the point
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, int):
        if -32 <= value < 0:
            return struct.pack(">b", value)
        if 0 <= value < 128:
            return struct.pack(">B", value)
        forms = [(0xCC, "B", 0, 2**8), (0xCD, "H", 0, 2**16), (0xCE, "I", 0, 2**32)]
        if value < 0:
            forms = [(0xD0, "b", -(2**7), 0), (0xD1, "h", -(2**15), 0), (0xD2, "i", -(2**31), 0)]
        return next(
            bytes([m]) + struct.pack(f">{f}", value) for m, f, a, b in forms if a <= value < b
        )
    if isinstance(value, bytes):
        return b"\xc4" + bytes([len(value)]) + value
    if isinstance(value, str):
        raw = value.encode()
        head = bytes([0xA0 | len(raw)]) if len(raw) < 32 else b"\xd9" + bytes([len(raw)])
        return head + raw
    if isinstance(value, list):
        head = (
            bytes([0x90 | len(value)])
            if len(value) < 16
            else b"\xdc" + struct.pack(">H", len(value))
        )
        return head + b"".join(map(msgpack_by_hand, value))
    assert isinstance(value, dict)
    assert len(value) < 16
    body = b"".join(msgpack_by_hand(k) + msgpack_by_hand(value[k]) for k in sorted(value))
    return bytes([0x80 | len(value)]) + body


def sglang_page_hash(tokens: list[int], prior: bytes) -> bytes:
    """SGLang's ``get_hash_str``: the parent's hash, then each token in four bytes."""
    hasher = sha256(prior)
    for token in tokens:
        hasher.update(token.to_bytes(4, "little", signed=False))
    return hasher.digest()


def fold(parent: bytes, fields: bytes) -> bytes:
    preimage = b"kvlayer: a fold of extras, v2..." + bytes([len(parent)]) + parent
    preimage += struct.pack("<Q", len(fields)) + fields
    while len(preimage) % 4 != 1:
        preimage += b"\0"
    return sha256(preimage).digest()


def expected_links(case: dict[str, Any]) -> dict[int, bytes]:
    """By where it ends."""
    tokens, scope = case["tokens"], case["scope"]
    extras = [(1, 0, bytes.fromhex(scope["adapter"]))] if "adapter" in scope else []
    extras += sorted((2, at, bytes.fromhex(d)) for d, at in scope.get("contents", []))
    salts = sorted(scope.get("salts", []), key=lambda salt: salt[1])
    extras += [(3, at, value.encode()) for value, at in salts]

    links, parent = {0: b""}, b""
    for start in range(0, len(tokens) - case["tail"] + 1, case["tail"]):
        stop = start + case["tail"]
        starting = [extra for extra in extras if start <= extra[1] < stop]
        fields = b"".join(
            struct.pack("<BIQ", kind, at - start, len(raw)) + raw for kind, at, raw in starting
        )
        parent = sglang_page_hash(tokens[start:stop], fold(parent, fields) if fields else parent)
        links[stop] = parent
    return links


def expected_chain(case: dict[str, Any]) -> dict[str, Any]:
    tokens, chunk, scope = case["tokens"], case["chunk"], case["scope"]
    links = expected_links(case)

    def zone(stop: int) -> str:
        owner = "0"
        for value, at in sorted(scope.get("salts", []), key=lambda salt: salt[1]):
            if at < stop:
                owner = sha256(b"zone" + value.encode()).hexdigest()[:32]
        return owner

    spans, tails = [], []
    for start in range(0, len(tokens) + 1, chunk):
        for stop in range(start + chunk, start, -1):
            if stop in links:
                found = spans if stop == start + chunk else tails
                found.append([start, stop, links[stop].hex(), zone(stop)])
    return {"chunks": spans, "tails": tails}


def expected_key(part: dict[str, Any]) -> dict[str, Any]:
    text = f"g{part['group']}.l{part['layers'][0]}-{part['layers'][1]}"
    if part["heads"] is not None:
        text += f".h{part['heads'][0]}-{part['heads'][1]}"
    text += f".{part['form']}"
    return {
        "part": text,
        "public": f"{A}/0/{B}-256/{text}",
        "salted": f"{A}/{'5e' * 16}/{B}-32/{text}",
    }


def expected_namespace(case: dict[str, Any]) -> dict[str, Any]:
    groups = [
        group | {"v_head_size": group["v_head_size"] or group["head_size"]}
        for group in case["fields"]["groups"]
    ]
    canonical = msgpack_by_hand(case["fields"] | {"groups": groups, "schema": 2})
    return {"canonical": canonical.hex(), "digest": sha256(canonical).hexdigest()}


def expected_vectors() -> dict[str, Any]:
    return {
        "schema": 2,
        "chains": [case | expected_chain(case) for case in CHAINS],
        "keys": [part | expected_key(part) for part in KEYS],
        "namespaces": [case | expected_namespace(case) for case in NAMESPACES],
    }


# ---- The promises. ----


def golden() -> dict[str, Any]:
    none: dict[str, Any] = {"chains": [], "keys": [], "namespaces": []}
    loaded: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else none
    return loaded


def test_the_written_vectors_are_the_ones_this_file_describes() -> None:
    assert golden() == expected_vectors()
    assert golden()["schema"] == KEY_SCHEMA


@pytest.mark.parametrize("case", golden()["chains"], ids=lambda case: case["name"])
def test_chunks_tails_and_zones_are_named_as_written(case: dict[str, Any]) -> None:
    scope = Scope(
        adapter=bytes.fromhex(case["scope"].get("adapter", "")),
        contents=tuple(
            Content(bytes.fromhex(d), at) for d, at in case["scope"].get("contents", [])
        ),
        salts=tuple(Salt(value, at) for value, at in case["scope"].get("salts", [])),
    )
    chain = ChunkChain(
        array("I", case["tokens"]),
        scope,
        tokens_per_chunk=case["chunk"],
        tokens_per_tail=case["tail"],
    )
    spans = [chain.span(index) for index in range(len(chain))]
    tails = [tail for index in range(len(chain) + 1) for tail in chain.tails(index)]

    assert [[s.start, s.stop, s.hash.hex(), chain.zone(s)] for s in spans] == case["chunks"]
    assert [[s.start, s.stop, s.hash.hex(), chain.zone(s)] for s in tails] == case["tails"]


PLAIN = [case for case in golden()["chains"] if not case["scope"]]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case["name"])
def test_plain_links_are_named_like_sglang_pages(case: dict[str, Any]) -> None:
    chain = ChunkChain(
        case["tokens"], Scope(), tokens_per_chunk=case["chunk"], tokens_per_tail=case["tail"]
    )
    parent, pages, page = b"", [], case["tail"]
    for start in range(0, len(case["tokens"]) - page + 1, page):
        parent = sglang_page_hash(case["tokens"][start : start + page], parent)
        pages.append(parent)

    assert chain.links == pages


@pytest.mark.parametrize("case", golden()["keys"], ids=lambda case: case["part"])
def test_objects_are_stored_under_the_written_keys(case: dict[str, Any]) -> None:
    heads = None if case["heads"] is None else (case["heads"][0], case["heads"][1])
    part = Part(case["group"], (case["layers"][0], case["layers"][1]), heads, case["form"])
    chunk = bytes.fromhex(B)

    assert str(part) == case["part"]
    assert ObjectKey.of(A, "0", chunk, 256, part) == case["public"]
    assert ObjectKey.of(A, "5e" * 16, chunk, 32, part) == case["salted"]
    assert ObjectKey.parse(case["salted"]).part == part


@pytest.mark.parametrize("case", golden()["namespaces"], ids=lambda case: case["name"])
def test_namespaces_have_the_written_digests(case: dict[str, Any]) -> None:
    groups = tuple(
        KVGroup(
            **row
            | {
                "kind": AttentionKind(row["kind"]),
                "hit_rule": HitRule(row["hit_rule"]),
                "layers": tuple(row["layers"]),
            }
        )
        for row in case["fields"]["groups"]
    )
    adapters = tuple(case["fields"]["adapters"])
    namespace = Namespace(**case["fields"] | {"groups": groups, "adapters": adapters})

    assert namespace.canonical().hex() == case["canonical"]
    assert namespace.digest == case["digest"]
    assert Namespace.from_canonical(bytes.fromhex(case["canonical"])) == namespace


def _write() -> str:
    """Add the vectors that are new. Exits with an error when a written one would change."""
    new = expected_vectors()
    old = golden()
    if old.get("schema") != new["schema"]:
        old = {"chains": [], "keys": [], "namespaces": []}
    for kind in ("chains", "keys", "namespaces"):
        lost = [vector for vector in old[kind] if vector not in new[kind]]
        if lost:
            name = lost[0].get("name", lost[0].get("part"))
            sys.exit(f"{kind}: {name!r} would change. Stored KV carries it: raise KEY_SCHEMA.")
    rows = {
        kind: ",\n  ".join(json.dumps(v, ensure_ascii=False) for v in new[kind])
        for kind in ("chains", "keys", "namespaces")
    }
    body = ",\n".join(f' "{kind}": [\n  {text}\n ]' for kind, text in rows.items())
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(f'{{\n "schema": {new["schema"]},\n{body}\n}}\n', encoding="utf-8")
    return f"{GOLDEN}: {sum(len(new[kind]) for kind in rows)} vectors\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/unit/test_golden.py --write")
    sys.stdout.write(_write())
