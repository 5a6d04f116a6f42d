"""Strands: a prompt in host memory is found and leased as one, and means what its objects mean."""

from __future__ import annotations

import gc
import tracemalloc

from stacks import CHUNK, NAMESPACE, TAIL, chain_of, holds_all, make_planner, store, whole

from kvlayer._steps import finish
from kvlayer.identity.keys import ChunkChain, ObjectKey, Part
from kvlayer.results import Cause
from kvlayer.tier.planner.copies import copy_of
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.strand import Strand

FULL = Part(0, (0, 2), (0, 2))


def looked_up(planner: Planner, chain: ChunkChain) -> Lease:
    return planner.lease(planner.match(chain), owner="", seconds=60.0)


def objects(planner: Planner, chain: ChunkChain) -> list[ObjectRecord]:
    return planner.match(chain).path()


def forked(chain: ChunkChain, count: int, more: int) -> ChunkChain:
    """A prompt that begins with ``count`` tokens of another and goes on otherwise."""
    return chain.until(count).grown([7] * more)


def test_a_resident_object_is_one_thing_to_the_collector_and_some_hundred_bytes() -> None:
    """Six things and 1,400 bytes would stop a process with a million of them for two seconds."""
    count, prompts = 2000, 20
    planner = make_planner(pages=count + 1)
    chains = [chain_of(count // prompts * CHUNK, seed=n) for n in range(prompts)]
    gc.collect()
    things = len(gc.get_objects())
    tracemalloc.start()
    try:
        for chain in chains:
            store(planner, chain)
            for found in planner.match(chain).path():  # and how each lies on a tier is known
                planner.directory.add_tier(found, 1, copy_of(1, 4096 + 8192))
        gc.collect()
        nbytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(planner.host) == count
    # Promises that this helper does not end are one list and one dict per prompt.
    assert len(gc.get_objects()) - things < 1.2 * count
    assert nbytes < 700 * count


def test_a_lookup_pins_one_number_for_a_whole_prompt() -> None:
    planner, chain = make_planner(pages=64), chain_of(40 * CHUNK)
    store(planner, chain)
    lease = looked_up(planner, chain)
    (strand,) = lease.held
    assert isinstance(strand, Strand)
    found = objects(planner, chain)
    assert (len(strand), strand.leases, strand.own) == (40, 1, 0)
    assert all((record.own, record.pins) == (0, 1) for record in found)
    assert planner.evict(found, Cause.CLEARED, "") == []
    assert planner.release(lease.number)
    assert all(record.pins == 0 for record in found)
    assert len(planner.evict(found, Cause.CLEARED, "")) == 40


def test_where_another_prompt_leaves_it_a_strand_is_parted_and_leases_hold_both_parts() -> None:
    planner, chain = make_planner(pages=64), chain_of(30 * CHUNK)
    store(planner, chain)
    whole = looked_up(planner, chain)
    other = forked(chain, 12 * CHUNK, 5 * CHUNK)
    store(planner, other)
    part = looked_up(planner, other)
    assert [record.pins for record in objects(planner, chain)] == [2] * 12 + [1] * 18
    assert [record.pins for record in objects(planner, other)] == [2] * 12 + [1] * 5
    assert planner.release(whole.number)
    assert [record.pins for record in objects(planner, chain)] == [1] * 12 + [0] * 18
    assert planner.release(part.number)
    assert planner.host.pinned_nbytes == 0


def test_a_prompt_that_leaves_in_any_chunk_is_matched_as_far_as_it_goes() -> None:
    planner, chain = make_planner(pages=64), chain_of(40 * CHUNK)
    store(planner, chain)
    looked_up(planner, chain)
    for count in (39, 1, 17, 40, 2, 38, 16, 20):
        other = forked(chain, count * CHUNK, 3 * CHUNK)
        assert planner.match(other).tokens == count * CHUNK
        assert planner.match(chain.until(count * CHUNK + 5)).tokens == count * CHUNK
    assert planner.match(chain).tokens == 40 * CHUNK


def test_a_strand_that_loses_an_object_ends_the_hit_there() -> None:
    planner, chain = make_planner(pages=64), chain_of(20 * CHUNK)
    store(planner, chain)
    planner.release(looked_up(planner, chain).number)
    middle = objects(planner, chain)[11]
    planner.evict([middle], Cause.CLEARED, "")
    assert planner.match(chain).tokens == 11 * CHUNK
    lease = looked_up(planner, chain)
    assert [record.pins for record in objects(planner, chain)] == [1] * 11
    planner.release(lease.number)


def test_what_was_found_before_a_strand_changed_is_leased_as_it_is_now() -> None:
    """Between a match and its lease others may lease, store and evict."""
    planner, chain = make_planner(pages=64), chain_of(20 * CHUNK)
    store(planner, chain)
    stale = [planner.match(chain)]
    planner.release(looked_up(planner, chain).number)  # strung
    stale.append(planner.match(chain))
    planner.match(forked(chain, 8 * CHUNK, CHUNK))  # parted
    stale.append(planner.match(chain))
    store(planner, chain_of(24 * CHUNK))  # goes on
    stale.append(planner.match(chain))
    gone = objects(planner, chain)[15]
    planner.evict([gone], Cause.CLEARED, "")  # dissolved
    for match in stale:
        assert match.tokens == 20 * CHUNK
        lease = planner.lease(match, owner="", seconds=60.0)
        assert lease.nbytes == 19 * 4096
        assert all(record.pins == 1 for record in match.path())
        planner.release(lease.number)
        assert planner.host.pinned_nbytes == 0
    assert gone.host is HostState.ABSENT


def test_a_load_lets_go_of_a_strand_object_by_object_and_leaves_other_leases_alone() -> None:
    planner, chain = make_planner(pages=64), chain_of(20 * CHUNK)
    store(planner, chain)
    match = planner.match(chain)
    reading, other = looked_up(planner, chain), looked_up(planner, chain)
    planner.claim(match, reading)
    found = match.path()
    finish(planner.scattered(found[:5], reading))
    assert [record.pins for record in found] == [1] * 5 + [3] * 15
    finish(planner.scattered(found[5:], reading))
    assert planner.release(reading.number)
    assert [record.pins for record in found] == [1] * 20
    assert planner.release(other.number)
    assert planner.host.pinned_nbytes == 0


def test_a_conversation_goes_on_in_the_same_strand_up_to_256_chunks() -> None:
    planner = make_planner(pages=400)
    for chunks in range(3, 300, 3):
        store(planner, chain_of(chunks * CHUNK))
    lease = looked_up(planner, chain_of(297 * CHUNK))
    assert [len(held) for held in lease.held if isinstance(held, Strand)] == [256, 41]


def test_a_lease_that_has_given_objects_back_is_matched_anew() -> None:
    """One of them was evicted and stored again since: what the hit names of it is dead."""
    planner, chain = make_planner(pages=16), chain_of(4 * CHUNK)
    store(planner, chain)
    match, lease = planner.lease_match(chain, (), whole, owner="", seconds=60.0)
    finish(planner.scattered(planner.claim(match, lease).path(), lease))
    planner.evict(objects(planner, chain)[2:3], Cause.CLEARED, "")
    store(planner, chain)
    again = planner.claim(match, lease)
    assert [found.host for found in again.path()] == [HostState.READY] * 4
    planner.unpin(again.path())
    planner.release(lease.number)
    assert planner.host.pinned_nbytes == 0


def test_a_lease_that_is_to_keep_its_path_holds_what_it_had_given_back() -> None:
    planner, chain = make_planner(pages=16), chain_of(4 * CHUNK)
    store(planner, chain)
    match, lease = planner.lease_match(chain, (), whole, owner="", seconds=60.0)
    first = planner.claim(match, lease).path()
    finish(planner.scattered(first[:2], lease))
    planner.unpin(first[2:])
    mine = planner.claim(match, lease)
    finish(planner.keeping(lease, mine))
    planner.unpin(mine.path())
    assert planner.evict(objects(planner, chain), Cause.CLEARED, "") == []
    finish(planner.keeping(lease, mine))  # once more changes nothing
    planner.release(lease.number)
    assert planner.host.pinned_nbytes == 0
    assert len(planner.evict(objects(planner, chain), Cause.CLEARED, "")) == 4


def test_what_a_tier_takes_back_while_a_prompt_settles_is_passed_over() -> None:
    """The lock is let go of between slices: what stood in a chunk's place may go then."""
    planner, count = make_planner(pages=1024), 300
    chain = chain_of(count * CHUNK)
    start = (count - 1) * CHUNK
    todo = planner.plan_store(chain.until(start + TAIL), 0, tail=True, holds=holds_all)
    planner.gathered(todo, ())
    ends = {end.stop: end for end in chain.ends(start)}
    pieces = [
        ObjectKey.of(NAMESPACE, "0", ends[stop].hash, TAIL, FULL)
        for stop in range(start + 2 * TAIL, count * CHUNK + 1, TAIL)
    ]
    planner.note(pieces, 1)
    assert planner.match(chain).tokens == count * CHUNK
    for step, _ in enumerate(planner.settling(chain, list(todo.gathers))):
        if step == 3:  # they are known to be of the prompt, and not recent yet
            planner.vanished(pieces, 1, "evicted")
    assert step > 3
    assert planner.match(chain).tokens == start + TAIL
    assert planner.host.pinned_nbytes == 0


def test_what_shorter_prompts_have_parted_is_one_strand_again() -> None:
    planner, chain = make_planner(pages=64), chain_of(32 * CHUNK)
    store(planner, chain)
    for count in range(1, 33):
        planner.release(looked_up(planner, chain.until(count * CHUNK)).number)
    lease = looked_up(planner, chain)
    (strand,) = lease.held
    assert isinstance(strand, Strand) and len(strand) == 32
    planner.release(lease.number)
    assert planner.host.pinned_nbytes == 0
