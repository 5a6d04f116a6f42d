// What kv.cuh needs from CUDA, for g++: compiled in front of a kernel's source. See emulator.cpp.
#pragma once
#define KV_EMULATED

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define KV_KERNEL extern "C" void
// Into the kernel itself, so that each access is an instruction of its own.
#define KV_INLINE inline __attribute__((always_inline))
// All shared memory of a translation unit is one section, which is poisoned before every block.
#define KV_SHARED static __attribute__((section("kv_shared")))

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Index { u32 x; };

extern Index threadIdx, blockIdx, blockDim, gridDim;

enum class Access { LOAD, STORE, TABLE };
// Counts the access. Leaves the kernel where it is not allowed.
void emulated_access(u64 address, u32 nbytes, Access kind);
void emulated_barrier();
u32 emulated_shuffle(u32 mask, u32 value, u32 lane_xor);

#define __syncthreads() emulated_barrier()

template <class T> KV_INLINE T kv_load(u64 from) {
    emulated_access(from, sizeof(T), Access::LOAD);
    return *(const T*)from;
}
template <class T> KV_INLINE T kv_table(u64 from) {
    emulated_access(from, sizeof(T), Access::TABLE);
    return *(const T*)from;
}
template <class T> KV_INLINE void kv_store(u64 to, T value) {
    emulated_access(to, sizeof(T), Access::STORE);
    *(T*)to = value;
}

inline u32 __float_as_uint(float value) {
    u32 bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(u32 bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline float __shfl_xor_sync(u32 mask, float value, int lane_xor) {
    return __uint_as_float(emulated_shuffle(mask, __float_as_uint(value), lane_xor));
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
// fmaxf ignores a NaN, as the instruction does.
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float fabsf(float a) { return __builtin_fabsf(a); }
// To the nearest, ties to even; NaN is 0, and what is too large the largest, as the instruction has it.
inline int __float2int_rn(float value) {
    if (value != value) return 0;
    if (value >= 2147483648.f) return 2147483647;
    if (value < -2147483648.f) return -2147483647 - 1;
    return (int)__builtin_nearbyintf(value);
}

// Bytes of each argument of a kernel, a digit each: a launch passes them one after the other.
template <class... Arguments> const char* emulated_widths(void (*)(Arguments...)) {
    static const char widths[] = {(char)('0' + sizeof(Arguments))..., 0};
    return widths;
}

// Conversions of the hardware, by their definition: to the nearest, ties to even.
float kv_f16_to_float(u16 bits);
u32 kv_floats_to_f16(float low, float high);
u32 kv_floats_to_bf16(float low, float high);
