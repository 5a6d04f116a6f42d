// Runs a kernel on the CPU, and finds what a GPU would not tell.
//
// Every thread of a block is a fiber; barriers and shuffles are where fibers meet, and the order in
// which they run is a parameter, so that a missing barrier is a result that depends on it. Shared
// memory holds NaN before every block. Accesses are checked for alignment and against the memory
// that was registered, and counted in 32-byte sectors per warp. Subnormal floats are zero, since CuPy
// builds kernels with -ftz=true.
#include "emulator.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

const u32 WARP = 32;
const size_t STACK_NBYTES = 64 << 10;
const u32 MAX_ARGUMENTS = 16;
const u32 SUBNORMALS_ARE_ZERO = 0x8040;  // MXCSR: results (FTZ) and operands (DAZ)
typedef void (*Kernel)(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64);

enum class State { NEW, READY, WAITING, DONE };
struct Left {};  // thrown to leave a kernel

struct Fiber {
    void* stack_pointer = nullptr;
    void* sanitizer = nullptr;
    State state = State::NEW;
    std::unordered_map<u64, u32> accesses;  // by instruction: how often it was reached
};
struct Warp {
    u32 round = 0, arrived = 0, mask = 0;
    u32 values[2][WARP];
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<char*> stacks;
    u32 current = 0, done = 0, at_barrier = 0, barrier = 0;
    void* main_pointer = nullptr;
    void* main_sanitizer = nullptr;
    const void* main_stack = nullptr;
    size_t main_nbytes = 0;
    Kernel kernel = nullptr;
    u64 arguments[MAX_ARGUMENTS];
    std::string error;
    u64 random = 1;
} machine;

std::map<u64, u64> registered;  // begin -> end
bool counts_sectors = false, logs_accesses = false;
// Of one instruction of a warp, the n-th time: the bytes of each sector it touches.
typedef std::unordered_map<u64, u32> Sectors;
std::map<std::tuple<u32, u64, u32>, Sectors> requests[3];
struct Count { u64 requests, sectors, bytes; } counts[3];
std::vector<u64> logged;  // (address, nbytes << 1 | is a store), one after the other

void fail(const std::string& what) {
    if (machine.error.empty())
        machine.error = what + " (block " + std::to_string(blockIdx.x) + ", thread " +
                        std::to_string(machine.current) + ")";
}

// ---- fibers: x86-64, System V ----------------------------------------------------------------

extern "C" void emulator_switch(void** save, void* to);
__asm__(
    ".text\n.globl emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emulator_switch,.-emulator_switch\n");

void switch_to_main(bool ends) {
    Fiber& fiber = machine.fibers[machine.current];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(ends ? nullptr : &fiber.sanitizer, machine.main_stack,
                                   machine.main_nbytes);
#endif
    emulator_switch(&fiber.stack_pointer, machine.main_pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.sanitizer, &machine.main_stack, &machine.main_nbytes);
#endif
    (void)ends;
}

void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_nbytes);
#endif
    try {
        const u64* a = machine.arguments;
        if (machine.error.empty())
            machine.kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10],
                           a[11], a[12], a[13], a[14], a[15]);
    } catch (Left&) {
    }
    machine.fibers[machine.current].state = State::DONE;
    machine.done++;
    switch_to_main(true);
    abort();
}

void resume(u32 thread) {
    Fiber& fiber = machine.fibers[thread];
    machine.current = threadIdx.x = thread;
    if (fiber.state == State::NEW) {
        u64* top = (u64*)(machine.stacks[thread] + STACK_NBYTES);
        *--top = 0;  // alignment as after a call
        *--top = (u64)run_fiber;
        for (int saved = 0; saved < 6; saved++) *--top = 0;
        fiber.stack_pointer = top;
    }
    fiber.state = State::READY;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&machine.main_sanitizer, machine.stacks[thread], STACK_NBYTES);
#endif
    emulator_switch(&machine.main_pointer, fiber.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(machine.main_sanitizer, nullptr, nullptr);
#endif
}

void leave(const std::string& what) {
    fail(what);
    throw Left();
}

