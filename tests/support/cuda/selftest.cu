// Kernels that test the emulator; tests/support/cuda/test_emulator.py says what each has to do, and some are wrong on
// purpose. Valid CUDA, so that nvcc can be asked for a second opinion.

constexpr unsigned all_lanes = 0xffffffff;

// Each warp primitive: 16 results per thread, from `values`, one per thread.
extern "C" __global__ void warp_primitives(const unsigned* values, unsigned long long* results) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, value = values[thread];
    const unsigned long long wide = (unsigned long long)value << 32 | ~value;
    unsigned long long* result = results + 16ull * thread;
    result[0] = __shfl_sync(all_lanes, value, int(value % 32));
    result[1] = __shfl_up_sync(all_lanes, value, 3);
    result[2] = __shfl_down_sync(all_lanes, value, 5);
    result[3] = __shfl_xor_sync(all_lanes, value, 17);
    result[4] = __shfl_sync(all_lanes, wide, int(lane * 7 + 3));
    result[5] = __ballot_sync(all_lanes, int(value & 1));
    result[6] = (unsigned long long)(__any_sync(all_lanes, value % 64 == 0)) << 1 |
                (unsigned long long)__all_sync(all_lanes, value % 64 != 0);
    result[7] = __reduce_add_sync(all_lanes, value);
    result[8] = __reduce_max_sync(all_lanes, value);
    result[9] = __reduce_or_sync(all_lanes, value & 0x11111111);
    result[10] = (unsigned long long)(long long)__shfl_up_sync(all_lanes, int(value), 1);
    // Two groups that have diverged.
    const unsigned group = lane < 11 ? 0x7ff : ~0x7ffu;
    if (lane < 11) {
        result[11] = __reduce_add_sync(group, value);
        result[12] = __ballot_sync(group, int(value & 1));
    } else {
        __syncwarp(group);
        result[11] = __shfl_sync(group, value, 11);
        result[12] = __all_sync(group, 1) ? __reduce_max_sync(group, value) : 0;
    }
    result[13] = __shfl_down_sync(all_lanes, wide, 31);
    result[14] = result[15] = 0;
}

template <unsigned threads>
__device__ unsigned scan_block(unsigned value) {
    __shared__ unsigned totals[threads / 32];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (unsigned delta = 1; delta < 32; delta *= 2) {
        const unsigned before = __shfl_up_sync(all_lanes, value, delta);
        if (lane >= delta) value += before;
    }
    if (lane == 31) totals[warp] = value;
    __syncthreads();
    unsigned base = 0;
    for (unsigned i = 0; i < warp; i++) base += totals[i];
    __syncthreads();  // before the next call writes
    return base + value;
}

// Inclusive sums of each block's values, `rounds` times over.
extern "C" __global__ void __launch_bounds__(256) scan(const unsigned* values, unsigned* sums, unsigned rounds) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned value = values[thread];
#pragma unroll 1
    for (unsigned round = 0; round < rounds; round++)
        value = blockDim.x == 256 ? scan_block<256>(value) : scan_block<64>(value);
    sums[thread] = value;
}

// Reads what another thread has written: in the block, with a barrier (1) or without (0); in the warp, with __syncwarp
// (3) or without (2).
extern "C" __global__ void exchange(unsigned* results, unsigned mode) {
    __shared__ unsigned values[1024];
    values[threadIdx.x] = threadIdx.x;
    if (mode == 1) __syncthreads();
    if (mode == 3) __syncwarp();
    const unsigned other = mode < 2 ? blockDim.x - 1 - threadIdx.x : threadIdx.x ^ 31;
    results[threadIdx.x] = values[other];
}

// The order in which warps begin (twice a warp's number) and end (one more), with `rounds` of synchronisation between.
extern "C" __global__ void order(unsigned* results, unsigned* count, unsigned rounds) {
    const unsigned warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) results[atomicAdd(count, 1u)] = 2 * warp;
    for (unsigned round = 0; round < rounds; round++) __syncwarp();
    if (threadIdx.x % 32 == 0) results[atomicAdd(count, 1u)] = 2 * warp + 1;
}

// What shared memory contains at first, whether it is written afterwards or never.
extern "C" __global__ void read_unwritten(unsigned* results) {
    __shared__ unsigned before[32], never[32];
    __shared__ alignas(16) unsigned char bytes[128];
    unsigned* result = results + blockIdx.x * 96 + threadIdx.x;
    result[0] = before[threadIdx.x];
    result[32] = never[threadIdx.x];
    result[64] = reinterpret_cast<const unsigned*>(bytes)[threadIdx.x];
    before[threadIdx.x] = 0;
    reinterpret_cast<unsigned*>(bytes)[threadIdx.x] = 0;
}

