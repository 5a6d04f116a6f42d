// What every kernel shares: the tables it reads, a tile of rows, and how memory is accessed.
//
// Built by NVRTC without any CUDA header. For tests the same files are compiled by g++, with an
// emulator's header in front that defines KV_EMULATED and everything in the block below.
#pragma once

#ifndef KV_EMULATED
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define KV_KERNEL extern "C" __global__ void __launch_bounds__(256)
#define KV_INLINE __device__ __forceinline__
#define KV_SHARED __shared__

// Rows are read once: their loads are the first to leave the cache. What is stored is read soon.
template <class T> KV_INLINE T kv_load(u64 from) { return __ldcs((const T*)from); }
template <class T> KV_INLINE void kv_store(u64 to, T value) { __stcg((T*)to, value); }
// Tables are read by many threads, and nobody writes them meanwhile.
template <class T> KV_INLINE T kv_table(u64 from) { return __ldg((const T*)from); }

KV_INLINE float kv_f16_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
KV_INLINE u32 kv_floats_to_f16(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
KV_INLINE u32 kv_floats_to_bf16(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#endif

const u32 THREADS = 256;
const u32 MAX_TILE = 64;

// One plane of one layer: the K rows, or the V rows. Strides in bytes.
struct Plane {
    u64 cache, cache_block, cache_row, cache_head;  // address of head 0, block 0, row 0
    u64 stage, stage_head;                          // counted from a piece's base
    u32 stage_row, row_nbytes;
    u64 scale;  // int8: of the scale of head 0, row 0, counted from a piece's base
};

// One row of the table: which row of which block is which row of which piece. block -1: nothing.
struct Row {
    int block, inside;
    u32 piece, row;
};

// Where one row lies, for the plane and head 0 at hand. cache 0: there is no row.
struct Place {
    u64 cache, stage;
    u32 piece, row;
};

// What every kernel is told first: where its arrays lie in the plan's table, then numbers.
#define KV_TABLES u64 planes, u64 bases, u64 rows
#define KV_COUNTS u32 num_planes, u32 num_rows, u32 heads, u32 tile_log2, u32 lanes_log2
#define KV_WORK {planes, bases, rows, num_planes, num_rows, heads, tile_log2, lanes_log2}

struct Work {
    u64 planes, bases, rows;
    u32 num_planes, num_rows, heads, tile_log2, lanes_log2;

    KV_INLINE u32 tiles_per_plane() const {
        return (num_rows + (1u << tile_log2) - 1) >> tile_log2;
    }
    KV_INLINE u32 tiles() const { return num_planes * tiles_per_plane(); }
    // Each row is shared by the lanes of one group.
    KV_INLINE u32 lane() const { return threadIdx.x & ((1u << lanes_log2) - 1); }
    KV_INLINE u32 group() const { return threadIdx.x >> lanes_log2; }
    KV_INLINE u32 groups() const { return THREADS >> lanes_log2; }
};

KV_INLINE Plane load_plane(const Work& work, u32 number) {
    const u64 from = work.planes + (u64)number * sizeof(Plane);
    const uint4 a = kv_table<uint4>(from), b = kv_table<uint4>(from + 16);
    const uint4 c = kv_table<uint4>(from + 32), d = kv_table<uint4>(from + 48);
    Plane plane;
    plane.cache = (u64)a.y << 32 | a.x;
    plane.cache_block = (u64)a.w << 32 | a.z;
    plane.cache_row = (u64)b.y << 32 | b.x;
    plane.cache_head = (u64)b.w << 32 | b.z;
    plane.stage = (u64)c.y << 32 | c.x;
    plane.stage_head = (u64)c.w << 32 | c.z;
    plane.stage_row = d.x;
    plane.row_nbytes = d.y;
    plane.scale = (u64)d.w << 32 | d.z;
    return plane;
}

KV_INLINE Place place_row(const Work& work, const Plane& plane, u32 number) {
    Place place = {0, 0, 0, 0};
    if (number >= work.num_rows) return place;
    const uint4 entry = kv_table<uint4>(work.rows + (u64)number * sizeof(Row));
    if ((int)entry.x < 0) return place;
    place.piece = entry.z;
    place.row = entry.w;
    place.cache = plane.cache + entry.x * plane.cache_block + entry.y * plane.cache_row;
    place.stage = kv_table<u64>(work.bases + place.piece * sizeof(u64)) + plane.stage +
                  (u64)place.row * plane.stage_row;
    return place;
}

// The next tile of rows into shared memory, by all threads of the block. Returns its plane.
KV_INLINE Plane load_tile(const Work& work, u32 number, Place* tile) {
    const u32 per_plane = work.tiles_per_plane();
    const Plane plane = load_plane(work, number / per_plane);
    const u32 first = (number % per_plane) << work.tile_log2;
    __syncthreads();  // nobody reads the last tile any more
    if (threadIdx.x < 1u << work.tile_log2)
        tile[threadIdx.x] = place_row(work, plane, first + threadIdx.x);
    __syncthreads();  // everybody sees this one
    return plane;
}
