// CUDA C++ on the CPU, as far as this project's kernels use it: it tests a kernel's logic where there is no GPU.
//
// driver.cpp includes this header, then the .cu file, and g++ compiles everything as ordinary C++. Each CUDA thread of
// a block is a fibre with its own stack; the blocks of a launch run one after another. A fibre runs until its next
// barrier or warp primitive; then a random one of those that can continue takes over. Lanes are never in lockstep, so
// that a missing barrier gives wrong results for most seeds. Behaviour that is undefined on a GPU and noticed here ends
// the launch with one line (`fail`), and so do some things that are merely dubious.
//
// What it does not show: that a GPU has its own memory order. Here a shuffle orders memory like __syncwarp, nothing
// interrupts a thread between two barriers, and copies are never asynchronous.
#pragma once
#define CUDA_ON_CPU 1

#include <sys/mman.h>

#include <climits>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---------------------------------------------------------------- words of the language

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// All shared variables are in one section, so that it can be filled before each block. Blocks do not overlap: one copy
// is enough.
#define __shared__ static __attribute__((section("cuda_shared")))

// With CUDA's alignments, which UBSan checks.
#define CUDA_ON_CPU_VECTOR(type, name, align2, align4)                          \
    struct alignas(align2) name##2 { type x, y; };                              \
    struct name##3 { type x, y, z; };                                           \
    struct alignas(align4) name##4 { type x, y, z, w; };                        \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(unsigned char, uchar, 2, 4)