// Until somebody calls wake; the caller asks again whether what it waits for has come.
void wait() {
    machine.fibers[machine.current].state = State::WAITING;
    switch_to_main(false);
    if (!machine.error.empty()) throw Left();
}

void wake(u32 thread) {
    if (machine.fibers[thread].state == State::WAITING)
        machine.fibers[thread].state = State::READY;
}

u32 random_below(u32 limit) {
    machine.random = machine.random * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)(machine.random >> 33) % limit;
}

void count_requests() {
    for (int kind = 0; kind < 3; kind++) {
        for (auto& request : requests[kind]) {
            counts[kind].requests++;
            counts[kind].sectors += request.second.size();
            for (auto& sector : request.second)
                counts[kind].bytes += __builtin_popcount(sector.second);
        }
        requests[kind].clear();
    }
}

void run_block(const std::vector<u32>& order, char* shared, u64 shared_nbytes) {
    const u32 threads = blockDim.x;
    memset(shared, 0xff, shared_nbytes);
    machine.done = machine.at_barrier = 0;
    machine.fibers.assign(threads, Fiber());
    machine.warps.assign((threads + WARP - 1) / WARP, Warp());
    while (machine.done < threads) {
        bool moved = false;
        for (u32 thread : order) {
            const State state = machine.fibers[thread].state;
            // After an error everybody is resumed, to leave.
            if (state == State::DONE || (state == State::WAITING && machine.error.empty()))
                continue;
            moved = true;
            resume(thread);
        }
        if (!moved) fail("a barrier or shuffle that some threads never reach");
    }
    count_requests();
}

}  // namespace

void emulated_access(u64 address, u32 nbytes, Access kind) {
    const bool stores = kind == Access::STORE;
    if (address % nbytes) leave("misaligned access of " + std::to_string(nbytes) + " bytes");
    auto after = registered.upper_bound(address);
    const u64 end = after == registered.begin() ? 0 : std::prev(after)->second;
    if (address >= end || end - address < nbytes)
        leave(std::string(stores ? "store" : "load") + " outside of the memory that was lent");
    if (logs_accesses) {
        logged.push_back(address);
        logged.push_back((u64)nbytes << 1 | stores);
    }
    if (counts_sectors) {
        const u64 instruction = (u64)__builtin_return_address(0);
        const u32 number = machine.fibers[machine.current].accesses[instruction]++;
        Sectors& sectors = requests[(int)kind][{machine.current / WARP, instruction, number}];
        for (u64 byte = address; byte < address + nbytes; byte++)
            sectors[byte / 32] |= 1u << byte % 32;
    }
}

void emulated_barrier() {
    if (machine.done) leave("__syncthreads, but some threads have ended");
    const u32 barrier = machine.barrier;
    if (++machine.at_barrier == blockDim.x) {
        machine.at_barrier = 0;
        machine.barrier++;
        for (u32 thread = 0; thread < blockDim.x; thread++) wake(thread);
    }
    while (machine.barrier == barrier) wait();
}

u32 emulated_shuffle(u32 mask, u32 value, u32 lane_xor) {
    const u32 lane = machine.current % WARP, first = machine.current - lane;
    Warp& warp = machine.warps[machine.current / WARP];
    const u32 from = lane ^ lane_xor;
    if (!(mask >> lane & 1)) leave("a shuffle whose mask lacks the caller");
    if (from >= WARP || !(mask >> from & 1)) leave("a shuffle from a lane outside of its mask");
    for (u32 l = 0; l < WARP; l++)
        if (mask >> l & 1 && (first + l >= blockDim.x ||
                              machine.fibers[first + l].state == State::DONE))
            leave("a shuffle whose mask names a lane that has ended");
    if (warp.arrived && warp.mask != mask) leave("shuffles of one warp with different masks");
    const u32 round = warp.round;
    warp.mask = mask;
    warp.values[round & 1][lane] = value;
    warp.arrived |= 1u << lane;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        warp.round++;
        for (u32 l = 0; l < WARP; l++)
            if (mask >> l & 1) wake(first + l);
    }
    while (warp.round == round) wait();
    return warp.values[round & 1][from];
}

