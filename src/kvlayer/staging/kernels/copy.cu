// Gather and scatter: rows move between the cache and staging memory, bit for bit.
#include "kv.cuh"

const int IN_FLIGHT = 4;  // vectors a thread has under way

// Vector by vector. A vector's size divides the address of every row, but perhaps not its length.
template <class Vector, bool GATHER>
KV_INLINE void copy_tile(const Work& work, const Plane& plane, const Place* tile, u32 segments) {
    const u32 groups = work.groups();
    // An item is a segment (a vector per lane) of one head of one row; rows vary fastest.
    const u32 items = (work.heads * segments) << work.tile_log2;
    for (u32 first = work.group(); first < items; first += groups * IN_FLIGHT) {
        Vector moving[IN_FLIGHT];
        u64 to[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            const u32 item = first + k * groups;
            to[k] = 0;
            if (item >= items) continue;
            const Place place = tile[item & ((1u << work.tile_log2) - 1)];
            const u32 part = item >> work.tile_log2, head = part / segments;
            const u32 vector = ((part - head * segments) << work.lanes_log2) + work.lane();
            const u32 at = vector * sizeof(Vector);
            if (place.cache == 0 || at + sizeof(Vector) > plane.row_nbytes) continue;
            const u64 cache = place.cache + head * plane.cache_head + at;
            const u64 stage = place.stage + head * plane.stage_head + at;
            moving[k] = kv_load<Vector>(GATHER ? cache : stage);
            to[k] = GATHER ? stage : cache;
        }
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++)
            if (to[k] != 0) kv_store<Vector>(to[k], moving[k]);
    }
}

// What is left of each row behind its last whole vector, byte by byte: a row per thread.
template <bool GATHER>
KV_INLINE void copy_tails(const Work& work, const Plane& plane, const Place* tile, u32 width) {
    const u32 items = work.heads << work.tile_log2;
    for (u32 item = threadIdx.x; item < items; item += THREADS) {
        const Place place = tile[item & ((1u << work.tile_log2) - 1)];
        const u32 head = item >> work.tile_log2;
        if (place.cache == 0) continue;
        const u64 cache = place.cache + head * plane.cache_head;
        const u64 stage = place.stage + head * plane.stage_head;
#pragma unroll 1
        for (u32 at = plane.row_nbytes / width * width; at < plane.row_nbytes; at++)
            kv_store<u8>((GATHER ? stage : cache) + at, kv_load<u8>((GATHER ? cache : stage) + at));
    }
}

template <bool GATHER>
KV_INLINE void copy_tiles(const Work& work, Place* tile, u32 segments, u32 width) {
    for (u32 number = blockIdx.x; number < work.tiles(); number += gridDim.x) {
        const Plane plane = load_tile(work, number, tile);
        switch (width) {
            case 16: copy_tile<uint4, GATHER>(work, plane, tile, segments); break;
            case 8: copy_tile<uint2, GATHER>(work, plane, tile, segments); break;
            case 4: copy_tile<u32, GATHER>(work, plane, tile, segments); break;
            case 2: copy_tile<u16, GATHER>(work, plane, tile, segments); break;
            default: copy_tile<u8, GATHER>(work, plane, tile, segments);
        }
        if (plane.row_nbytes % width != 0) copy_tails<GATHER>(work, plane, tile, width);
    }
}

KV_KERNEL kv_gather(KV_TABLES, KV_COUNTS, u32 segments, u32 width) {
    KV_SHARED Place tile[MAX_TILE];
    copy_tiles<true>(KV_WORK, tile, segments, width);
}

KV_KERNEL kv_scatter(KV_TABLES, KV_COUNTS, u32 segments, u32 width) {
    KV_SHARED Place tile[MAX_TILE];
    copy_tiles<false>(KV_WORK, tile, segments, width);
}