CUDA_ON_CPU_VECTOR(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTOR(short, short, 4, 8)
CUDA_ON_CPU_VECTOR(int, int, 8, 16)
CUDA_ON_CPU_VECTOR(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTOR(float, float, 8, 16)
CUDA_ON_CPU_VECTOR(long long, longlong, 16, 16)
CUDA_ON_CPU_VECTOR(unsigned long long, ulonglong, 16, 16)
#undef CUDA_ON_CPU_VECTOR

static uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------- switching stacks

// Saves the registers that a function must preserve on the running stack, stores the stack pointer through `from`, and
// continues on the other stack. swapcontext() would do, but takes two system calls per switch, most of the time of a
// launch.
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
    .pushsection .text
    .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cuda_on_cpu_switch, .-cuda_on_cpu_switch
    .popsection
)");
constexpr int cuda_on_cpu_saved_words = 8, cuda_on_cpu_entry_word = 6;  // the latter replaces a return address
#elif defined(__aarch64__)
asm(R"(
    .pushsection .text
    .type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cuda_on_cpu_switch, .-cuda_on_cpu_switch
    .popsection
)");
constexpr int cuda_on_cpu_saved_words = 20, cuda_on_cpu_entry_word = 11;
#else
#error "cuda_on_cpu.h: write cuda_on_cpu_switch for this CPU"
#endif

// ---------------------------------------------------------------- threads, warps, the scheduler

// The bounds of the section, set by the linker; null if there are no shared variables.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_cuda_shared[], __stop_cuda_shared[];

// Shared memory has its own addresses. They do not start at 0: from compute capability 9.0 on, a kilobyte precedes the
// variables, so that an address has no more alignment than its variable was given.
constexpr size_t cuda_on_cpu_shared_base = 0x400;
inline size_t __cvta_generic_to_shared(const void* pointer) {
    return cuda_on_cpu_shared_base + size_t(static_cast<const unsigned char*>(pointer) - __start_cuda_shared);
}
inline void* __cvta_shared_to_generic(size_t address) {
    return __start_cuda_shared + (address - cuda_on_cpu_shared_base);
}

namespace cuda_on_cpu {

constexpr unsigned most_threads = 1024, caller = most_threads;   // the caller of `launch` is one more fibre
constexpr size_t stack_size = 256 << 10, guard_size = 64 << 10;  // untouched pages are free; pages have up to 64 KiB

enum Primitive : unsigned {
    syncwarp,
    shfl,
    shfl_up,
    shfl_down,
    shfl_xor,
    ballot,
    any,
    all,
    reduce_add,
    reduce_max,
    reduce_or
};
constexpr const char* names[] = {"__syncwarp",        "__shfl_sync",       "__shfl_up_sync",  "__shfl_down_sync",
                                 "__shfl_xor_sync",   "__ballot_sync",     "__any_sync",      "__all_sync",
                                 "__reduce_add_sync", "__reduce_max_sync", "__reduce_or_sync"};

struct alignas(64) Thread {
    void* stack_pointer;    // while it does not run
    void* sanitizer_stack;  // likewise, ASan's
    // While it waits at a warp primitive: which one, for which lanes, its value, which lane it reads; and the result.
    Primitive primitive;
    unsigned mask, source;
    unsigned long long value, result;
};

struct Warp {
    unsigned alive, at_primitive, at_barrier;  // sets of lanes; one that never existed counts as exited
    unsigned priority;
};

static struct Machine {
    Thread threads[most_threads + 1];
    Warp warps[most_threads / warpSize];
    unsigned short runnable[most_threads];
    unsigned current = caller, runnable_count, at_barrier, exited;
    unsigned candidates;  // number of runnable threads among which the warps' priorities decide; 1: purely random
    unsigned long long random, seed;
    unsigned char* stacks;
    const char* kernel;
    void (*run)(const void* const* arguments);
    const void* const* arguments;
    bool failed;
    char message[512];
} machine;

inline unsigned char* stack_of(unsigned thread) {
    return machine.stacks + thread * (stack_size + guard_size) + guard_size;
}

inline __attribute__((always_inline)) unsigned random_word(unsigned long long& state) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return unsigned(state >> 32);
}
inline unsigned random_below(unsigned bound) { return unsigned(1ull * random_word(machine.random) * bound >> 32); }
// A state far from this one, so that the two sequences have nothing in common.
inline unsigned long long elsewhere(unsigned long long state) { return (state ^ state >> 31) * 0xbf58476d1ce4e5b9u; }

// noipa: what the compiler knows about memory must not survive the call, as other threads run meanwhile.
__attribute__((noipa)) static void switch_to(unsigned next) {
    const unsigned self = machine.current;
    if (next == self) return;
    machine.current = next;
    threadIdx.x = next;
#ifdef __SANITIZE_ADDRESS__
    static const void* caller_stack;
    static size_t caller_stack_size;
    if (!caller_stack) {
        pthread_attr_t attributes;
        void* bottom;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &bottom, &caller_stack_size);
        pthread_attr_destroy(&attributes);
        caller_stack = bottom;
    }
    __sanitizer_start_switch_fiber(&machine.threads[self].sanitizer_stack,
                                   next == caller ? caller_stack : stack_of(next),
                                   next == caller ? caller_stack_size : stack_size);
#endif
    cuda_on_cpu_switch(&machine.threads[self].stack_pointer, machine.threads[next].stack_pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(machine.threads[self].sanitizer_stack, nullptr, nullptr);
#endif
}

// Ends the launch: the caller takes over and no thread of it runs again.
[[noreturn]] __attribute__((format(printf, 1, 2), cold)) static void fail(const char* format, ...) {
    const int length = snprintf(machine.message, sizeof machine.message,
                                "%.200s <<<%u, %u>>>, seed %llu, block %u, thread %u: ", machine.kernel, gridDim.x,
                                blockDim.x, machine.seed, blockIdx.x, machine.current);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(machine.message + length, sizeof machine.message - size_t(length), format, arguments);
    va_end(arguments);
    machine.failed = true;
    switch_to(caller);
    __builtin_unreachable();
}

inline void make_runnable(unsigned thread) {
    machine.runnable[machine.runnable_count++] = static_cast<unsigned short>(thread);
}

// Runs another thread, or by chance this one again: the best of a few random candidates. With one candidate, all
// threads advance at about the same rate; with more, warps of high priority run far ahead, as they may on a GPU.
static void run_next() {
    if (!machine.runnable_count) {
        unsigned thread = 0;  // one that waits at a warp primitive: if all waited at the barrier, they would not wait
        while (!(machine.warps[thread / warpSize].at_primitive >> thread % warpSize & 1)) thread++;
        fail("deadlock: no thread can go on; thread %u waits at %s with mask 0x%08x,"
             " lanes 0x%08x of its warp wait at one",
             thread, names[machine.threads[thread].primitive], machine.threads[thread].mask,
             machine.warps[thread / warpSize].at_primitive);
    }
    unsigned best = random_below(machine.runnable_count);
    for (unsigned i = 1; i < machine.candidates; i++) {
        const unsigned other = random_below(machine.runnable_count);
        if (machine.warps[machine.runnable[other] / warpSize].priority <
            machine.warps[machine.runnable[best] / warpSize].priority)
            best = other;
    }
    const unsigned next = machine.runnable[best];
    machine.runnable[best] = machine.runnable[--machine.runnable_count];
    switch_to(next);
}

inline unsigned first_lane(unsigned lanes) { return unsigned(__builtin_ctz(lanes)); }

template <class Action>
inline void for_each_lane(unsigned lanes, Action action) {
    for (; lanes; lanes &= lanes - 1) action(first_lane(lanes));
}

// A thread that leaves for `where` must not be missed at a warp primitive.
inline void check_not_awaited(const char* where) {
    const unsigned self = machine.current, lane = self % warpSize;
    for_each_lane(machine.warps[self / warpSize].at_primitive, [&](unsigned other) {
        const Thread& thread = machine.threads[self - lane + other];
        if (thread.mask >> lane & 1)
            fail("%s while lane %u waits for it at %s with mask 0x%08x", where, other, names[thread.primitive],
                 thread.mask);
    });
}

// Waits until every lane of `mask` is here; the last one lets `combine` compute the results of all from their values.
static unsigned long long warp_primitive(Primitive primitive, unsigned mask, unsigned long long value, unsigned source,
                                         void (*combine)(Thread* lanes, unsigned mask)) {
    const unsigned self = machine.current, lane = self % warpSize;
    Warp& warp = machine.warps[self / warpSize];
    Thread* const lanes = &machine.threads[self - lane];
    if (!(mask >> lane & 1)) fail("%s with mask 0x%08x, which lacks the calling lane %u", names[primitive], mask, lane);
    if (mask & ~warp.alive)
        fail("%s with mask 0x%08x, but lanes 0x%08x have exited or do not exist", names[primitive], mask,
             mask & ~warp.alive);
    if (mask & warp.at_barrier)
        fail("%s with mask 0x%08x, but lanes 0x%08x wait at __syncthreads", names[primitive], mask,
             mask & warp.at_barrier);
    unsigned here = 1u << lane;  // lanes that are here, including this one
    for_each_lane(mask & warp.at_primitive, [&](unsigned other) {
        const Thread& thread = lanes[other];
        if (thread.primitive == primitive && thread.mask == mask) here |= 1u << other;
        // Else it may come later, unless it waits for this one in turn.
        else if (thread.mask >> lane & 1)
            fail("%s with mask 0x%08x, but lane %u waits at %s with mask 0x%08x", names[primitive], mask, other,
                 names[thread.primitive], thread.mask);
    });
    lanes[lane].primitive = primitive;
    lanes[lane].mask = mask;
    lanes[lane].value = value;
    lanes[lane].source = source;
    warp.at_primitive |= 1u << lane;
    if (here == mask) {
        combine(lanes, mask);
        warp.at_primitive &= ~mask;
        for_each_lane(mask, [&](unsigned other) { make_runnable(self - lane + other); });
    }
    run_next();
    return lanes[lane].result;
}

template <class T>
inline T shuffle(Primitive primitive, unsigned mask, T value, unsigned source) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "CUDA shuffles 32-bit and 64-bit numbers");
    unsigned long long bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = warp_primitive(primitive, mask, bits, source, [](Thread* lanes, unsigned mask) {
        for_each_lane(mask, [&](unsigned lane) {
            const unsigned from = lanes[lane].source;
            if (!(mask >> from & 1))
                fail("%s with mask 0x%08x: lane %u reads lane %u, which is not in it", names[lanes[lane].primitive],
                     mask, lane, from);
            lanes[lane].result = lanes[from].value;
        });
    });
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Each lane gets the folded values of all.
template <unsigned (*fold)(unsigned total, unsigned value, unsigned lane)>
inline unsigned reduce(Primitive primitive, unsigned mask, unsigned value) {
    return unsigned(warp_primitive(primitive, mask, value, 0, [](Thread* lanes, unsigned mask) {
        unsigned total = 0;
        for_each_lane(mask, [&](unsigned lane) { total = fold(total, unsigned(lanes[lane].value), lane); });
        for_each_lane(mask, [&](unsigned lane) { lanes[lane].result = total; });
    }));
}
inline unsigned fold_add(unsigned total, unsigned value, unsigned) { return total + value; }
inline unsigned fold_max(unsigned total, unsigned value, unsigned) { return total > value ? total : value; }
inline unsigned fold_or(unsigned total, unsigned value, unsigned) { return total | value; }
inline unsigned fold_votes(unsigned total, unsigned value, unsigned lane) {
    return total | unsigned(value != 0) << lane;
}

