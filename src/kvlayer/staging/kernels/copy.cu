// Gather and scatter: rows move between the cache and staging memory, bit for bit.
#include "kv.cuh"

const int IN_FLIGHT = 4;  // vectors a thread has under way

// Vector by vector; WIDTH bytes divide the address of every row, but perhaps not its length.
template <class Vector, bool GATHER>
KV_INLINE void copy_tile(const Work& work, const Plane& plane, const Place* tile, u32 segments) {
    const u32 WIDTH = sizeof(Vector);
    const u32 lane = threadIdx.x & ((1u << work.lanes_log2) - 1);
    const u32 group = threadIdx.x >> work.lanes_log2, groups = THREADS >> work.lanes_log2;
    // An item is one segment (a vector per lane) of one head of one row; rows vary fastest.
    const u32 items = (work.heads * segments) << work.tile_log2;
    for (u32 first = group; first < items; first += groups * IN_FLIGHT) {
        Vector moving[IN_FLIGHT];
        u64 to[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            const u32 item = first + k * groups;
            to[k] = 0;
            if (item >= items) continue;
            const Place place = tile[item & ((1u << work.tile_log2) - 1)];
            const u32 part = item >> work.tile_log2, head = part / segments;
            const u32 at = (((part - head * segments) << work.lanes_log2) + lane) * WIDTH;
            if (place.cache == 0 || at >= plane.row_nbytes) continue;
            const u64 cache = place.cache + head * plane.cache_head + at;
            const u64 stage = place.stage + head * plane.stage_head + at;
            const u64 from = GATHER ? cache : stage, into = GATHER ? stage : cache;
            if (at + WIDTH <= plane.row_nbytes) {
                moving[k] = kv_load<Vector>(from);
                to[k] = into;
            } else {  // the row ends inside this vector
                for (u32 i = 0; at + i < plane.row_nbytes; i++)
                    kv_store<u8>(into + i, kv_load<u8>(from + i));
            }
        }
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++)
            if (to[k] != 0) kv_store<Vector>(to[k], moving[k]);
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
    }
}

KV_KERNEL kv_gather(u64 planes, u64 bases, u64 rows, u32 num_planes, u32 num_rows, u32 heads,
                    u32 tile_log2, u32 lanes_log2, u32 segments, u32 width) {
    KV_SHARED Place tile[MAX_TILE];
    copy_tiles<true>({planes, bases, rows, num_planes, num_rows, heads, tile_log2, lanes_log2},
                     tile, segments, width);
}

KV_KERNEL kv_scatter(u64 planes, u64 bases, u64 rows, u32 num_planes, u32 num_rows, u32 heads,
                     u32 tile_log2, u32 lanes_log2, u32 segments, u32 width) {
    KV_SHARED Place tile[MAX_TILE];
    copy_tiles<false>({planes, bases, rows, num_planes, num_rows, heads, tile_log2, lanes_log2},
                      tile, segments, width);
}