float kv_f16_to_float(u16 bits) {
    const u32 sign = (u32)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, rest = bits & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | rest << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | rest << 13);
    const float small = (float)rest * 0x1p-24f;  // subnormal, or zero
    return __uint_as_float(sign | __float_as_uint(small));
}

static u32 float_to_f16(float value) {
    const u32 bits = __float_as_uint(value), sign = bits >> 16 & 0x8000;
    const float size = __builtin_fabsf(value);
    if (value != value) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;  // rounds to what is beyond the largest
    if (size < 0x1p-14f) return sign | (u32)__builtin_nearbyintf(size * 0x1p24f);
    const u32 normal = (bits & 0x7fffffff) - (112u << 23);
    return sign | ((normal + 0xfff + (normal >> 13 & 1)) >> 13);
}
u32 kv_floats_to_f16(float low, float high) {
    return float_to_f16(low) | float_to_f16(high) << 16;
}

static u32 float_to_bf16(float value) {
    const u32 bits = __float_as_uint(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
u32 kv_floats_to_bf16(float low, float high) {
    return float_to_bf16(low) | float_to_bf16(high) << 16;
}

// ---- for ctypes ------------------------------------------------------------------------------

extern char __start_kv_shared[] __attribute__((weak)), __stop_kv_shared[] __attribute__((weak));

// order: 0 forward, 1 reverse, 2 by ``seed``. Returns 0, or 1 with a message in ``error``.
extern "C" int emulator_run(Kernel kernel, u32 grid, u32 threads, const u64* arguments,
                            u32 num_arguments, int order, u64 seed, char* error, u32 error_nbytes) {
    if (num_arguments > MAX_ARGUMENTS) {
        snprintf(error, error_nbytes, "%u arguments, at most %u", num_arguments, MAX_ARGUMENTS);
        return 1;
    }
    machine.kernel = kernel;
    memset(machine.arguments, 0, sizeof machine.arguments);
    memcpy(machine.arguments, arguments, num_arguments * sizeof(u64));
    machine.error.clear();
    machine.random = seed * 2 + 1;
    gridDim.x = grid;
    blockDim.x = threads;
    while (machine.stacks.size() < threads)
        machine.stacks.push_back((char*)aligned_alloc(64, STACK_NBYTES));
    std::vector<u32> blocks(grid), fibers(threads);
    for (u32 i = 0; i < grid; i++) blocks[i] = i;
    for (u32 i = 0; i < threads; i++) fibers[i] = i;
    for (std::vector<u32>* all : {&blocks, &fibers}) {
        if (order == 1) std::reverse(all->begin(), all->end());
        if (order == 2)
            for (u32 i = (u32)all->size(); i > 1; i--) std::swap((*all)[i - 1], (*all)[random_below(i)]);
    }
    const u32 control = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(control | SUBNORMALS_ARE_ZERO);
    for (u32 block : blocks) {
        blockIdx.x = block;
        run_block(fibers, __start_kv_shared, __stop_kv_shared - __start_kv_shared);
        if (!machine.error.empty()) break;
    }
    __builtin_ia32_ldmxcsr(control);
    snprintf(error, error_nbytes, "%s", machine.error.c_str());
    return !machine.error.empty();
}

extern "C" void emulator_register(u64 address, u64 nbytes) { registered[address] = address + nbytes; }
extern "C" void emulator_unregister(u64 address) { registered.erase(address); }
extern "C" void emulator_count_sectors(int on) {
    counts_sectors = on;
    memset(counts, 0, sizeof counts);
}
// Loads, stores, loads of tables: requests of warps, sectors, bytes in them that were asked for.
extern "C" void emulator_counts(u64* to) { memcpy(to, counts, sizeof counts); }
extern "C" void emulator_log_accesses(int on) {
    logs_accesses = on;
    logged.clear();
}
extern "C" u64 emulator_logged(const u64** entries) {
    *entries = logged.data();
    return logged.size() / 2;
}