// ---------------------------------------------------------------- launching

[[noreturn]] static void fibre() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    for (;;) {  // once for each block
        machine.run(machine.arguments);
        check_not_awaited("exits");
        if (machine.at_barrier) fail("exits while %u threads wait at __syncthreads", machine.at_barrier);
        machine.warps[machine.current / warpSize].alive &= ~(1u << machine.current % warpSize);
        if (++machine.exited == blockDim.x) switch_to(caller);
        else run_next();
    }
}

// Lets each fibre start from its beginning. The stacks are made once, each above pages that may not be touched.
static void prepare_fibres() {
    if (!machine.stacks) {
        void* stacks = mmap(nullptr, most_threads * (stack_size + guard_size), PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        machine.stacks = stacks == MAP_FAILED ? nullptr : static_cast<unsigned char*>(stacks);
        for (unsigned thread = 0; thread < most_threads; thread++)
            if (!machine.stacks || mprotect(stack_of(thread), stack_size, PROT_READ | PROT_WRITE)) {
                perror("cuda_on_cpu: no memory for the threads' stacks");
                __builtin_trap();
            }
    }
    for (unsigned thread = 0; thread < most_threads; thread++) {
        auto words = reinterpret_cast<void**>(stack_of(thread) + stack_size) - cuda_on_cpu_saved_words;
        memset(words, 0, sizeof(void*) * cuda_on_cpu_saved_words);
        words[cuda_on_cpu_entry_word] = reinterpret_cast<void*>(&fibre);
        machine.threads[thread].stack_pointer = words;
    }
}

// Shared memory has arbitrary content when a block starts. Not set with memset or the like, as the space between the
// variables belongs to ASan; and with random numbers of its own, as that space must not change the order of threads.
__attribute__((no_sanitize("address", "undefined"))) static void poison_shared() {
    unsigned long long state = elsewhere(machine.random);
    unsigned char* place = __start_cuda_shared;
    for (; __stop_cuda_shared - place >= 4; place += 4) {
        const unsigned pattern = random_word(state);
        __builtin_memcpy(place, &pattern, 4);
    }
    for (; place < __stop_cuda_shared; place++) *place = static_cast<unsigned char>(random_word(state));
}

// Returns whether everything went well; if not, machine.message says what went wrong.
static bool launch(const char* kernel, void (*run)(const void* const*), unsigned grid, unsigned block,
                   const void* const* arguments, unsigned long long seed) {
    machine.kernel = kernel, machine.run = run, machine.arguments = arguments, machine.seed = seed;
    machine.failed = false;
    blockIdx = {0, 0, 0}, gridDim = {grid, 1, 1}, blockDim = {block, 1, 1};
    if (grid == 0 || block == 0 || block > most_threads) {
        snprintf(machine.message, sizeof machine.message,
                 "%.200s <<<%u, %u>>>: a grid has 1 block at least, a block 1 to %u threads", kernel, grid, block,
                 most_threads);
        return false;
    }
    if (!machine.stacks) prepare_fibres();
    machine.candidates = 1u << seed % 4;
    machine.random = elsewhere((seed + 1) * 0x9e3779b97f4a7c15u);
    const unsigned first_block = random_below(grid);  // from there, round and up or down
    for (unsigned i = 0; i < grid; i++) {
        blockIdx.x = unsigned((1ull * first_block + (seed & 1 ? grid - i : i)) % grid);
        poison_shared();
        machine.at_barrier = machine.exited = machine.runnable_count = 0;
        for (Warp& warp : machine.warps) warp = {0, 0, 0, random_below(UINT_MAX)};
        for (unsigned thread = 0; thread < block; thread++) {
            machine.warps[thread / warpSize].alive |= 1u << thread % warpSize;
            make_runnable(thread);
        }
        run_next();
        if (machine.failed) {
            prepare_fibres();
            return false;
        }
    }
    return true;
}

}  // namespace cuda_on_cpu

