"""The engine's cache, opened once all its workers have introduced themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvlayer import CacheConfig, Portal
from kvlayer.errors import UnsupportedError
from kvlayer.events import Sink
from kvlayer.tier.ranks.rank_team import RankTeam
from kvlayer_vllm.engine import VllmConfig
from kvlayer_vllm.hands import LocalHands, RemoteHands, WorkerLink
from kvlayer_vllm.identity import namespace_of
from kvlayer_vllm.introductions import Introduction
from kvlayer_vllm.ranks import count_of, united, whole
from kvlayer_vllm.settings import Settings

__all__ = ["Opened"]


class Opened(NamedTuple):
    """A cache, and who copies for it."""

    config: CacheConfig
    portal: Portal
    hands: WorkerLink
    said: str
    """Its namespace, forms and ranks, for the log."""

    @classmethod
    def of(
        cls,
        vllm_config: VllmConfig,
        settings: Settings,
        workers: Mapping[int, Introduction],
        tables: Sequence[int],
        sinks: Sequence[Sink],
    ) -> Opened:
        """Open it for these workers, by their rank. ``tables`` as in ``LocalHands``.

        Raises what ``Cache.open`` raises, and ``UnsupportedError`` where a worker is missing: it
        has said in its own log why it is off.
        """
        _check_complete(workers, count_of(vllm_config))
        first = workers[0]
        config = settings.fitting(first.rank.native_step, first.rank.state_step)
        ranks = united(
            [workers[number].rank for number in range(len(workers))],
            vllm_config.model_config.hf_text_config,
        )
        layout = whole(ranks)
        groups = [held.group for held in layout.groups]
        namespace = namespace_of(vllm_config, groups, config, isa=first.rank.isa)
        hands: WorkerLink
        if first.tensors is not None:
            hands = LocalHands(first.tensors, tables)
            make_stager = first.rank.make_stager()
            portal = Portal.open(config, layout, namespace, sinks=sinks, make_stager=make_stager)
        else:
            team = RankTeam([rank.layout for rank in ranks])
            portal = Portal.open(config, layout, namespace, sinks=sinks, ranks=team)
            hands = RemoteHands(team, ranks, tables, portal)
        forms = ", ".join(dict.fromkeys(held.form for held in layout.groups))
        said = f"namespace {namespace.digest[:12]}, form {forms}, ranks {len(ranks)}"
        if first.rank.state_step > 1:
            said += f", recurrent states, so that chunks have {config.tokens_per_chunk} tokens"
        return cls(config, portal, hands, said)


def _check_complete(workers: Mapping[int, Introduction], count: int) -> None:
    missing = [number for number in range(count) if number not in workers]
    if len(missing) == count:
        raise UnsupportedError(
            "no worker of the engine has introduced itself: its own line says why it is off"
        )
    if missing:
        raise UnsupportedError(
            f"of the engine's {count} workers {missing} have not introduced themselves: their own "
            "lines say why they are off"
        )
