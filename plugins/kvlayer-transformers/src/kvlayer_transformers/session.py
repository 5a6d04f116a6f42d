"""``Session``: generation that begins where stored KV ends, and stores what it adds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch

from kvlayer import CacheConfig, Portal, Scope, StoreReport
from kvlayer.errors import LayoutError, UnsupportedError
from kvlayer.events import Sink
from kvlayer_transformers.arguments import answer_ends, check_arguments, eos_ids
from kvlayer_transformers.carrier import Carrier, Loading, Scopes
from kvlayer_transformers.engine import Model, Past, has_adapter
from kvlayer_transformers.generation import Generation, Loaded
from kvlayer_transformers.geometry import Geometry
from kvlayer_transformers.identity import identity_of
from kvlayer_transformers.past import as_cache, layers_of
from kvlayer_transformers.prompts import PromptIds, Prompts, passes

__all__ = ["OnPass", "Session"]

OnPass = Callable[[int, int], None]
"""Hears ``(columns done, columns of the prompt)`` after each forward pass over a prompt."""

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
        geometry: Geometry | None = None,
    ) -> None:
        """``portal`` stays the caller's and was opened with this model's ``Geometry.of(model)``.

        ``pass_tokens`` is a multiple of the cache's chunk, by default two chunks. With
        ``report_prefill`` the cache hears how fast the model computes prompts, and leaves on slow
        tiers what is computed faster than it is loaded. Raises ``UnsupportedError`` for a model
        whose past kvlayer cannot carry.
        """
        self.model = model
        self.geometry = geometry or Geometry.of(model)
        self.exact = exact
        self.keep_answers = keep_answers
        self.report_prefill = report_prefill
        if portal.cache.namespace.groups != self.geometry.groups:
            raise LayoutError(
                "the portal was opened for other KV groups than this model's",
                hint="open it with Geometry.of(model).layout, or use Session.open",
            )
        self._chunk = portal.cache.namespace.tokens_per_chunk
        self.pass_tokens = 2 * self._chunk if pass_tokens is None else pass_tokens
        if self.pass_tokens < 1 or self.pass_tokens % self._chunk:
            raise UnsupportedError(
                f"pass_tokens must be a multiple of the chunk ({self._chunk} tokens), found "
                f"{self.pass_tokens}",
                hint="reuse begins where a pass and a chunk end together",
            )
        self._carrier = Carrier(portal, self.geometry, adapted=has_adapter(model))
        self._owned = ExitStack()
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @classmethod
    def open(
        cls,
        model: Model,
        config: CacheConfig,
        *,
        weights: str = "",
        pass_tokens: int | None = None,
        exact: bool = True,
        keep_answers: bool = True,
        report_prefill: bool = True,
        geometry: Geometry | None = None,
        sinks: Iterable[Sink] = (),
    ) -> Self:
        """A session that owns its cache: leave its ``with`` block, or :meth:`close` it.

        ``weights`` is the folder ``model`` was loaded from, or its ``sha256:`` digest, and
        defaults to ``config.model.weights``. Nothing can tell whether the model in memory is still
        the one in that folder: one that was fine-tuned in place needs a digest of its own.
        ``geometry`` saves the one-token forward pass of ``Geometry.of(model)`` when it is known.
        """
        geometry = geometry or Geometry.of(model)
        width = 2 * config.tokens_per_chunk if pass_tokens is None else pass_tokens
        config, namespace = identity_of(model, geometry, config, weights=weights, pass_tokens=width)
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
        loading = self._load(Prompts.of(input_ids, attention_mask), scope)
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
        prompts = Prompts.of(input_ids, attention_mask)
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
        input_ids: PromptIds,
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
        and so on); those that stored KV cannot honour are refused with ``UnsupportedError``.
        Without ``attention_mask`` every id counts as a token: padding is never guessed. ``load``
        and ``save`` switch either half off.
        """
        check_arguments(self.model, arguments)
        if self.model.training:
            raise UnsupportedError(
                "the model is in training mode: dropout would be part of its KV",
                hint="call model.eval() first",
            )
        prompts = Prompts.of(input_ids, attention_mask)
        loading = self._load(prompts, scope) if load else Loading(as_cache([], 0))
        past = loading.past
        self._compute(prompts, past, loading.columns, on_pass)
        if past.get_seq_length() >= prompts.columns:
            # transformers would silently feed the whole prompt once more
            raise AssertionError(f"the past covers all {prompts.columns} columns of the prompt")
        device = self.model.device
        mask = torch.ones_like(prompts.ids) if not any(prompts.pads) else prompts.mask()
        sequences: torch.Tensor = self.model.generate(
            prompts.ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=past,
            **arguments,
        )
        stored: tuple[StoreReport, ...] = ()
        if save:
            answers = Prompts(sequences.cpu(), prompts.pads)
            ends = [prompts.columns] * prompts.rows
            if self.keep_answers:
                eos = eos_ids(self.model, arguments)
                ends = answer_ends(answers.ids, prompts.columns, eos)
            stored = self._save(answers, ends, past, scope, loaded=loading.columns)
        return Generation(sequences, loading.columns, loading.failed, stored)

    def _load(self, prompts: Prompts, scope: Scopes) -> Loading:
        return self._carrier.load(prompts, scope, step=self.pass_tokens if self.exact else 1)

    def _compute(self, prompts: Prompts, past: Past, start: int, on_pass: OnPass | None) -> None:
        """All passes over the prompts but the last, which is ``model.generate``'s."""
        device, width = self.model.device, self.pass_tokens
        began, computed = time.perf_counter(), 0
        with torch.no_grad():
            for begin, end in passes(start, (prompts.columns - 1) // width * width, width):
                self.model(
                    prompts.ids[:, begin:end].to(device),
                    past_key_values=past,
                    use_cache=True,
                    **prompts.padding(begin, end, device),
                    **self._last_only,
                )
                computed += (end - begin) * prompts.rows
                if on_pass is not None:
                    on_pass(end, prompts.columns)
        if computed and self.report_prefill:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # what is queued is not computed yet
            self._carrier.computed(computed, time.perf_counter() - began)

    def _save(
        self, answers: Prompts, ends: list[int], past: Past, scope: Scopes, *, loaded: int
    ) -> tuple[StoreReport, ...]:
        """Store prompts and answers up to each row's end column, if it has been fed."""
        fed = answers.columns - 1  # the last token never was
        if past.get_seq_length() != fed:
            self._carrier.trouble(f"the past has {past.get_seq_length()} columns, expected {fed}")
            return ()
        return self._carrier.save(
            answers,
            layers_of(past, self.geometry),
            scope,
            ends=[min(end, fed) for end in ends],
            # What was loaded is stored: begin with the chunk in which it ends.
            first_tokens=[
                max(loaded - pad, 0) // self._chunk * self._chunk for pad in answers.pads
            ],
            tail=not self.exact,
        )