// ---------------------------------------------------------------- barriers and warp primitives

// A GPU does not wait for threads that have exited. A kernel that relies on this is probably wrong.
inline void __syncthreads() {
    using namespace cuda_on_cpu;
    check_not_awaited("__syncthreads");
    if (machine.exited) fail("__syncthreads, but %u threads of the block have exited", machine.exited);
    machine.warps[machine.current / warpSize].at_barrier |= 1u << machine.current % warpSize;
    if (++machine.at_barrier == blockDim.x) {
        machine.at_barrier = 0;
        for (Warp& warp : machine.warps) warp.at_barrier = 0;
        for (unsigned thread = 0; thread < blockDim.x; thread++) make_runnable(thread);
    }
    run_next();
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
    cuda_on_cpu::warp_primitive(cuda_on_cpu::syncwarp, mask, 0, 0, [](cuda_on_cpu::Thread*, unsigned) {});
}

// A lane whose source would lie outside the warp reads itself.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::shfl, mask, value, unsigned(lane) % warpSize);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    const unsigned lane = threadIdx.x % warpSize;
    return cuda_on_cpu::shuffle(cuda_on_cpu::shfl_up, mask, value, delta <= lane ? lane - delta : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    const unsigned lane = threadIdx.x % warpSize;
    return cuda_on_cpu::shuffle(cuda_on_cpu::shfl_down, mask, value, delta < warpSize - lane ? lane + delta : lane);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    const unsigned lane = threadIdx.x % warpSize, source = lane ^ unsigned(lanes);
    return cuda_on_cpu::shuffle(cuda_on_cpu::shfl_xor, mask, value, source < warpSize ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
    return cuda_on_cpu::reduce<cuda_on_cpu::fold_votes>(cuda_on_cpu::ballot, mask, unsigned(value));
}
inline int __any_sync(unsigned mask, int value) {
    return cuda_on_cpu::reduce<cuda_on_cpu::fold_votes>(cuda_on_cpu::any, mask, unsigned(value)) != 0;
}
inline int __all_sync(unsigned mask, int value) {
    return cuda_on_cpu::reduce<cuda_on_cpu::fold_votes>(cuda_on_cpu::all, mask, unsigned(value)) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    return cuda_on_cpu::reduce<cuda_on_cpu::fold_add>(cuda_on_cpu::reduce_add, mask, value);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return cuda_on_cpu::reduce<cuda_on_cpu::fold_max>(cuda_on_cpu::reduce_max, mask, value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return cuda_on_cpu::reduce<cuda_on_cpu::fold_or>(cuda_on_cpu::reduce_or, mask, value);
}

// The lanes that have the same value.
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) result |= unsigned(__shfl_sync(mask, value, lane) == value) << lane;
    return result;
}

