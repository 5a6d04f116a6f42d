"""``Session``: generation that begins where stored KV ends, and stores what it adds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from kvlayer import CacheConfig, Portal, Scope, StoreReport
from kvlayer._values import callee, flag, instance, text, whole
from kvlayer.errors import LayoutError, UnsupportedError
from kvlayer.events import Sink
from kvlayer_transformers.adapters import Adapters
from kvlayer_transformers.arguments import (
    answer_ends,
    checked_arguments,
    eos_ids,
    guessed_padding,
    zero_types,
)
from kvlayer_transformers.carrier import Carrier, Loading, Scopes
from kvlayer_transformers.encodings import read_prompts
from kvlayer_transformers.engine import Model, Past
from kvlayer_transformers.feed import Feed
from kvlayer_transformers.generation import Generation, Loaded
from kvlayer_transformers.geometry import Geometry
from kvlayer_transformers.identity import identity_of
from kvlayer_transformers.past import as_cache, computed_columns, layers_of
from kvlayer_transformers.prefill import OnPass, generate, prefill
from kvlayer_transformers.prompts import PromptIds, Prompts
from kvlayer_transformers.suitability import Suitability

__all__ = ["OnPass", "Session"]

_PUBLIC = Scope()


class Session:
    """Generation for one model that reuses KV through one cache.

    Prompts are computed in forward passes that end at multiples of ``pass_tokens``. While
    ``exact`` is true, reuse is rounded down to such a boundary: a warm run computes the very
    passes a cold one would and, on one thread, their outputs are equal to the bit. Otherwise
    tails are kept, the whole hit is used, and outputs agree up to rounding. So do, in either case,
    prompts that continue an earlier answer, whose KV was computed one token at a time (unless
    ``keep_answers`` is false), rows of padded batches, and KV that another engine has stored.

    The cache may fail only into recomputing. An exception out of it that is not misuse is counted
    in :attr:`troubles`, logged once, and generation goes on as after a miss.

    Not for concurrent use.
    """

    def __init__(
        self,
        model: Model,
        portal: Portal,
        *,
        pass_tokens: int | None = None,
        exact: bool = True,
        keep_answers: bool = True,
        report_prefill: bool = True,
        prove: bool = True,
        geometry: Geometry | None = None,
    ) -> None:
        """``portal`` stays the caller's and was opened with this model's ``Geometry.of(model)``.

        ``pass_tokens`` is a multiple of the cache's chunk, by default two chunks. With
        ``report_prefill`` the cache hears how fast the model computes prompts, and leaves on slow
        tiers what is computed faster than it is loaded. Raises ``UnsupportedError`` for a model
        whose past kvlayer cannot carry. With ``prove`` that is tried by computing, once per class
        and configuration: see :mod:`kvlayer_transformers.proof`.
        """
        portal = instance("portal", portal, Portal, hint="open one, or use Session.open")
        self.model = model
        self.geometry = geometry or Geometry.of(model)
        self.exact = flag("exact", exact)
        self.keep_answers = flag("keep_answers", keep_answers)
        self.report_prefill = flag("report_prefill", report_prefill)
        if portal.cache.namespace.groups != self.geometry.groups:
            raise LayoutError(
                "the portal was opened for other KV groups than this model's",
                hint="open it with Geometry.of(model).layout, or use Session.open",
            )
        self._chunk = portal.cache.namespace.tokens_per_chunk
        width = 2 * self._chunk if pass_tokens is None else pass_tokens
        self.pass_tokens = whole("pass_tokens", width, least=-(2**31))
        if self.pass_tokens < 1 or self.pass_tokens % self._chunk:
            raise UnsupportedError(
                f"pass_tokens must be a multiple of the chunk ({self._chunk} tokens), found "
                f"{self.pass_tokens}",
                hint="reuse begins where a pass and a chunk end together",
            )
        adapters = Adapters(model)
        self._suitability = Suitability(model, adapters, prove=flag("prove", prove))
        self._carrier = Carrier(portal, self.geometry, adapters)
        self._owned = ExitStack()

    @classmethod
    def open(
        cls,
        model: Model,
        config: CacheConfig,
        *,
        weights: str | os.PathLike[str] = "",
        pass_tokens: int | None = None,
        exact: bool = True,
        keep_answers: bool = True,
        report_prefill: bool = True,
        prove: bool = True,
        geometry: Geometry | None = None,
        sinks: Iterable[Sink] = (),
    ) -> Self:
        """A session that owns its cache: leave its ``with`` block, or :meth:`close` it.

        ``weights`` is the folder ``model`` was loaded from, or its ``sha256:`` digest, and
        defaults to ``config.model.weights``. With a folder of ``safetensors`` the model in memory
        is compared with it, and what differs is part of the name; a digest is believed.
        ``geometry`` saves the one-token forward pass of ``Geometry.of(model)`` when it is known.
        """
        config = instance("config", config, CacheConfig, hint="pass kvlayer.CacheConfig(...)")
        place = text(
            "weights",
            os.fspath(weights) if isinstance(weights, os.PathLike) else weights,
            hint="pass the model's folder, or 'sha256:<64 hex digits>'",
        )
        geometry = geometry or Geometry.of(model)
        width = 2 * config.tokens_per_chunk if pass_tokens is None else pass_tokens
        config, namespace = identity_of(model, geometry, config, weights=place, pass_tokens=width)
        with ExitStack() as opened:
            portal = opened.enter_context(
                Portal.open(config, geometry.layout, namespace, sinks=tuple(sinks))
            )
            session = cls(
                model,
                portal,
                pass_tokens=width,
                exact=exact,
                keep_answers=keep_answers,
                report_prefill=report_prefill,
                prove=prove,
                geometry=geometry,
            )
            session._owned = opened.pop_all()
            return session

    @property
    def portal(self) -> Portal:
        """The cache behind the session."""
        return self._carrier.portal

    @property
    def troubles(self) -> int:
        """How often the cache broke and generation went on without it."""
        return self._carrier.troubles

    def close(self) -> None:
        """Close the cache if the session opened it. Idempotent."""
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self.close()

    def load(
        self,
        input_ids: PromptIds,
        attention_mask: torch.Tensor | None = None,
        *,
        scope: Scopes = _PUBLIC,
    ) -> Loaded:
        """A ``DynamicCache`` of stored KV for the prompts, and how many columns it covers.

        Never all of them: at least the last column is left to compute. The cache is the caller's.
        """
        loading = self._load(self._prompts(input_ids, attention_mask), scope)
        return Loaded(loading.past, loading.columns)

    def save(
        self,
        input_ids: PromptIds,
        past: Past,
        attention_mask: torch.Tensor | None = None,
        *,
        scope: Scopes = _PUBLIC,
        first_token: int = 0,
    ) -> tuple[StoreReport, ...]:
        """Store the KV that ``past`` holds of ``input_ids``, as far as both reach, tail included.

        One report per row. Tokens before ``first_token`` count as stored and are not read.
        Returns once the bytes have left ``past`` and the tiers written through have committed.
        Raises ``UnsupportedError`` for a ``past`` of a kind kvlayer cannot carry.
        """
        first_token = whole("first_token", first_token, error=LayoutError)
        prompts = self._prompts(input_ids, attention_mask)
        layers = layers_of(past, self.geometry)
        rows = layers[0][0].shape[0]
        if rows != prompts.rows:
            raise LayoutError(
                f"past has {rows} rows, the ids have {prompts.rows}",
                hint="pass the batch that past was computed from",
            )
        return self._carrier.save(
            prompts,
            layers,
            scope,
            ends=[min(prompts.columns, past.get_seq_length())] * rows,
            first_tokens=[first_token] * rows,
            tail=True,
        )

    def generate(
        self,
        input_ids: PromptIds = None,
        attention_mask: torch.Tensor | None = None,
        *,
        scope: Scopes = _PUBLIC,
        load: bool = True,
        save: bool = True,
        on_pass: OnPass | None = None,
        **arguments: Any,
    ) -> Generation:
        """``model.generate``, but what is stored is loaded and what is computed is stored.

        ``arguments`` go to ``model.generate`` (``max_new_tokens``, ``do_sample``, ``streamer``
        and so on); those not known to go together with stored KV are refused with
        ``UnsupportedError``. ``input_ids`` may be what a tokenizer returned. Without
        ``attention_mask`` padding is guessed as ``model.generate`` does it: where the padding id
        of the generation config is no end token, it counts as padding. ``load`` and ``save``
        switch either half off.

        Whatever ends the call early (an error, a streamer or ``on_pass`` that raises,
        ``KeyboardInterrupt``) is raised once the KV of the prompt, as far as it was computed, has
        been stored.
        """
        load, save = flag("load", load), flag("save", save)
        on_pass = None if on_pass is None else callee("on_pass", on_pass)
        prompts, rest = read_prompts(
            input_ids, attention_mask, arguments, partial(guessed_padding, self.model)
        )
        rest = self._checked(prompts, rest)
        loading = self._load(prompts, scope) if load else Loading(as_cache([], 0))
        past = loading.past
        feed = Feed(self.model, prompts, past)
        try:
            self._compute(prompts, past, loading.columns, on_pass)
            with feed:
                sequences: torch.Tensor = generate(self.model, prompts, past, **rest)
        except BaseException:
            if save:
                self._save_prompts(prompts, feed, past, scope, loaded=loading.columns)
            raise
        stored: tuple[StoreReport, ...] = ()
        if save:
            stored = self._save(prompts, feed, past, scope, rest, loaded=loading.columns)
        return Generation(sequences, loading.columns, loading.failed, stored)

    def _prompts(self, input_ids: PromptIds, attention_mask: Any) -> Prompts:
        """The prompts of a call without generation. Raises what the checks raise."""
        prompts, rest = read_prompts(input_ids, attention_mask, {})
        self._checked(prompts, rest)
        return prompts

    def _checked(self, prompts: Prompts, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments for ``model.generate``; raises where they or the model do not suit."""
        kept = checked_arguments(self.model, arguments)
        self._suitability.check()
        self._suitability.check_prompts(prompts)
        for name in zero_types(arguments):
            self._suitability.check_zeros(name)
        return kept

    def _load(self, prompts: Prompts, scope: Scopes) -> Loading:
        return self._carrier.load(prompts, scope, step=self.pass_tokens if self.exact else 1)

    def _compute(self, prompts: Prompts, past: Past, start: int, on_pass: OnPass | None) -> None:
        """All passes over the prompts but the last, which is ``model.generate``'s."""
        began = time.perf_counter()
        computed = prefill(
            self.model, prompts, past, start, width=self.pass_tokens, on_pass=on_pass
        )
        if computed and self.report_prefill:
            device = self.model.device
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # what is queued is not computed yet
            self._carrier.computed(computed, time.perf_counter() - began)

    def _save(
        self,
        prompts: Prompts,
        feed: Feed,
        past: Past,
        scope: Scopes,
        arguments: Mapping[str, Any],
        *,
        loaded: int,
    ) -> tuple[StoreReport, ...]:
        """Store prompts and, if asked for, answers up to each row's end, if fed."""
        fed = feed.ids
        held = computed_columns(past, self.geometry)
        columns = 0 if fed is None else fed.shape[1]
        if fed is None or columns != held:
            self._carrier.trouble(f"the past has {held} columns, expected {columns}")
            return ()
        ends = [prompts.columns] * prompts.rows
        if self.keep_answers:
            ends = answer_ends(fed, prompts.columns, eos_ids(self.model, arguments))
        return self._store(Prompts(fed, prompts.pads), past, scope, ends, loaded)

    def _save_prompts(
        self, prompts: Prompts, feed: Feed, past: Past, scope: Scopes, *, loaded: int
    ) -> None:
        """Store what was computed of prompts whose generation failed; troubles are counted."""
        try:
            fed = feed.ids
            end = min(prompts.columns, computed_columns(past, self.geometry))
            if fed is not None and end > loaded:
                ends = [max(end, pad) for pad in prompts.pads]
                self._store(Prompts(fed, prompts.pads), past, scope, ends, loaded)
        except Exception as exc:  # noqa: BLE001  # the caller is to see what ended generation
            self._carrier.trouble(f"{type(exc).__name__}: {exc}", exc)

    def _store(
        self, prompts: Prompts, past: Past, scope: Scopes, ends: list[int], loaded: int
    ) -> tuple[StoreReport, ...]:
        """Store each row up to its end column, unless the model changed while it computed."""
        try:
            self._suitability.check()
        except UnsupportedError as exc:
            self._carrier.trouble(f"nothing is stored: {exc}", exc)
            return ()
        held = max(ends)
        layers = layers_of(past, self.geometry)
        return self._carrier.save(
            prompts,
            # Where a pass was interrupted, some layers are longer than others.
            [(keys[:, :, :held], values[:, :, :held]) for keys, values in layers],
            scope,
            ends=ends,
            # What was loaded is stored: begin with the chunk in which it ends.
            first_tokens=[
                max(loaded - pad, 0) // self._chunk * self._chunk for pad in prompts.pads
            ],
            tail=not self.exact,
        )
