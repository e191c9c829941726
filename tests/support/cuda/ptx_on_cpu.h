// What translated PTX (ptx.py) calls on the CPU. Included by the translation, which driver.cpp includes.
//
// A GPU does not order what its threads do to memory unless a barrier does; here every access is compared with the last
// ones to the same bytes, or pairs of bytes where no single byte is stored. Two of different threads, at least one of them a write, are a race, whatever the order in
// which this machine happens to run them, unless a bar.sync or, within a warp, a bar.warp.sync lies between. Shuffles and
// matches order nothing. A cp.async arrives at once or when it is waited for; until then its bytes belong to nobody.
// Bounds of global memory are ASan's affair, those of shared memory are checked here.
#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#pragma GCC diagnostic ignored "-Wunused-label"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-function"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
using s8 = signed char;
using s16 = short;
using s32 = int;
using s64 = long long;

namespace ptx {

using cuda_on_cpu::fail;
using cuda_on_cpu::machine;

constexpr u32 unit = PTX_UNIT;  // bytes per shadow
constexpr u32 shared_base = 0x400, shared_bytes = 64 << 10, most_warps = 8;
constexpr u64 shared_window = 1ull << 40;  // where shared memory begins among generic addresses

__shared__ __attribute__((aligned(256))) u8 shared[shared_bytes];

// When a thread did something: the barriers it had passed.
struct Moment {
    u32 block = 0, barriers = 0, warp_barriers = 0, thread = 0;  // block 0: never
    bool several = false;                                        // lanes of the warp, of which `thread` is one
};

struct Shadow {
    bool owned = false;   // by a variable
    u32 in_flight = 0;   // the thread whose cp.async will write here, plus one
    Moment write, reads[most_warps];
};

struct Copy {
    u64 to, from;
    bool arrived;
};

static std::vector<Shadow> shared_shadow(shared_bytes / unit);
static std::unordered_map<u64, Moment> global_writes;  // by address / unit
static Moment now[cuda_on_cpu::most_threads];
static std::vector<Copy> copies[cuda_on_cpu::most_threads];
static u32 to_come = 0;  // threads of the launch that have not started
static u32 block = 0;    // a number of its own for each

inline Moment& mine() { return now[threadIdx.x]; }

// Every thread calls this first. `variables`: begin and end of each shared variable.
inline void enter(const u32 (*variables)[2], u32 count) {
    if (blockDim.x > most_warps * warpSize) fail("more than %u threads", most_warps * warpSize);
    if (to_come == 0) {
        to_come = gridDim.x * blockDim.x;
        global_writes.clear();
        for (Shadow& shadow : shared_shadow) shadow.owned = false, shadow.in_flight = 0;
        for (u32 i = 0; i < count; i++)
            for (u32 at = variables[i][0]; at < variables[i][1]; at += unit)
                shared_shadow[(at - shared_base) / unit].owned = true;
    }
    if (to_come-- % blockDim.x == 0) block++;
    mine() = {block, 0, 0, threadIdx.x, false};
    copies[threadIdx.x].clear();
}

inline void leave() {
    if (!copies[threadIdx.x].empty()) fail("exits with a cp.async under way");
}

// Whether what happened then is visible to this thread now. Blocks are never ordered.
inline bool is_before(const Moment& then) {
    const Moment& self = mine();
    if (!then.block) return true;
    if (then.block != self.block) return false;
    return then.barriers < self.barriers || (then.thread == self.thread && !then.several) ||
           (then.thread / warpSize == self.thread / warpSize && then.warp_barriers < self.warp_barriers);
}

inline void check(const Moment& then, const char* what, u64 address, int line) {
    if (!is_before(then))
        fail("line %d: race, %s of 0x%llx, with thread %u%s", line, what, address, then.thread,
             then.several ? " and others" : "");
}

// Shared memory is another one for each block.
inline void check_in_block(const Moment& then, const char* what, u64 address, int line) {
    if (then.block == block) check(then, what, address, line);
}

inline u32 first_unit(u64 address, u32 size, int line) {
    if (address % size) fail("line %d: shared address 0x%llx is not aligned to %u", line, address, size);
    if (address < shared_base || address + size > shared_base + shared_bytes)
        fail("line %d: shared address 0x%llx", line, address);
    return u32(address - shared_base) / unit;
}

inline Shadow& shadow_of(u32 index, u64 address, int line) {
    Shadow& shadow = shared_shadow[index];
    if (!shadow.owned) fail("line %d: shared address 0x%llx, outside all variables", line, address);
    if (shadow.in_flight)
        fail("line %d: race, 0x%llx, with the cp.async of thread %u", line, address, shadow.in_flight - 1);
    return shadow;
}

inline u8* read_shared(u64 address, u32 size, int line = __builtin_LINE()) {
    const u32 first = first_unit(address, size, line);
    for (u32 i = first; i <= first + (size - 1) / unit; i++) {
        Shadow& shadow = shadow_of(i, address, line);
        check_in_block(shadow.write, "read after write", address, line);
        Moment& last = shadow.reads[threadIdx.x / warpSize];
        const Moment& self = mine();
        const bool again = last.block == self.block && last.barriers == self.barriers &&
                           last.warp_barriers == self.warp_barriers;
        if (again && last.thread != self.thread) last.several = true;
        else if (!again) last = self;
    }
    return shared + (address - shared_base);
}

inline u8* write_shared(u64 address, u32 size, int line = __builtin_LINE()) {
    const u32 first = first_unit(address, size, line);
    for (u32 i = first; i <= first + (size - 1) / unit; i++) {
        Shadow& shadow = shadow_of(i, address, line);
        check_in_block(shadow.write, "write after write", address, line);
        for (const Moment& read : shadow.reads) check_in_block(read, "write after read", address, line);
        shadow.write = mine();
    }
    return shared + (address - shared_base);
}

// `constant`: ld.global.nc, which may take its bytes from a cache that nobody updates.
inline u8* read_global(u64 address, u32 size, bool constant, int line = __builtin_LINE()) {
    if (address % size) fail("line %d: global address not aligned to %u", line, size);
    for (u64 i = address / unit; i <= (address + size - 1) / unit; i++) {
        const auto found = global_writes.find(i);
        if (found == global_writes.end()) continue;
        if (constant) fail("line %d: ld.global.nc of what the kernel has written", line);
        check(found->second, "global read after write", address, line);
    }
    return reinterpret_cast<u8*>(address);
}

inline u8* write_global(u64 address, u32 size, int line = __builtin_LINE()) {
    if (address % size) fail("line %d: global address not aligned to %u", line, size);
    for (u64 i = address / unit; i <= (address + size - 1) / unit; i++) {
        Moment& last = global_writes[i];
        check(last, "global write after write", address, line);
        last = mine();
    }
    return reinterpret_cast<u8*>(address);
}

inline void prefetch(u64 address) { (void)*reinterpret_cast<volatile const u8*>(address); }

inline void copy_async(u64 to, u64 from, int line = __builtin_LINE()) {
    prefetch(from), prefetch(from + 15);
    if (from % 16) fail("line %d: cp.async from an address that is not aligned to 16", line);
    u8* target = write_shared(to, 16, line);
    const u32 way = u32(machine.seed % 3);
    const bool at_once = way == 1 || (way == 2 && cuda_on_cpu::random_below(2));
    if (at_once) memcpy(target, reinterpret_cast<const void*>(from), 16);
    for (u32 i = 0; i < 16 / unit; i++) shared_shadow[(to - shared_base) / unit + i].in_flight = threadIdx.x + 1;
    copies[threadIdx.x].push_back({to, from, at_once});
}

// Instructions that synchronize can be left out by the line of the PTX where they stand, to see whether it is noticed.
inline bool is_left_out(int line) {
    static const char* chosen = getenv("PTX_WITHOUT_LINE");
    return chosen && atoi(chosen) == line;
}

inline void wait_for_copies(int line = __builtin_LINE()) {
    if (is_left_out(line)) return;
    for (const Copy& copy : copies[threadIdx.x]) {
        const u32 first = u32(copy.to - shared_base) / unit;
        if (!copy.arrived) memcpy(shared + (copy.to - shared_base), reinterpret_cast<const void*>(copy.from), 16);
        for (u32 i = first; i < first + 16 / unit; i++) shared_shadow[i].in_flight = 0, shared_shadow[i].write = mine();
    }
    copies[threadIdx.x].clear();
}

inline void barrier(int line = __builtin_LINE()) {
    if (is_left_out(line)) return;
    __syncthreads();
    mine().barriers++;
}

inline void warp_barrier(u32 mask, int line = __builtin_LINE()) {
    if (is_left_out(line)) return;
    if (mask != ~0u) fail("line %d: bar.warp.sync with mask 0x%08x, which this does not follow", line, mask);
    __syncwarp(mask);
    mine().warp_barriers++;
}

inline u32 shuffle_up(u32 mask, u32 value, u32 delta, u32 clamp, bool& moved) {
    if (clamp != 0) fail("shfl.up within parts of a warp");
    moved = delta <= threadIdx.x % warpSize;
    return __shfl_up_sync(mask, value, delta);
}

inline u32 shuffle_index(u32 mask, u32 value, u32 lane, u32 clamp, bool& moved) {
    if (clamp != warpSize - 1) fail("shfl.idx within parts of a warp");
    moved = true;
    return __shfl_sync(mask, value, int(lane));
}

inline u64 divide(u64 value, u64 by, bool remainder) {
    if (!by) fail("division by zero");
    return remainder ? value % by : value / by;
}

inline u32 insert_bits(u32 from, u32 into, u32 first, u32 count) {
    for (u32 i = 0; i < (count & 255) && (first & 255) + i < 32; i++) {
        const u32 bit = (first & 255) + i;
        into = (into & ~(1u << bit)) | (from >> i & 1) << bit;
    }
    return into;
}

inline u32 logic(u32 a, u32 b, u32 c, u32 truth) {
    u32 result = 0;
    for (u32 i = 0; i < 8; i++)
        if (truth >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

}  // namespace ptx
