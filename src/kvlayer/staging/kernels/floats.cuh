// Floats of rows, computed with in float32: 16 bytes at a time, or one.
#pragma once
#include "kv.cuh"

struct Bf16 {
    typedef u16 Bits;
    static const u32 NBYTES = 2;
    KV_INLINE static void unpack(u32 word, float* to) {
        to[0] = __uint_as_float(word << 16);
        to[1] = __uint_as_float(word & 0xffff0000u);
    }
    KV_INLINE static u32 pack(const float* from) { return kv_floats_to_bf16(from[0], from[1]); }
};

struct F16 {
    typedef u16 Bits;
    static const u32 NBYTES = 2;
    KV_INLINE static void unpack(u32 word, float* to) {
        to[0] = kv_f16_to_float((u16)word);
        to[1] = kv_f16_to_float((u16)(word >> 16));
    }
    KV_INLINE static u32 pack(const float* from) { return kv_floats_to_f16(from[0], from[1]); }
};

struct F32 {
    typedef u32 Bits;
    static const u32 NBYTES = 4;
    KV_INLINE static void unpack(u32 word, float* to) { to[0] = __uint_as_float(word); }
    KV_INLINE static u32 pack(const float* from) { return __float_as_uint(from[0]); }
};

// A word of 32 bits is one or two elements.
template <class Float> KV_INLINE void unpack(uint4 vector, float* to) {
    const int N = 4 / Float::NBYTES;
    Float::unpack(vector.x, to);
    Float::unpack(vector.y, to + N);
    Float::unpack(vector.z, to + 2 * N);
    Float::unpack(vector.w, to + 3 * N);
}
template <class Float> KV_INLINE uint4 pack(const float* from) {
    const int N = 4 / Float::NBYTES;
    uint4 vector;
    vector.x = Float::pack(from);
    vector.y = Float::pack(from + N);
    vector.z = Float::pack(from + 2 * N);
    vector.w = Float::pack(from + 3 * N);
    return vector;
}

// COUNT elements: one access when they are 16 bytes, else one each.
template <class Float, int COUNT> KV_INLINE void load_floats(u64 from, float* to) {
    if constexpr (COUNT * Float::NBYTES == 16) {
        unpack<Float>(kv_load<uint4>(from), to);
    } else {
        for (int i = 0; i < COUNT; i++) {
            float pair[2];
            Float::unpack(kv_load<typename Float::Bits>(from + i * Float::NBYTES), pair);
            to[i] = pair[0];
        }
    }
}
template <class Float, int COUNT> KV_INLINE void store_floats(u64 to, const float* from) {
    if constexpr (COUNT * Float::NBYTES == 16) {
        kv_store<uint4>(to, pack<Float>(from));
    } else {
        for (int i = 0; i < COUNT; i++) {
            const float pair[2] = {from[i], 0.f};
            typedef typename Float::Bits Bits;
            kv_store<Bits>(to + i * Float::NBYTES, (Bits)Float::pack(pair));
        }
    }
}

// COUNT float32 of a table.
template <int COUNT> KV_INLINE void load_table(u64 from, float* to) {
    for (int i = 0; i < COUNT; i += 4) {
        if (COUNT - i >= 4) {
            unpack<F32>(kv_table<uint4>(from + i * 4), to + i);
        } else if (COUNT - i >= 2) {
            const uint2 two = kv_table<uint2>(from + i * 4);
            to[i] = __uint_as_float(two.x);
            to[i + 1] = __uint_as_float(two.y);
        } else {
            to[i] = __uint_as_float(kv_table<u32>(from + i * 4));
        }
    }
}
