"""One rank of an engine as a process of its own; speaks in frames over its standard streams.

``python rank_process.py NUMBER HEADS``: a rank that holds heads ``lo-hi`` of the small model. Each
request is a map with ``do``; each is answered. What it holds is random bits of a seed, so that
another process can say what they are.
"""

from __future__ import annotations

import asyncio
import sys
from hashlib import sha256
from typing import Any, BinaryIO

import torch
from caches import group
from engine import Engine

from kvlayer import KVLayout, KVView
from kvlayer._pack import pack, unpack
from kvlayer.api.rank_worker import RankWorker
from kvlayer.errors import MessageError
from kvlayer.layout import NHD

BLOCKS = 32


def send(stream: BinaryIO, message: object) -> None:
    packed = pack(message)
    stream.write(len(packed).to_bytes(4, "big") + packed)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next message, or None when the other side is gone."""
    size = stream.read(4)
    return unpack(stream.read(int.from_bytes(size, "big"))) if len(size) == 4 else None


def held(heads: tuple[int, int]) -> KVLayout:
    return KVLayout.single(group(), NHD, tokens_per_block=4, heads=heads)


def digest(engine: Engine, slots: list[int]) -> bytes:
    """Names the bits at these slots."""
    state = sha256()
    for plane in engine.read(torch.tensor(slots)):
        state.update(plane.numpy().tobytes())
    return state.digest()


class Stuck:
    """A stager that copies one payload and then never ends."""

    def __init__(self, inner: Any, says: BinaryIO) -> None:
        self._inner, self._says = inner, says

    async def gather(self, view: KVView, copies: Any) -> None:
        await self._inner.gather(view, copies[:1])
        send(self._says, "half-way")
        await asyncio.Event().wait()


def main() -> None:
    number, heads = int(sys.argv[1]), tuple(map(int, sys.argv[2].split("-")))
    layout = held((heads[0], heads[1]))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with RankWorker.start(receive(requests), layout, number) as rank:
        send(answers, "joined")
        engine = Engine(layout, BLOCKS, number)
        while (request := receive(requests)) is not None:
            match request["do"]:
                case "seed":
                    engine = Engine(layout, BLOCKS, request["seed"])
                    send(answers, None)
                case "order":
                    view = engine.view(torch.tensor(request["slots"]))
                    try:
                        send(answers, rank.call(RankWorker.carry_out, request["order"], view))
                    except MessageError as error:
                        send(answers, str(error))
                case "digest":
                    send(answers, digest(engine, request["slots"]))
                case "stick":
                    device = rank.subject._device
                    device._stager = Stuck(device._stager, answers)  # type: ignore[assignment]
                    send(answers, None)


if __name__ == "__main__":
    main()