// ---------------------------------------------------------------- memory

// Nothing runs at the same time and threads are not interrupted here: plain accesses are atomic.
#define CUDA_ON_CPU_ONE_ACCESS(T) \
    static_assert(sizeof(T) <= 16 && alignof(T) == sizeof(T), "a GPU does not load or store this at once")
template <class T>
inline T __ldg(const T* address) {
    CUDA_ON_CPU_ONE_ACCESS(T);
    return *address;
}
template <class T>
inline T __ldcs(const T* address) {
    CUDA_ON_CPU_ONE_ACCESS(T);
    return *address;
}
template <class T>
inline T __ldcg(const T* address) {
    CUDA_ON_CPU_ONE_ACCESS(T);
    return *address;
}
template <class T>
inline void __stcs(T* address, T value) {
    CUDA_ON_CPU_ONE_ACCESS(T);
    *address = value;
}
#define CUDA_ON_CPU_ATOMIC(name, Type, result)    \
    inline Type name(Type* address, Type value) { \
        const Type old = *address;                \
        *address = result;                        \
        return old;                               \
    }
CUDA_ON_CPU_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(value)))
CUDA_ON_CPU_ATOMIC(atomicAdd, unsigned, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, unsigned long long, old + value)
CUDA_ON_CPU_ATOMIC(atomicOr, unsigned, old | value)
CUDA_ON_CPU_ATOMIC(atomicOr, unsigned long long, old | value)
CUDA_ON_CPU_ATOMIC(atomicMax, unsigned, old > value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicMax, unsigned long long, old > value ? old : value)
#undef CUDA_ON_CPU_ATOMIC
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { cuda_on_cpu::fail("__trap"); }

