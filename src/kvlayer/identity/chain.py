"""The names of one prompt: its links, grouped into the spans that objects hold. Pure.

Chunks, tails and cuts only group links. A span is named by the link at its end and by how many
tokens it holds, so the same end may close a whole chunk or only what follows a cut.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from contextlib import suppress
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, NamedTuple, cast

from xxhash import xxh3_128

from kvlayer._steps import SLICE, Steps
from kvlayer._values import whole
from kvlayer.errors import IdentityError, TokensError
from kvlayer.identity import links
from kvlayer.identity.epoch import Epoch
from kvlayer.identity.links import Links
from kvlayer.identity.quality import Accepted
from kvlayer.identity.tokens import Tokens, TokenSource, first_unnamed, token_bytes
from kvlayer.scope import PUBLIC_ZONE, Scope, zone_at

if sys.platform == "linux":
    from mmap import MADV_HUGEPAGE

__all__ = ["ChunkChain", "Span"]

_PUBLIC = Scope()
_new_tuple = cast(Any, tuple).__new__


class Span(NamedTuple):
    """A token range ``[start, stop)`` of one prompt that one object holds, and its end hash.

    ``parent`` is the hash it continues: of what lies right before it in that prompt. Empty at the
    prompt's start, and where nobody said.
    """

    start: int
    stop: int
    hash: bytes
    parent: bytes = b""

    @property
    def tokens(self) -> int:
        """How many tokens it covers."""
        return self.stop - self.start


class ChunkChain:
    """The names of one prompt under ``scope``. Immutable: a longer prompt is another chain.

    Tokens are named alike whatever KV they have. In which ``namespace`` (a digest) a cache looks
    for that, and stores it, is what the chain says besides, and in which ``epoch`` of the cache it
    was made: empty and None until a cache has :meth:`bound` it. ``accepts`` are the qualities that
    may serve what exact KV does not, of those that the scope names.

    ``links[i]`` names tokens ``[0, (i + 1) * tokens_per_tail)``, ``hashes[i]`` tokens
    ``[0, (i + 1) * tokens_per_chunk)``. The tokens are copied: the caller may reuse the buffer at
    once. Names end before a token id above ``tokens.MAX_NAMED``: ``unnamed`` is where it stands.
    Raises ``TokensError`` as ``token_bytes``.
    """

    __slots__ = ("_bytes", "_fingerprints", "_folds", "_zones", "accepts", "chunk_step", "epoch",
                 "hashes", "links", "namespace", "num_tokens", "scope", "tail_step",
                 "unnamed")  # fmt: skip

    def __init__(
        self, tokens: Tokens, scope: Scope, *, tokens_per_chunk: int, tokens_per_tail: int
    ) -> None:
        self._begin(scope, tokens_per_chunk, tokens_per_tail)
        packed = token_bytes(tokens)
        self._hold(packed, bytearray(), first_unnamed(packed))

    def _begin(self, scope: Scope, tokens_per_chunk: int, tokens_per_tail: int) -> None:
        self.scope = scope
        self.namespace = ""
        self.epoch: Epoch | None = None
        self.accepts: tuple[Accepted, ...] = ()
        self.chunk_step = tokens_per_chunk
        self.tail_step = tokens_per_tail
        self._zones = scope.zones()
        self._folds = links.folds_of(scope, tokens_per_tail)
        self._fingerprints: list[bytes] = []
        """Of the first full chunks, as far as they were asked for; shared by chains cut short."""

    def _hold(self, packed: bytes, known: bytearray, unnamed: int | None) -> None:
        """Take ``packed`` as the prompt, of which ``known`` are the first links."""
        self._bytes: bytes | mmap | None = packed
        self.num_tokens = len(packed) // 4
        self.unnamed = unnamed
        stop = self.num_tokens if unnamed is None else unnamed
        links.extend(known, packed, stop // self.tail_step, self.tail_step, self._folds)
        self._group(Links(known))

    def _group(self, known: Links, hashes: list[bytes] | None = None) -> None:
        """``hashes``: the end hash of every full chunk, where they are known."""
        self.links = known
        if hashes is None:
            per_chunk = self.chunk_step // self.tail_step
            hashes = [known[at] for at in range(per_chunk - 1, len(known), per_chunk)]
        self.hashes = hashes
        """The end hash of every full chunk."""

    @classmethod
    def from_bytes(
        cls, packed: bytes, scope: Scope, *, tokens_per_chunk: int, tokens_per_tail: int
    ) -> ChunkChain:
        """The chain of tokens that ``token_bytes`` has packed already."""
        chain = cls.__new__(cls)
        chain._begin(scope, tokens_per_chunk, tokens_per_tail)
        chain._hold(packed, bytearray(), first_unnamed(packed))
        return chain

    @classmethod
    def in_steps(
        cls,
        tokens: TokenSource | bytes,
        scope: Scope,
        *,
        tokens_per_chunk: int,
        tokens_per_tail: int,
        tokens_per_step: int,
    ) -> Steps[ChunkChain]:
        """The chain of tokens, for whoever keeps others waiting: yields after each step.

        Bytes are packed already. Others are read as it goes, and are not to change meanwhile.
        Returns the chain. Raises ``TokensError`` as ``token_bytes``.
        """
        chain = cls.__new__(cls)
        chain._begin(scope, tokens_per_chunk, tokens_per_tail)
        source = None if isinstance(tokens, bytes) else tokens
        count = len(tokens) // 4 if isinstance(tokens, bytes) else len(tokens)
        pages = None if source is None or not count else _pages(4 * count)
        packed = tokens if isinstance(tokens, bytes) else pages or b""
        per_chunk = tokens_per_chunk // tokens_per_tail
        made, hashes = bytearray(), list[bytes]()
        known = Links(made)
        unnamed: int | None = None
        if pages is not None:
            pages[0] = 0  # the first page is cleared, which takes its time
            yield
        for start in range(0, count, tokens_per_step):
            stop = min(start + tokens_per_step, count)
            if pages is not None:
                pages[4 * start : 4 * stop] = _packed(source, start, stop)
            if (
                unnamed is None
                and (found := first_unnamed(packed[4 * start : 4 * stop])) is not None
            ):
                unnamed = start + found
            named = stop if unnamed is None else unnamed
            links.extend(made, packed, named // tokens_per_tail, tokens_per_tail, chain._folds)
            first = per_chunk * (len(hashes) + 1) - 1
            hashes += [known[at] for at in range(first, len(known), per_chunk)]
            yield
        chain._bytes, chain.num_tokens, chain.unnamed = packed, count, unnamed
        chain._group(known, hashes)
        return chain

    @classmethod
    def from_links(
        cls,
        known: Sequence[bytes],
        scope: Scope = _PUBLIC,
        *,
        tokens_per_chunk: int,
        tokens_per_tail: int,
    ) -> ChunkChain:
        """The chain of a prompt whose tokens only an engine knows; it has hashed them.

        ``known`` are its links from the prompt's start, 32 bytes each. The scope may name an owner
        only: what shaped the KV has to be in the links already. Raises ``IdentityError``.
        """
        if scope.extras():
            raise IdentityError(
                "links that are already made cannot take up salts, adapters or contents",
                hint="let the engine hash them, or pass the tokens",
            )
        if wrong := [link for link in known if type(link) is not bytes or len(link) != 32]:
            raise IdentityError(
                f"a link is a sha256 digest of 32 bytes, found {wrong[0]!r}",
                hint="decode hex digests with bytes.fromhex",
            )
        chain = cls.__new__(cls)
        chain._begin(scope, tokens_per_chunk, tokens_per_tail)
        chain._bytes = chain.unnamed = None
        chain.num_tokens = len(known) * tokens_per_tail
        chain._group(Links(b"".join(known)))
        return chain

    def grown(self, tokens: Tokens) -> ChunkChain:
        """The chain of this prompt followed by ``tokens``: packs those and hashes new links only.

        Raises ``TokensError`` as ``token_bytes``, and for a chain made from links.
        """
        if self._bytes is None:
            raise TokensError(
                "a chain made from links has no tokens to follow",
                hint="make it anew from all links",
            )
        chain, more, unnamed = self._like(), token_bytes(tokens), self.unnamed
        if unnamed is None and (found := first_unnamed(more)) is not None:
            unnamed = self.num_tokens + found
        chain._hold(self._bytes[:] + more, bytearray(self.links.packed), unnamed)
        chain._fingerprints = self._fingerprints[: len(self)]
        return chain

    def until(self, stop: int) -> ChunkChain:
        """The chain of the first ``stop`` tokens; hashes nothing. Raises ``ArgumentError``."""
        stop = whole("stop", stop)
        if stop >= self.num_tokens:
            return self
        chain = self._like()
        chain._bytes = None if self._bytes is None else self._bytes[: 4 * stop]
        chain.num_tokens = stop
        chain.unnamed = None if self.unnamed is None or self.unnamed >= stop else self.unnamed
        chain._group(self.links[: stop // self.tail_step])
        return chain

    def under(self, scope: Scope) -> ChunkChain:
        """The same names for a scope that differs in what names nothing: the owner, say."""
        chain = self._copy()
        chain.scope = scope
        chain.accepts = tuple([each for each in self.accepts if each.quality in scope.accepts])
        return chain

    def named_in(self, namespace: str) -> ChunkChain:
        """The same names in another namespace, of which alone something is accepted."""
        chain = self._copy()
        chain.namespace, chain.accepts = namespace, ()
        return chain

    def bound(
        self, epoch: Epoch, namespace: str = "", accepts: tuple[Accepted, ...] = ()
    ) -> ChunkChain:
        """The same names in an epoch of a cache, and in its namespace or another (a digest)."""
        chain = self._copy()
        chain.epoch, chain.namespace = epoch, namespace or epoch.namespace
        chain.accepts = accepts
        return chain

    def accepting(self, *accepts: Accepted) -> ChunkChain:
        """The same names for a request that accepts only these qualities beside exact KV."""
        if self.accepts == accepts:
            return self
        chain = self._copy()
        chain.accepts = accepts
        return chain

    @property
    def is_stale(self) -> bool:
        """Whether the epoch it is of is over: nothing is stored or served by it any more."""
        return self.epoch is not None and self.epoch.is_over

    def _copy(self) -> ChunkChain:
        chain = self._like()
        chain._bytes, chain.num_tokens, chain.unnamed = self._bytes, self.num_tokens, self.unnamed
        chain.links, chain.hashes = self.links, self.hashes
        return chain

    def _like(self) -> ChunkChain:
        """A chain of the same scope and sizes, not filled yet."""
        chain = type(self).__new__(type(self))
        chain.scope, chain._zones, chain._folds = self.scope, self._zones, self._folds
        chain.namespace, chain.epoch, chain.accepts = self.namespace, self.epoch, self.accepts
        chain.chunk_step, chain.tail_step = self.chunk_step, self.tail_step
        chain._fingerprints = self._fingerprints
        return chain

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def packed(self) -> bytes | mmap:
        """The tokens as little-endian u32; empty in a chain made from links."""
        return self._bytes or b""

    @property
    def named_tokens(self) -> int:
        """How many tokens spans can name: all but a rest shorter than a link, or without names."""
        return len(self.links) * self.tail_step

    def parent(self, start: int) -> bytes:
        """The hash that a span from ``start`` on continues; empty at the prompt's start."""
        return self.links[start // self.tail_step - 1] if start else b""

    def span(self, index: int) -> Span:
        """Full chunk ``index`` as a span."""
        start = index * self.chunk_step
        parent = self.hashes[index - 1] if index else b""
        return Span(start, start + self.chunk_step, self.hashes[index], parent)

    def spans(self, stop: int, start: int = 0) -> list[Span]:
        """Full chunks ``[start, stop)`` as spans."""
        step = self.chunk_step
        hashes = self.hashes[start:stop] if start else self.hashes
        before = self.hashes[start - 1 : stop] if start else itertools.chain((b"",), hashes)
        starts = range(start * step, stop * step, step)
        stops = range((start + 1) * step, (stop + 1) * step, step)
        fields = zip(starts, stops, hashes, before, strict=False)
        # Half as long as with Span._make, and no lookup is without it.
        return [*map(_new_tuple, itertools.repeat(Span), fields)]

    def ends(self, start: int) -> list[Span]:
        """Every span that may start at ``start``, a multiple of a link; longest first.

        None reaches beyond the next multiple of a chunk: after a short object the next one runs to
        there at most.
        """
        step, last = self.tail_step, start - start % self.chunk_step + self.chunk_step
        first, stop = start // step, min(last // step, len(self.links))
        parent = self.parent(start)
        return [
            Span(start, (at + 1) * step, self.links[at], parent)
            for at in range(stop - 1, first - 1, -1)
        ]

    def tails(self, index: int) -> list[Span]:
        """Tails that may stand where chunk ``index`` (0 to ``len``) would, longest first.

        A tail is a multiple of ``tokens_per_tail`` tokens, shorter than a chunk: with an eighth of
        a chunk there are at most seven. One that ends before an extra starts is named without it.
        """
        spans = self.ends(index * self.chunk_step)
        return spans[1:] if spans and spans[0].tokens == self.chunk_step else spans

    def zone(self, span: Span) -> str:
        """Who owns the span."""
        return self.zone_before(span.stop)

    def zones_before(self, stop: int) -> tuple[str, ...]:
        """Whose salts a span that ends before token ``stop`` is under, in their order."""
        return tuple([zone for first, zone in self._zones if first < stop])

    def zone_before(self, stop: int) -> str:
        """Who owns a span that ends before token ``stop``."""
        return zone_at(self._zones, stop) if self._zones else PUBLIC_ZONE

    def token_bytes(self, span: Span) -> bytes:
        """The span's tokens as packed little-endian u32; empty in a chain made from links."""
        return self.packed[4 * span.start : 4 * span.stop]

    def fingerprints(self, stop: int | None = None, start: int = 0) -> list[bytes]:
        """By full chunk, what its tokens and those before are whatever the scope: for ``explain``.

        Of full chunks ``[start, stop)``, or of all.

        No name: quick to make, and two prompts may be made to share one. Empty without tokens.
        A chain that has grown makes only those of what is new.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        at = len(self._fingerprints)
        if self._bytes is not None and at < stop:
            found, nbytes = self._fingerprints[-1:], 4 * self.chunk_step
            for first in range(at * nbytes, stop * nbytes, nbytes):
                before = found[-1] if found else b""
                found.append(xxh3_128(before + self._bytes[first : first + nbytes]).digest())
            self._fingerprints[at:stop] = found[at > 0 :]
        return self._fingerprints[start:stop]

    def fingerprinting(self, stop: int) -> Steps[None]:
        """Make those of the first ``stop`` full chunks, in steps."""
        for at in range(len(self._fingerprints), stop, SLICE):
            self.fingerprints(min(at + SLICE, stop), stop)
            if at + SLICE < stop:
                yield


def _pages(nbytes: int) -> mmap:
    """Memory that is touched as it is filled: nothing is copied where it grows.

    In huge pages, where there are such: a million tokens are then written and given back in a
    fraction of the time.
    """
    pages = mmap(-1, nbytes, MAP_PRIVATE | MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(MADV_HUGEPAGE)
    return pages


def _packed(tokens: TokenSource, start: int, stop: int) -> bytes:
    """Tokens ``[start, stop)`` of a prompt that is read a slice at a time."""
    some = token_bytes(tokens[start:stop])
    if len(some) != 4 * (stop - start):
        raise TokensError(
            f"token {stop - 1} was there, and is not any more",
            hint="leave the tokens as they are until the call returns",
        )
    return some