// Mistakes with barriers, by number; 64 threads.
extern "C" __global__ void diverge(unsigned mistake) {
    const unsigned thread = threadIdx.x, lane = thread % 32;
    switch (mistake) {
        case 0:  // none: groups of lanes that go on while others still wait for each other
            for (unsigned i = 0; i < 4; i++) {
                __syncwarp(lane % 2 ? 0xaaaaaaaa : 0x55555555);
                if (lane / 4 == i) __any_sync(0xfu << 4 * i, 1);
            }
            __syncwarp();
            break;
        case 1:  // some threads are done already
            if (thread < 40) __syncthreads();
            break;
        case 2:  // a lane waits for the block, the others for it
            if (thread == 7) __syncthreads();
            else __syncwarp();
            break;
        case 3:  // a lane of the mask has exited
            if (lane == 3) return;
            __syncwarp();
            break;
        case 4:  // two masks
            __ballot_sync(lane < 16 ? 0x1ffff : 0xffff0000, 1);
            break;
        case 5:  // two primitives
            if (lane < 16) __any_sync(all_lanes, 1);
            else __all_sync(all_lanes, 1);
            break;
        case 6:  // reads from outside the mask
            if (lane < 16) __shfl_sync(0xffff, lane, 16);
            break;
        case 7:  // not in its own mask
            __reduce_add_sync(0xfffffffe, lane);
            break;
        case 8:  // one warp waits for the block, one lane of the other for lanes that never come
            if (thread < 32) __syncthreads();
            else if (lane == 0) __syncwarp(3);
            else if (lane == 1) __syncwarp(6);
            else if (lane == 2) __syncwarp(5);
            else __syncthreads();
            break;
        case 9:  // one warp waits for the block, the other leaves long afterwards
            if (thread < 32) __syncthreads();
            else
                for (unsigned i = 0; i < 200; i++) __syncwarp();
            break;
        case 10:  // the other way round
            if (thread < 32)
                for (unsigned i = 0; i < 200; i++) __syncwarp();
            if (thread < 32) __syncthreads();
            break;
    }
}

// Behind a call, where UBSan's check of object sizes does not see them and ASan must.
__device__ __noinline__ unsigned read(const unsigned* address) { return *address; }
__device__ __noinline__ void write(unsigned char* address) { *address = 5; }

// Accesses that only the form with sanitizers must catch, by number.
struct Place {
    unsigned long long bytes, size;
};
extern "C" __global__ void stray(const __grid_constant__ Place place, unsigned mistake, int index, unsigned* result) {
    __shared__ unsigned words[7];
    __shared__ unsigned char bytes[13];
    const unsigned char* data = reinterpret_cast<const unsigned char*>(place.bytes);
    unsigned sum = 0, local[5] = {1, 2, 3, 4, 5};
    words[threadIdx.x % 7] = 1;
    bytes[threadIdx.x % 13] = 1;
    switch (mistake) {
        case 0: sum = data[index]; break;
        case 1: sum = reinterpret_cast<const uint4*>(data + index)->w; break;
        case 2: sum = reinterpret_cast<const ushort4*>(data + index)->w; break;
        case 3: sum = read(words + index); break;
        case 4: write(bytes + index); break;
        case 5: words[index] = 5; break;
        case 6: sum = read(local + index); break;
    }
    *result = sum;
}

// Intrinsics, 16 results for each thread of three operands.
extern "C" __global__ void intrinsics(const uint3* operands, unsigned long long* results) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned a = __ldg(&operands[thread].x), b = operands[thread].y, c = operands[thread].z;
    unsigned long long* result = results + 16ull * thread;
    result[0] = __byte_perm(a, b, c);
    result[1] = __funnelshift_l(a, b, c);
    result[2] = __funnelshift_r(a, b, c);
    result[3] = __brev(a);
    result[4] = unsigned(__popc(a));
    result[5] = unsigned(__clz(int(a)));
    result[6] = unsigned(__ffs(int(a)));
    result[7] = __umulhi(a, b);
    result[8] = unsigned(min(int(a), int(b)));
    result[9] = min(a, b);
    result[10] = max(int(a), b);  // compares without sign
    result[11] = max((unsigned long long)a << c % 32, (unsigned long long)b);
    result[12] = (unsigned long long)(min((long long)int(a), (long long)int(b)));
    result[13] = (unsigned long long)(unsigned)__clzll((long long)a << 7) << 32 | (unsigned)__ffsll((long long)a << 9);
    __stcs(result + 14, 1ull * __ldcs(&operands[thread].x) + __ldcg(&operands[thread].y));
    result[15] = (unsigned)__popcll(1ull * a * b);
}

extern "C" __global__ void atomics(unsigned* totals, unsigned long long* wide) {
    atomicAdd(totals, threadIdx.x);
    atomicOr(totals + 1, 1u << threadIdx.x % 32);
    atomicMax(totals + 2, threadIdx.x ^ 21);
    atomicAdd(wide, 1ull << 32);
    __threadfence();
}

// As much synchronization as in a large kernel: 20 barriers and 100 warp primitives per thread.
extern "C" __global__ void busy(unsigned* result) {
    unsigned value = threadIdx.x;
    for (unsigned i = 0; i < 20; i++) {
        for (unsigned j = 0; j < 5; j++) value = 4 * value + __shfl_xor_sync(all_lanes, value, 1 << j);
        __syncthreads();
    }
    result[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

// Local arrays of a depth that needs the stack.
extern "C" __global__ void deep(unsigned* result, unsigned depth) {
    volatile unsigned local[2048];
    for (unsigned i = 0; i < 2048; i++) local[i] = i ^ threadIdx.x;
    __syncthreads();
    unsigned sum = 0;
    for (unsigned i = 0; i < depth; i++) sum += local[i];
    result[threadIdx.x] = sum;
}