// ---------------------------------------------------------------- integers

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((1ull * high << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((1ull * high << 32 | low) >> (shift & 31));
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(static_cast<unsigned long long>(value)) : 64; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline unsigned __umulhi(unsigned left, unsigned right) { return unsigned(1ull * left * right >> 32); }
inline unsigned __brev(unsigned value) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; bit++) reversed |= (value >> bit & 1) << (31 - bit);
    return reversed;
}
// PTX's prmt: byte i of the result is byte n % 8 of high:low, where n is nibble i of the selector; or, if n > 7, that
// byte's sign eight times.
inline unsigned cuda_on_cpu_prmt(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = 1ull * high << 32 | low;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned n = selector >> 4 * i & 15, byte = unsigned(bytes >> 8 * (n % 8)) & 255;
        result |= (n < 8 ? byte : byte & 128 ? 255u : 0u) << 8 * i;
    }
    return result;
}
// nvcc clears bit 3 of each nibble first, so that there are no signs.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    return cuda_on_cpu_prmt(low, high, selector & 0x7777);
}

// Exactly CUDA's set of overloads: what is ambiguous there is ambiguous here.
#define CUDA_ON_CPU_MIN_MAX(Result, Left, Right)                                                 \
    inline Result min(Left a, Right b) { return Result(a) < Result(b) ? Result(a) : Result(b); } \
    inline Result max(Left a, Right b) { return Result(a) > Result(b) ? Result(a) : Result(b); }
#define CUDA_ON_CPU_MIN_MAX_OF(Signed, Unsigned)      \
    CUDA_ON_CPU_MIN_MAX(Signed, Signed, Signed)       \
    CUDA_ON_CPU_MIN_MAX(Unsigned, Unsigned, Unsigned) \
    CUDA_ON_CPU_MIN_MAX(Unsigned, Signed, Unsigned)   \
    CUDA_ON_CPU_MIN_MAX(Unsigned, Unsigned, Signed)
using cuda_on_cpu_ulong = unsigned long;
using cuda_on_cpu_ulonglong = unsigned long long;
using cuda_on_cpu_longlong = long long;
CUDA_ON_CPU_MIN_MAX(float, float, float)
CUDA_ON_CPU_MIN_MAX_OF(int, unsigned)
CUDA_ON_CPU_MIN_MAX_OF(long, cuda_on_cpu_ulong)
CUDA_ON_CPU_MIN_MAX_OF(cuda_on_cpu_longlong, cuda_on_cpu_ulonglong)
#undef CUDA_ON_CPU_MIN_MAX_OF
#undef CUDA_ON_CPU_MIN_MAX
