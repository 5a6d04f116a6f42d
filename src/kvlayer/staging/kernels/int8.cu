// Gather that quantises rows to int8 with a scale each, and scatter that undoes it.
#include "floats.cuh"

const u32 KEEP = 4;  // vectors of a row that a lane holds: rows of up to 32 * 4 * 16 bytes
const u32 WHOLE_WARP = 0xffffffffu;
const float SMALLEST = 7.888609e-31f;  // 2^-100: 127 divided by less could overflow

// Where a row's scale lies: [head][token], behind the plane's rows.
KV_INLINE u64 scale_of(const Plane& plane, const Place& place, u32 head, u32 tokens) {
    const u64 base = place.stage - plane.stage - (u64)place.row * plane.stage_row;
    return base + plane.scale + ((u64)head * tokens + place.row) * sizeof(float);
}

// The first of COUNT bytes is the lowest of its word.
template <int COUNT> KV_INLINE void store_bytes(u64 to, const u32* words) {
    if constexpr (COUNT == 8)
        kv_store<uint2>(to, uint2{words[0], words[1]});
    else
        kv_store<u32>(to, words[0]);
}
template <int COUNT> KV_INLINE void load_bytes(u64 from, u32* words) {
    if constexpr (COUNT == 8) {
        const uint2 two = kv_load<uint2>(from);
        words[0] = two.x;
        words[1] = two.y;
    } else {
        words[0] = kv_load<u32>(from);
    }
}

template <class Float>
KV_INLINE void quantize_tile(const Work& work, const Plane& plane, const Place* tile, u32 tokens) {
    const int COUNT = 16 / Float::NBYTES;
    const u32 vectors = plane.row_nbytes / 16, lanes = 1u << work.lanes_log2;
    const u32 items = work.heads << work.tile_log2;
    // Every thread makes every round: a shuffle waits for all lanes of the warp.
    for (u32 round = 0; round < items; round += work.groups()) {
        const u32 item = round + work.group(), head = item >> work.tile_log2;
        const Place place = tile[item & ((1u << work.tile_log2) - 1)];
        const bool held = item < items && place.cache != 0;
        const u64 from = place.cache + head * plane.cache_head;
        uint4 row[KEEP];
        float largest = 0.f;
#pragma unroll
        for (u32 k = 0; k < KEEP; k++) {
            const u32 vector = (k << work.lanes_log2) + work.lane();
            if (!held || vector >= vectors) continue;
            row[k] = kv_load<uint4>(from + vector * 16);
            float x[COUNT];
            unpack<Float>(row[k], x);
#pragma unroll
            for (int i = 0; i < COUNT; i++) largest = fmaxf(largest, fabsf(x[i]));
        }
        for (u32 apart = lanes >> 1; apart > 0; apart >>= 1)
            largest = fmaxf(largest, __shfl_xor_sync(WHOLE_WARP, largest, apart));
        if (!held) continue;
        const bool tiny = largest < SMALLEST;
        const float inverse = tiny ? 0.f : __fdiv_rn(127.f, largest);
        const u64 to = place.stage + head * plane.stage_head;
#pragma unroll
        for (u32 k = 0; k < KEEP; k++) {
            const u32 vector = (k << work.lanes_log2) + work.lane();
            if (vector >= vectors) continue;
            float x[COUNT];
            unpack<Float>(row[k], x);
            u32 words[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int q = max(-127, min(127, __float2int_rn(x[i] * inverse)));
                words[i / 4] |= ((u32)q & 255u) << (i % 4 * 8);
            }
            store_bytes<COUNT>(to + vector * COUNT, words);
        }
        if (work.lane() == 0)
            kv_store<float>(scale_of(plane, place, head, tokens),
                            tiny ? 0.f : __fdiv_rn(largest, 127.f));
    }
}

template <class Float>
KV_INLINE void dequantize_tile(const Work& work, const Plane& plane, const Place* tile,
                               u32 tokens) {
    const int COUNT = 16 / Float::NBYTES;
    const u32 vectors = plane.row_nbytes / 16;
    const u32 items = work.heads << work.tile_log2;
    for (u32 item = work.group(); item < items; item += work.groups()) {
        const Place place = tile[item & ((1u << work.tile_log2) - 1)];
        const u32 head = item >> work.tile_log2;
        if (place.cache == 0) continue;
        const float scale = kv_load<float>(scale_of(plane, place, head, tokens));
        const u64 from = place.stage + head * plane.stage_head;
        const u64 to = place.cache + head * plane.cache_head;
        for (u32 vector = work.lane(); vector < vectors; vector += 1u << work.lanes_log2) {
            u32 words[2];
            load_bytes<COUNT>(from + vector * COUNT, words);
            float x[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                x[i] = (float)(signed char)(words[i / 4] >> (i % 4 * 8)) * scale;
            kv_store<uint4>(to + vector * 16, pack<Float>(x));
        }
    }
}

#define INT8_KERNEL(NAME, FLOAT, STEP)                                                            \
    KV_KERNEL NAME(KV_TABLES, KV_COUNTS, u32 tokens) {                                            \
        KV_SHARED Place tile[MAX_TILE];                                                           \
        const Work work = KV_WORK;                                                                \
        for (u32 number = blockIdx.x; number < work.tiles(); number += gridDim.x) {               \
            const Plane plane = load_tile(work, number, tile);                                    \
            STEP<FLOAT>(work, plane, tile, tokens);                                               \
        }                                                                                         \
    }
INT8_KERNEL(kv_quantize_bf16, Bf16, quantize_tile)
INT8_KERNEL(kv_quantize_f16, F16, quantize_tile)
INT8_KERNEL(kv_quantize_f32, F32, quantize_tile)
INT8_KERNEL(kv_dequantize_bf16, Bf16, dequantize_tile)
INT8_KERNEL(kv_dequantize_f16, F16, dequantize_tile)
INT8_KERNEL(kv_dequantize_f32, F32, dequantize_tile)
