// Scatter that turns keys on their way: RoPE applied again, by the distance a piece has moved.
#include "floats.cuh"

// The turn of COUNT pairs. A lane mostly meets the same pairs of the same piece again.
template <int COUNT> struct Turn {
    u32 piece = ~0u, first = ~0u;
    float cosine[COUNT], sine[COUNT];

    KV_INLINE void look_up(u64 turns, u32 pairs, u32 of_piece, u32 from) {
        if (of_piece == piece && from == first) return;
        piece = of_piece;
        first = from;
        const u64 at = turns + ((u64)piece * 2 * pairs + first) * sizeof(float);
        load_table<COUNT>(at, cosine);
        load_table<COUNT>(at + (u64)pairs * sizeof(float), sine);
    }
    KV_INLINE void apply(int i, float& x, float& y) const {
        const float turned = __fmaf_rn(-y, sine[i], x * cosine[i]);
        y = __fmaf_rn(x, sine[i], y * cosine[i]);
        x = turned;
    }
};

// neox: pair i is elements i and pairs + i of what is rotated. A lane has COUNT of each half.
template <class Float, int COUNT> struct Neox {
    static const u32 PAIRS = COUNT;
    KV_INLINE static void rotate(u64 from, u64 to, u32 i, u32 pairs, const Turn<PAIRS>& turn) {
        const u64 low = (u64)i * COUNT * Float::NBYTES, high = low + (u64)pairs * Float::NBYTES;
        float x[COUNT], y[COUNT];
        load_floats<Float, COUNT>(from + low, x);
        load_floats<Float, COUNT>(from + high, y);
        for (int k = 0; k < COUNT; k++) turn.apply(k, x[k], y[k]);
        store_floats<Float, COUNT>(to + low, x);
        store_floats<Float, COUNT>(to + high, y);
    }
};

// gptj: pair i is elements 2 i and 2 i + 1. A lane has COUNT elements, or one pair.
template <class Float, int COUNT> struct Gptj {
    static const u32 ELEMENTS = COUNT > 1 ? COUNT : 2, PAIRS = ELEMENTS / 2;
    KV_INLINE static void rotate(u64 from, u64 to, u32 i, u32, const Turn<PAIRS>& turn) {
        const u64 at = (u64)i * ELEMENTS * Float::NBYTES;
        float x[ELEMENTS];
        load_floats<Float, ELEMENTS>(from + at, x);
        for (u32 k = 0; k < PAIRS; k++) turn.apply(k, x[2 * k], x[2 * k + 1]);
        store_floats<Float, ELEMENTS>(to + at, x);
    }
};

template <class Float, int COUNT, class Style>
KV_INLINE void rotate_tile(const Work& work, const Plane& plane, const Place* tile, u64 turns,
                           u32 pairs, u32 first) {
    Turn<Style::PAIRS> turn;
    const u32 turned = pairs / Style::PAIRS;
    const u32 all = turned + (plane.row_nbytes / Float::NBYTES - 2 * pairs) / COUNT;
    const u32 items = work.heads << work.tile_log2;
    for (u32 item = work.group(); item < items; item += work.groups()) {
        const Place place = tile[item & ((1u << work.tile_log2) - 1)];
        const u32 head = item >> work.tile_log2;
        if (place.cache == 0) continue;
        const u64 from = place.stage + head * plane.stage_head;
        const u64 to = place.cache + head * plane.cache_head;
        for (u32 i = work.lane(); i < all; i += 1u << work.lanes_log2) {
            if (i < turned) {
                turn.look_up(turns, pairs, place.piece, i * Style::PAIRS);
                Style::rotate(from + first * Float::NBYTES, to + first * Float::NBYTES, i, pairs,
                              turn);
            } else {  // elements before and after those that are rotated
                u32 element = (i - turned) * COUNT;
                if (element >= first) element += 2 * pairs;
                const u64 at = (u64)element * Float::NBYTES;
                if constexpr (COUNT > 1)
                    kv_store<uint4>(to + at, kv_load<uint4>(from + at));
                else
                    kv_store<typename Float::Bits>(to + at,
                                                   kv_load<typename Float::Bits>(from + at));
            }
        }
    }
}

template <class Float, template <class, int> class Style>
KV_INLINE void rotate_tiles(const Work& work, Place* tile, u64 turns, u32 pairs, u32 first,
                            u32 vectors) {
    const int COUNT = 16 / Float::NBYTES;
    for (u32 number = blockIdx.x; number < work.tiles(); number += gridDim.x) {
        const Plane plane = load_tile(work, number, tile);
        if (vectors)
            rotate_tile<Float, COUNT, Style<Float, COUNT>>(work, plane, tile, turns, pairs, first);
        else
            rotate_tile<Float, 1, Style<Float, 1>>(work, plane, tile, turns, pairs, first);
    }
}

#define ROTATE_KERNEL(NAME, FLOAT, STYLE)                                                         \
    KV_KERNEL NAME(KV_TABLES, u64 turns, KV_COUNTS, u32 pairs, u32 first, u32 vectors) {          \
        KV_SHARED Place tile[MAX_TILE];                                                           \
        rotate_tiles<FLOAT, STYLE>(KV_WORK, tile, turns, pairs, first, vectors);                  \
    }
ROTATE_KERNEL(kv_rotate_neox_bf16, Bf16, Neox)
ROTATE_KERNEL(kv_rotate_neox_f16, F16, Neox)
ROTATE_KERNEL(kv_rotate_neox_f32, F32, Neox)
ROTATE_KERNEL(kv_rotate_gptj_bf16, Bf16, Gptj)
ROTATE_KERNEL(kv_rotate_gptj_f16, F16, Gptj)
ROTATE_KERNEL(kv_rotate_gptj_f32, F32, Gptj)
