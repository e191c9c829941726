// Decode df11 records on a GPU. formats/SPEC.md says what the bytes mean; section numbers below are its own.
//
// A warp decodes a tile, and each thread a lane. A lane always codes 256 weights, so that every thread knows where to
// write before it decodes: there is one pass, no scan over symbol counts, and no barrier in the loop. A block expands
// the code table of one segment and decodes some of its tiles.
//
// The loop handles 8 weights of a lane (its part of a chunk). Three words of the lane's stream form a window of at
// least 50 bits, enough for four codes of at most 12. Each look-up returns the exponents of two weights, in the
// positions that they have in a word of two BF16 values, and below them the length of the code. A byte permute moves
// two sign/mantissa bytes into place, and one logic operation joins them. 32 threads load 256 bytes and store 512.
//
// Records are not trusted. The host has checked the sizes in Range against its buffers. Everything read from the record
// is checked or clamped here, so that no record can make a kernel read or write out of bounds. Errors are recorded in
// *status.
//
// The source is compiled for one dtype at a time, DF11_KIND. Only three things differ: what the planes of a segment are,
// how a lane's 8 bytes of each are joined with the exponents, and the bytes of a weight. What is said above of BF16 and
// its sign/mantissa bytes holds for the other dtypes and their planes.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// By the code of a dtype in the record header: the bytes of a weight, its planes, their bits (4 bits for each, those of
// the first plane lowest), and how many of the last may be left out (section 1).
struct Split {
    u32 bytes, planes, bits, left_out;
};

constexpr u32 BF16 = 1;
constexpr u32 F16 = 2;
constexpr u32 F32 = 3;
constexpr u32 F8_E4M3 = 4;
constexpr u32 F8_E5M2 = 5;
constexpr Split SPLITS[] = {{}, {2, 1, 0x8, 0}, {2, 3, 0x821, 1}, {4, 3, 0x888, 2}, {1, 1, 0x4, 0}, {1, 2, 0x21, 0}};

constexpr u32 KIND = DF11_KIND;
constexpr u32 WEIGHT_BYTES = SPLITS[KIND].bytes;
constexpr u32 PLANES = SPLITS[KIND].planes;
constexpr u32 PLANE_BITS = SPLITS[KIND].bits;
constexpr u32 ALWAYS_STORED = PLANES - SPLITS[KIND].left_out;

template <u32 BYTES>
struct Unsigned;
template <>
struct Unsigned<1> {
    using Type = u8;
};
template <>
struct Unsigned<2> {
    using Type = u16;
};
template <>
struct Unsigned<4> {
    using Type = u32;
};
using Weight = Unsigned<WEIGHT_BYTES>::Type;

constexpr u32 LANES = 32;
constexpr u32 CHUNK_LANE_WEIGHTS = 8;
constexpr u32 CHUNK_WEIGHTS = LANES * CHUNK_LANE_WEIGHTS;
constexpr u32 TILE_WEIGHTS = 8192;
constexpr u32 TILE_CHUNKS = TILE_WEIGHTS / CHUNK_WEIGHTS;
constexpr u32 CODE_LIMIT = 12;
constexpr u32 TABLE_ENTRIES = 1 << CODE_LIMIT;
constexpr u32 RECORD_HEADER_BYTES = 48;
constexpr u32 DIRECTORY_ENTRY_BYTES = 32;
constexpr u32 SEGMENT_HEADER_BYTES = 32;
constexpr u32 STREAM_END = 16;
constexpr u32 EVERY_LANE = 0xFFFFFFFF;

// Bits of *status; df11.runtime.kernels explains them in words.
constexpr u32 BAD_SEGMENT = 1;
constexpr u32 BAD_CODE = 2;
constexpr u32 BAD_TILE = 4;
constexpr u32 BAD_LANE = 8;
constexpr u32 BAD_EXCEPTION = 16;
constexpr u32 BAD_ROW = 32;

// A warp's copy of a tile's bytes. The slack in front lets a window start two bits before its code. The slack behind
// exceeds the 192 bytes by which damaged codes can run past a lane. A larger tile (from 3.7 bits per exponent on) is
// read in place.
constexpr u32 STAGE_FRONT = 16;
constexpr u32 STAGE_TILE = 3792;
constexpr u32 STAGE_BYTES = STAGE_FRONT + STAGE_TILE + 208;
constexpr u32 WIDE_THREADS = 256;
constexpr u32 SMALL_THREADS = 128;
constexpr u32 SMALL_BLOCKS = KIND == BF16 ? 8 : 6;  // per multiprocessor, hence at most 64 registers, or 80

// Chunks whose planes a lane loads at once: with more planes fewer, as each takes two registers.
constexpr u32 WIDE_GROUP = PLANES > 1 ? 2 : 4;
constexpr u32 SMALL_GROUP = PLANES > 2 ? 1 : 2;

// 8 weights in words, and the alignment that storing them at once takes.
constexpr u32 CHUNK_LANE_WORDS = CHUNK_LANE_WEIGHTS * WEIGHT_BYTES / 4;
constexpr u32 STORE_BYTES = WEIGHT_BYTES == 1 ? 8 : 16;

// Weights first to last (exclusive) of a record, and where they go.
struct Range {
    u64 record;         // address, a multiple of 16
    u64 output;         // address of weight `first`, a multiple of the bytes of a weight
    u64 record_size;    // bytes
    u64 element_count;  // weights of the record
    u64 first;
    u64 last;
    u32 segment_elements;  // a multiple of 8192, at most 2^24
    u32 first_block;       // within the launch
};

constexpr u32 MOST_RANGES = 64;

struct Ranges {
    Range range[MOST_RANGES];
};

// A segment whose section offsets lie inside it (section 5).
struct Segment {
    const u8* data;
    u32 size;
    u32 elements;
    bool sound;
    bool coded;
    u32 alphabet_size;
    u32 lane_bytes;
    u32 tiles_offset;
    u32 lanes_offset;
    u32 planes[PLANES];  // offsets; 0: left out
    u32 stream_offset;
};

__device__ __forceinline__ u32 align16(u32 value) { return (value + 15) & ~15u; }

__device__ __forceinline__ u32 lane_index() { return threadIdx.x % LANES; }

template <class T>
__device__ __forceinline__ T load(const u8* address) {
    return __ldg(reinterpret_cast<const T*>(address));
}

// Shared memory by its 32-bit address; otherwise compilers compute 64-bit addresses.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// A number that the compiler knows nothing about, so that it is added by the load instruction, not before each.
__device__ __forceinline__ u32 opaque(u32 value) {
#ifndef CUDA_ON_CPU
    asm("" : "+r"(value));
#endif
    return value;
}

__device__ __forceinline__ u32 load_shared(u32 address) {
#ifdef CUDA_ON_CPU
    return *static_cast<const u32*>(__cvta_shared_to_generic(address));
#else
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
#endif
}

__device__ __forceinline__ void note(u32* status, u32 what) { atomicOr(status, what); }

__device__ __forceinline__ void copy_to_stage(void* stage, const void* source) {
#ifdef CUDA_ON_CPU
    *static_cast<uint4*>(stage) = *static_cast<const uint4*>(source);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(stage)), "l"(source) : "memory");
#endif
}

__device__ __forceinline__ void wait_for_stage() {
#ifndef CUDA_ON_CPU
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    __syncwarp();
}

__device__ __forceinline__ void prefetch(const u8* address) {
#ifdef CUDA_ON_CPU
    (void)address;
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

__device__ __forceinline__ constexpr u32 bits_of(u32 plane) { return PLANE_BITS >> 4 * plane & 15; }

// Bytes of a plane of so many weights: one of less than 8 bits has all of its last chunk.
__device__ __forceinline__ u32 plane_size(u32 plane, u32 weights) {
    if (bits_of(plane) == 8) return weights;
    return (weights + CHUNK_WEIGHTS - 1) / CHUNK_WEIGHTS * (CHUNK_WEIGHTS / 8 * bits_of(plane));
}

// Segment `index` of a record, from its directory (section 4) and its header (section 5).
__device__ Segment open_segment(const Range& range, u64 index) {
    Segment segment{};
    const u8* record = reinterpret_cast<const u8*>(range.record);
    const u64 first = index * range.segment_elements;
    const u64 entry = RECORD_HEADER_BYTES + DIRECTORY_ENTRY_BYTES * index;
    segment.elements = static_cast<u32>(min(static_cast<u64>(range.segment_elements), range.element_count - first));
    if (entry + DIRECTORY_ENTRY_BYTES > range.record_size) return segment;
    const u64 offset = load<u64>(record + entry);
    segment.size = load<u32>(record + entry + 8);
    if (offset % 16 || segment.size % 16 || segment.size < SEGMENT_HEADER_BYTES || offset > range.record_size ||
        segment.size > range.record_size - offset)
        return segment;
    segment.data = record + offset;
    const u32 head = load<u32>(segment.data);
    const u32 left_out = (head & 0xFF) - 1;  // That of a raw segment is the largest number.
    segment.coded = left_out <= PLANES - ALWAYS_STORED;
    if (!segment.coded) {
        segment.stream_offset = SEGMENT_HEADER_BYTES;
        segment.sound = head == 0 && SEGMENT_HEADER_BYTES + WEIGHT_BYTES * segment.elements <= segment.size;
        return segment;
    }
    segment.lane_bytes = head >> 8 & 0xFF;
    segment.alphabet_size = head >> 16;
    if (segment.lane_bytes < 1 || segment.lane_bytes > 2 || segment.alphabet_size < 1 || segment.alphabet_size > 256)
        return segment;
    const u32 tiles = (segment.elements + TILE_WEIGHTS - 1) / TILE_WEIGHTS;
    const u32 cells = segment.alphabet_size * segment.alphabet_size;
    segment.tiles_offset = align16(SEGMENT_HEADER_BYTES + segment.alphabet_size + (cells + 1) / 2);
    segment.lanes_offset = align16(segment.tiles_offset + 8 * tiles);
    segment.stream_offset = segment.lanes_offset + LANES * segment.lane_bytes * tiles;
#pragma unroll
    for (u32 plane = 0; plane < PLANES; ++plane) {
        if (plane >= ALWAYS_STORED && plane + left_out >= PLANES) break;
        segment.planes[plane] = segment.stream_offset;
        segment.stream_offset = align16(segment.stream_offset + plane_size(plane, segment.elements));
    }
    segment.sound = segment.stream_offset + STREAM_END <= segment.size;
    return segment;
}

// Shared by a block while it expands a code table.
template <u32 THREADS>
struct CodeScratch {
    u32 ranks[THREADS / LANES][16];  // per warp and length: its number of codes, then the rank of its first
    uint2 codes[16];  // per length: the 12-bit value after its last code; what to add to a value to get a rank
};

// Expand the code table (section 6). An entry is e1 << 23 | e0 << 7 | length, indexed by the next 12 bits of a lane.
//
// First, the symbols are sorted by code: each warp takes a part of the grid, counts its codes of each length, and then
// ranks them. The list occupies the lower half of the table. Then, thread t finds the codes of consecutive 12-bit
// values v, which belong to the table slots whose lower bits are t: a slot is v with its bits reversed. So stores have
// no bank conflicts. Odd v are slots of the upper half and stored at once; even v are stored when all threads have read
// the list. Nothing is written to the table before the first barrier, as other warps may still decode with the previous
// one.
template <u32 THREADS>
__device__ void expand_code_table(const Segment& segment, u32* table, CodeScratch<THREADS>& scratch, u32* status) {
    constexpr u32 WARPS = THREADS / LANES;
    constexpr u32 VALUES = TABLE_ENTRIES / THREADS;
    constexpr u32 THREAD_BITS = THREADS == 256 ? 8 : 7;
    static_assert(1 << THREAD_BITS == THREADS, "threads of a block");
    u16* symbols = reinterpret_cast<u16*>(table);
    const u8* alphabet = segment.data + SEGMENT_HEADER_BYTES;
    const u8* grid = alphabet + segment.alphabet_size;
    const u32 cells = segment.alphabet_size * segment.alphabet_size;
    const u32 thread = threadIdx.x;
    const u32 lane = lane_index();
    const u32 warp = thread / LANES;
    const u32 part = (cells + WARPS - 1) / WARPS;
    const u32 first_cell = warp * part;
    const u32 last_cell = min(first_cell + part, cells);
    const u32 before = (1u << lane) - 1;
    u32* ranks = scratch.ranks[warp];
    const auto length_of = [&](u32 cell) {
        return cell < last_cell ? load<u8>(grid + cell / 2) >> 4 * (cell % 2) & 15u : 0;
    };

    if (lane < 16) ranks[lane] = 0;
    __syncwarp();
    for (u32 start = first_cell; start < last_cell; start += LANES) {
        const u32 length = length_of(start + lane);
        const u32 same = __match_any_sync(EVERY_LANE, length);
        if (!(same & before)) ranks[length] += __popc(same);
        __syncwarp();
    }
    __syncthreads();

    if (warp == 0) {
        // Codes are consecutive: the first one of a length follows the shorter ones, in units of 12-bit codes.
        u32 count = 0;
        if (lane < 16)  // Others would read what a lane writes below, with no barrier between.
            for (u32 w = 0; w < WARPS; ++w) count += scratch.ranks[w][lane];
        const bool legal = lane >= 1 && lane <= CODE_LIMIT;
        const u32 shift = legal ? CODE_LIMIT - lane : 0;
        u32 codes = legal ? count : 0;
        u32 taken = codes << shift;
        const u32 mine = taken;
        for (u32 step = 1; step < 16; step *= 2) {
            const u32 codes_before = __shfl_up_sync(EVERY_LANE, codes, step);
            const u32 taken_before = __shfl_up_sync(EVERY_LANE, taken, step);
            if (lane >= step) codes += codes_before, taken += taken_before;
        }
        u32 rank = codes - (legal ? count : 0);
        if (lane < 16) {
            scratch.codes[lane] = make_uint2(lane > CODE_LIMIT ? EVERY_LANE : taken, rank - ((taken - mine) >> shift));
            for (u32 w = 0; w < WARPS; ++w) {
                const u32 others = scratch.ranks[w][lane];
                scratch.ranks[w][lane] = rank;
                rank += others;
            }
            const bool single = codes == 1 && taken == TABLE_ENTRIES / 2;
            const bool wrong = lane == CODE_LIMIT ? taken != TABLE_ENTRIES && !single : lane > CODE_LIMIT && count;
            if (wrong) note(status, BAD_CODE);
        }
    }
    __syncthreads();

    const u32 inverse =
        EVERY_LANE / segment.alphabet_size + 1;  // Exact for what is divided here: 65,536 cells at most.
    for (u32 start = first_cell; start < last_cell; start += LANES) {
        const u32 cell = start + lane;
        const u32 length = length_of(cell);
        const u32 same = __match_any_sync(EVERY_LANE, length);
        const u32 rank = ranks[length] + __popc(same & before);
        if (length >= 1 && length <= CODE_LIMIT && rank < TABLE_ENTRIES) {
            const u32 row = __umulhi(cell, inverse);
            symbols[rank] = static_cast<u16>(load<u8>(alphabet + row) << 8 |
                                             load<u8>(alphabet + (cell - row * segment.alphabet_size)));
        }
        __syncwarp();
        if (!(same & before)) ranks[length] = rank + __popc(same);
        __syncwarp();
    }
    __syncthreads();

    const u32 value = (__brev(thread) >> (32 - THREAD_BITS)) * VALUES;
    u32 start = 1;
    while (value >= scratch.codes[start].x) ++start;  // The limit of 13 is beyond every value.
    u32 length = start;
    uint2 codes = scratch.codes[length];
    const auto entry_of = [&](u32 v) {  // v must not descend
        while (v >= codes.x) codes = scratch.codes[++length];
        // In a valid table, only the bit 1 of a single code comes after the last code: its symbol is the first. Every
        // code takes at least one value, so no rank exceeds v.
        const bool coded = length <= CODE_LIMIT;
        const u32 symbol = symbols[coded ? (v >> (CODE_LIMIT - length)) + codes.y : 0];
        return (symbol & 0xFF00) << 15 | (symbol & 0xFF) << 7 | (coded ? length : 1);
    };
    const auto slot_of = [&](u32 j) { return (__brev(j) >> (32 - CODE_LIMIT + THREAD_BITS)) << THREAD_BITS | thread; };
#pragma unroll 1
    for (u32 j = 1; j < VALUES; j += 2) table[slot_of(j)] = entry_of(value + j);
    length = start;
    codes = scratch.codes[length];
    u32 kept[VALUES / 2];
#pragma unroll
    for (u32 j = 0; j < VALUES; j += 2) kept[j / 2] = entry_of(value + j);
    __syncthreads();
#pragma unroll
    for (u32 j = 0; j < VALUES; j += 2) table[slot_of(j)] = kept[j / 2];
    __syncthreads();
}

// Where the words of a tile's code stream are read. A window starts at bit `position`, relative to the words' base.
struct StagedWords {
    __device__ __forceinline__ void load3(u32 position, u32& a, u32& b, u32& c) const {
        const u32 address = position >> 3 & ~3u;
        a = load_shared(address), b = load_shared(address + 4), c = load_shared(address + 8);
    }
};

struct SegmentWords {
    const u8* words;  // the segment, in global memory
    u32 last;         // word from which three can be read

    __device__ __forceinline__ void load3(u32 position, u32& a, u32& b, u32& c) const {
        const u32* word = reinterpret_cast<const u32*>(words) + min(position >> 5, last);
        a = __ldg(word), b = __ldg(word + 1), c = __ldg(word + 2);
    }
};

// `window` holds the next bits from bit 2 on, so that they are already the byte offset of the entry.
__device__ __forceinline__ u32 look_up(u32 table, u32 window) {
    return load_shared((window & (TABLE_ENTRIES - 1) << 2) + table);
}

// Decode 4 codes and advance `position` (two bits before the next code). Funnel shifts take their amount modulo 32, so
// an entry serves as the amount: only its length lies in those bits.
template <class Words>
__device__ __forceinline__ void decode_codes(const Words& words, u32 table, u32& position, u32 (&pairs)[4]) {
    u32 a, b, c;
    words.load3(position, a, b, c);
    const u32 low = __funnelshift_r(a, b, position);
    const u32 high = __funnelshift_r(b, c, position);
    pairs[0] = look_up(table, low);
    pairs[1] = look_up(table, __funnelshift_r(low, high, pairs[0]));
    const u32 half = pairs[0] + pairs[1];
    const u32 rest = __funnelshift_r(low, high, half);
    pairs[2] = look_up(table, rest);
    pairs[3] = look_up(table, __funnelshift_r(rest, high, pairs[2]));
    position += (half + pairs[2] + pairs[3]) & 0x7F;
}

// The bits of `ones` where the mask has ones, and those of `zeros` elsewhere: one instruction, of which compilers make
// two when the mask is a constant, as an instruction can hold only one of its two halves.
__device__ __forceinline__ u32 select_bits(u32 ones, u32 zeros, u32 mask) {
#ifdef CUDA_ON_CPU
    return (ones & mask) | (zeros & ~mask);
#else
    u32 selected;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(selected) : "r"(ones), "r"(zeros), "r"(mask));
    return selected;
#endif
}

// A lane's bytes of a chunk: 8 of every plane. In a plane of less than 8 bits, several lanes have the same ones.
struct Bytes {
    uint2 plane[PLANES];
};

// 8 weights.
struct Chunk {
    u32 words[CHUNK_LANE_WORDS];
};

// The planes of a tile: their addresses, null if a plane is left out.
struct Planes {
    const u8* address[PLANES];
};

__device__ __forceinline__ Planes open_planes(const Segment& segment, u32 tile) {
    Planes planes;
#pragma unroll
    for (u32 plane = 0; plane < PLANES; ++plane) {
        const u8* address = segment.data + segment.planes[plane] + TILE_WEIGHTS / 8 * bits_of(plane) * tile;
        planes.address[plane] = plane < ALWAYS_STORED || segment.planes[plane] ? address : nullptr;
    }
    return planes;
}

// This lane's bytes of chunk 0 in a plane.
__device__ __forceinline__ u32 lane_offset(u32 plane) {
    return CHUNK_LANE_WEIGHTS * (lane_index() % (4 * bits_of(plane)));
}

__device__ __forceinline__ u32 join_bf16(u32 pair, u32 sign_mantissa, u32 selector) {
    return select_bits(__byte_perm(sign_mantissa, 0, selector), pair, 0x807F807F);
}

// Of 4 weights, from a plane of signs and one of two mantissa bits: bytes with the sign on top and the two bits below.
__device__ __forceinline__ u32 join_narrow(u32 signs, u32 mantissas) {
    const u32 lane = lane_index();
    return select_bits(signs << (7 - lane / 4), mantissas >> 2 * (lane / 8), 0x80808080);
}

// The exponents of two pairs in bytes, above `low` bits of each.
__device__ __forceinline__ u32 exponent_bytes(u32 pair, u32 next, u32 low) {
    return __byte_perm(pair >> (7 - low), next >> (7 - low), 0x6420);
}

__device__ __forceinline__ Chunk join_chunk(const u32 (&pairs)[4], const Bytes& bytes) {
    Chunk chunk;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {  // 4 weights
        const auto word_of = [&](u32 plane) { return half ? bytes.plane[plane].y : bytes.plane[plane].x; };
        const u32 pair = pairs[2 * half], next = pairs[2 * half + 1];
        u32* words = chunk.words + half * (CHUNK_LANE_WORDS / 2);
        if constexpr (KIND == BF16 || KIND == F32) {
            words[0] = join_bf16(pair, word_of(0), 0x1100);
            words[1] = join_bf16(next, word_of(0), 0x3322);
        }
        if constexpr (KIND == F32) {  // Those are the upper halves.
            const u32 upper[2] = {words[0], words[1]};
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 lower = __byte_perm(word_of(2), word_of(1), i ? 0x7362 : 0x5140);
                words[2 * i] = __byte_perm(lower, upper[i], 0x5410);
                words[2 * i + 1] = __byte_perm(lower, upper[i], 0x7632);
            }
        }
        if constexpr (KIND == F16) {
            const u32 upper = join_narrow(word_of(0), word_of(1));
            words[0] = select_bits(__byte_perm(word_of(2), upper, 0x5140), pair << 3, 0x83FF83FF);
            words[1] = select_bits(__byte_perm(word_of(2), upper, 0x7362), next << 3, 0x83FF83FF);
        }
        if constexpr (KIND == F8_E4M3) {
            const u32 raw = word_of(0), lower = 4 * (lane_index() / 16);
            const u32 sign_mantissa = select_bits(raw << (4 - lower), raw >> lower, 0x80808080);
            words[0] = select_bits(sign_mantissa, exponent_bytes(pair, next, 3), 0x87878787);
        }
        if constexpr (KIND == F8_E5M2)
            words[0] = select_bits(join_narrow(word_of(0), word_of(1)), exponent_bytes(pair, next, 2), 0x83838383);
    }
    return chunk;
}

// 8 weights, to an address that is a multiple of STORE_BYTES.
__device__ __forceinline__ void store_chunk(Weight* output, const Chunk& chunk) {
    if constexpr (WEIGHT_BYTES == 1) {
        *reinterpret_cast<uint2*>(output) = make_uint2(chunk.words[0], chunk.words[1]);
    } else {
#pragma unroll
        for (u32 i = 0; i < CHUNK_LANE_WORDS; i += 4)
            reinterpret_cast<uint4*>(output)[i / 4] =
                make_uint4(chunk.words[i], chunk.words[i + 1], chunk.words[i + 2], chunk.words[i + 3]);
    }
}

// Store those of 8 weights that lie in low .. high - 1; the first of them is weight j of the tile.
__device__ __forceinline__ void store_some(Weight* tile, u32 j, u32 low, u32 high, const Chunk& chunk) {
    constexpr u32 IN_WORD = 4 / WEIGHT_BYTES;
#pragma unroll
    for (u32 i = 0; i < CHUNK_LANE_WEIGHTS; ++i)
        if (j + i >= low && j + i < high)
            tile[j + i] = static_cast<Weight>(chunk.words[i / IN_WORD] >> 8 * WEIGHT_BYTES * (i % IN_WORD));
}

// A tile opened by a warp: its descriptor, and this thread's lane.
struct Tile {
    u32 index;  // in the segment
    u32 weights;
    u32 begin;       // byte of the segment where its codes begin
    u32 lane_start;  // bits after that
    u32 lane_bits;
    u32 code_bytes;
    u32 exceptions;
    bool staged;
};

// What is stored about a tile: its descriptor, and this thread's lane length (section 7).
struct TileHeader {
    uint2 descriptor;
    u32 excess;
};

__device__ __forceinline__ TileHeader read_header(const Segment& segment, u32 index) {
    const u8* lengths = segment.data + segment.lanes_offset + segment.lane_bytes * (LANES * index + lane_index());
    const u32 excess = segment.lane_bytes == 1 ? load<u8>(lengths) : load<u16>(lengths);
    return {load<uint2>(segment.data + segment.tiles_offset + 8 * index), excess};
}

// With a stage, start copying the tile's bytes to it if they fit.
__device__ Tile open_tile(const Segment& segment, u32 index, TileHeader header, u8* stage, u32* status) {
    const u32 lane = lane_index();
    const uint2 descriptor = header.descriptor;
    Tile tile;
    tile.index = index;
    tile.weights = min(TILE_WEIGHTS, segment.elements - index * TILE_WEIGHTS);
    tile.lane_bits = (descriptor.y & 0xFFFF) + header.excess;
    u32 end = tile.lane_bits;
    for (u32 step = 1; step < LANES; step *= 2) {
        const u32 before = __shfl_up_sync(EVERY_LANE, end, step);
        if (lane >= step) end += before;
    }
    tile.lane_start = end - tile.lane_bits;
    tile.code_bytes = (__shfl_sync(EVERY_LANE, end, LANES - 1) + 31) / 32 * 4;
    tile.exceptions = descriptor.y >> 16;
    const u32 bytes = tile.code_bytes + 4 * tile.exceptions;
    const u32 room = segment.size - STREAM_END - segment.stream_offset;
    const bool sound =
        descriptor.x <= room / 16 && bytes <= room - 16 * descriptor.x && tile.exceptions <= tile.weights;
    tile.begin = segment.stream_offset + (sound ? 16 * descriptor.x : 0);
    if (!sound) {
        tile.exceptions = 0;
        if (lane == 0) note(status, BAD_TILE);
    }
    tile.staged = stage && sound && tile.code_bytes <= STAGE_TILE;
    if (tile.staged) {
        __syncwarp();  // All have finished reading the previous tile.
        for (u32 i = 16 * lane; i < tile.code_bytes; i += 16 * LANES)
            copy_to_stage(stage + STAGE_FRONT + i, segment.data + tile.begin + i);
    }
    return tile;
}

// Load the bytes of a lane from chunks, from addresses that are those of the lane. Nobody will read them again.
template <u32 GROUP>
__device__ __forceinline__ void load_chunks(const Planes& planes, Bytes (&bytes)[GROUP]) {
#pragma unroll
    for (u32 i = 0; i < GROUP; ++i)
#pragma unroll
        for (u32 plane = 0; plane < PLANES; ++plane) {
            const uint2* source = reinterpret_cast<const uint2*>(planes.address[plane]);
            const bool is_stored = plane < ALWAYS_STORED || source;
            bytes[i].plane[plane] = is_stored ? __ldcs(source + i * 4 * bits_of(plane)) : make_uint2(0, 0);
        }
}

// All 8192 weights of a tile, to an output aligned to STORE_BYTES. The planes of the next GROUP chunks are loaded while a
// group is decoded; those of the first, while the stage fills.
template <u32 GROUP, bool WAIT, class Words>
__device__ __forceinline__ void decode_whole(const Words& words, u32 table, u32& position, Planes planes,
                                             Weight* output) {
    Weight* target = output + CHUNK_LANE_WEIGHTS * lane_index();
    Bytes next[GROUP];
#pragma unroll
    for (u32 plane = 0; plane < PLANES; ++plane)
        if (plane < ALWAYS_STORED || planes.address[plane]) planes.address[plane] += lane_offset(plane);
    load_chunks(planes, next);
    if (WAIT) {
        __syncwarp();  // The assembler moves no load of the above across this; it does move them behind the wait.
        wait_for_stage();
    }
#pragma unroll 1
    for (u32 chunk = GROUP; chunk <= TILE_CHUNKS; chunk += GROUP) {
        Bytes now[GROUP];
#pragma unroll
        for (u32 i = 0; i < GROUP; ++i) now[i] = next[i];
#pragma unroll
        for (u32 plane = 0; plane < PLANES; ++plane)
            if (plane < ALWAYS_STORED || planes.address[plane])
                planes.address[plane] += GROUP * CHUNK_WEIGHTS / 8 * bits_of(plane);
        if (chunk < TILE_CHUNKS) load_chunks(planes, next);
#pragma unroll
        for (u32 i = 0; i < GROUP; ++i) {
            u32 pairs[4];
            decode_codes(words, table, position, pairs);
            store_chunk(target + i * CHUNK_WEIGHTS, join_chunk(pairs, now[i]));
        }
        target += GROUP * CHUNK_WEIGHTS;
    }
}

// The weights low .. high - 1 of a tile, to any address: for the last tile of a tensor, and the first and last of some
// rows.
template <class Words>
__device__ __forceinline__ void decode_part(const Words& words, u32 table, u32& position, const Planes& planes,
                                            Weight* output, u32 low, u32 high) {
    const bool aligned = reinterpret_cast<u64>(output) % STORE_BYTES == 0;
#pragma unroll 1
    for (u32 chunk = 0; chunk * CHUNK_WEIGHTS < high; ++chunk) {
        u32 pairs[4];
        decode_codes(words, table, position, pairs);
        const u32 j = chunk * CHUNK_WEIGHTS + CHUNK_LANE_WEIGHTS * lane_index();
        if (j + CHUNK_LANE_WEIGHTS <= low || j >= high) continue;
        Bytes bytes;
#pragma unroll
        for (u32 plane = 0; plane < PLANES; ++plane) {
            const u32 bits = bits_of(plane);
            const u32 at = bits == 8 ? j : CHUNK_WEIGHTS / 8 * bits * chunk + lane_offset(plane);
            const bool is_stored = plane < ALWAYS_STORED || planes.address[plane];
            bytes.plane[plane] = is_stored ? load<uint2>(planes.address[plane] + at) : make_uint2(0, 0);
        }
        const Chunk weights = join_chunk(pairs, bytes);
        if (aligned && j >= low && j + CHUNK_LANE_WEIGHTS <= high) store_chunk(output + j, weights);
        else store_some(output, j, low, high, weights);
    }
}

// What an exception has of a weight; of F32 the upper half.
__device__ __forceinline__ void replace(Weight* weight, u32 value) {
    if constexpr (KIND == F32) reinterpret_cast<u16*>(weight)[1] = static_cast<u16>(value);
    else *weight = static_cast<Weight>(value);
}

// Decode the weights low .. high - 1 of an opened tile. `output` is the address that weight 0 of the tile has, or would
// have.
template <bool STAGED>
__device__ __forceinline__ void decode_tile(const Segment& segment, const Tile& tile, u32 low, u32 high,
                                            Weight* output, u32 table, const u8* stage, u32* status) {
    const Planes planes = open_planes(segment, tile.index);
    const bool whole = low == 0 && high == TILE_WEIGHTS && reinterpret_cast<u64>(output) % STORE_BYTES == 0;
    const u8* exceptions = segment.data + tile.begin + tile.code_bytes;
    const SegmentWords segment_words{segment.data, segment.size / 4 - 3};
    u32 start = 8 * tile.begin + tile.lane_start - 2;
    u32 position = start;
    if (STAGED && tile.staged && whole) {
        start = position = 8 * (shared_address(stage) + STAGE_FRONT) + tile.lane_start - 2;
        decode_whole<WIDE_GROUP, true>(StagedWords{}, table, position, planes, output);
    } else if (!STAGED && whole) {
        decode_whole<SMALL_GROUP, false>(segment_words, table, position, planes, output);
    } else {
        if (STAGED) wait_for_stage();  // It may soon be filled again.
        decode_part(segment_words, table, position, planes, output, low, high);
    }
    const bool to_the_end =
        high + CHUNK_WEIGHTS > tile.weights + (CHUNK_WEIGHTS - 1 - (tile.weights - 1) % CHUNK_WEIGHTS);
    if (to_the_end && position - start != tile.lane_bits) note(status, BAD_LANE);
    if (tile.exceptions == 0) return;
    __syncwarp();  // Other threads have stored the weights that exceptions replace.
    for (u32 i = lane_index(); i < tile.exceptions; i += LANES) {
        const u32 exception = load<u32>(exceptions + 4 * i);
        const u32 j = exception & 0xFFFF;
        if (j >= low && j < high) replace(output + j, exception >> 16);
        if (j >= tile.weights || (WEIGHT_BYTES == 1 && exception >> 24)) note(status, BAD_EXCEPTION);
    }
}

// Weights low .. high - 1 of a tile of a raw segment; without a source, NaN.
__device__ void copy_tile(const u8* source, u32 low, u32 high, Weight* output) {
    constexpr u32 WORDS = STORE_BYTES / 4;
    const bool aligned = reinterpret_cast<u64>(output) % STORE_BYTES == 0;
    for (u32 j = CHUNK_LANE_WEIGHTS * lane_index(); j < high; j += CHUNK_WEIGHTS) {
        if (j + CHUNK_LANE_WEIGHTS <= low) continue;
        Chunk weights;
#pragma unroll
        for (u32 i = 0; i < CHUNK_LANE_WORDS; i += WORDS) {
            const bool exists = j + 4 * i / WEIGHT_BYTES < high;  // A segment ends with the 16 bytes of its last weight.
            const u8* from = source + WEIGHT_BYTES * j + 4 * i;
            uint4 words = make_uint4(EVERY_LANE, EVERY_LANE, EVERY_LANE, EVERY_LANE);
            if constexpr (WORDS == 4) {
                if (source && exists) words = load<uint4>(from);
                weights.words[i + 2] = words.z, weights.words[i + 3] = words.w;
            } else if (source) {
                const uint2 two = load<uint2>(from);
                words.x = two.x, words.y = two.y;
            }
            weights.words[i] = words.x, weights.words[i + 1] = words.y;
        }
        if (aligned && j >= low && j + CHUNK_LANE_WEIGHTS <= high) store_chunk(output + j, weights);
        else store_some(output, j, low, high, weights);
    }
}

// A block decodes the weights low .. high - 1 of a segment, as far as they lie in the tiles first_tile .. last_tile -
// 1. `output`: the address that weight 0 of the segment has, or would have. `stage`: that of this warp, or null.
template <u32 THREADS, bool STAGED>
__device__ __forceinline__ void decode_tiles(const Segment& segment, u32 first_tile, u32 last_tile, u32 low, u32 high,
                                             Weight* output, u32* table, CodeScratch<THREADS>& scratch, u8* stage,
                                             u32* status) {
    constexpr u32 WARPS = THREADS / LANES;
    u32 index = first_tile + threadIdx.x / LANES;
    const auto low_of = [&](u32 tile) { return max(low, tile * TILE_WEIGHTS) - tile * TILE_WEIGHTS; };
    const auto high_of = [&](u32 tile) { return min(high - tile * TILE_WEIGHTS, TILE_WEIGHTS); };
    if (!segment.sound || !segment.coded) {
        if (!segment.sound && threadIdx.x == 0) note(status, BAD_SEGMENT);
        const u8* source = segment.sound ? segment.data + segment.stream_offset : nullptr;
        for (; index < last_tile; index += WARPS)
            copy_tile(source ? source + WEIGHT_BYTES * TILE_WEIGHTS * index : nullptr, low_of(index), high_of(index),
                      output + TILE_WEIGHTS * index);
        return;
    }
    Tile tile{};
    if (index < last_tile) {
        // In flight while the table is expanded: the tile's codes, and its planes into the second-level cache.
        tile = open_tile(segment, index, read_header(segment, index), stage, status);
#pragma unroll
        for (u32 plane = 0; plane < PLANES; ++plane) {
            if (plane >= ALWAYS_STORED && !segment.planes[plane]) continue;
            const u8* bytes = segment.data + segment.planes[plane] + TILE_WEIGHTS / 8 * bits_of(plane) * index;
            for (u32 i = 128 * lane_index(); i < plane_size(plane, tile.weights); i += 128 * LANES) prefetch(bytes + i);
        }
    }
    expand_code_table<THREADS>(segment, table, scratch, status);
    const u32 address = opaque(shared_address(table));
    while (index < last_tile) {
        const u32 next = index + WARPS;
        TileHeader header{};
        if (next < last_tile) header = read_header(segment, next);
        decode_tile<STAGED>(segment, tile, low_of(index), high_of(index), output + TILE_WEIGHTS * index, address, stage,
                            status);
        if (next < last_tile) tile = open_tile(segment, next, header, stage, status);
        index = next;
    }
}

// A block of a launch over several ranges finds its range, segment and tiles.
template <u32 THREADS, bool STAGED>
__device__ __forceinline__ void decode_ranges(const Ranges& ranges, u32 range_count, u32 tiles_per_block, u32* table,
                                              CodeScratch<THREADS>& scratch, u8* stage, u32* status) {
    u32 found = 0;
    for (u32 step = MOST_RANGES / 2; step; step /= 2)
        if (found + step < range_count && ranges.range[found + step].first_block <= blockIdx.x) found += step;
    const Range& range = ranges.range[found];
    const u32 tiles_per_segment = static_cast<u32>(
        (min(static_cast<u64>(range.segment_elements), range.element_count) + TILE_WEIGHTS - 1) / TILE_WEIGHTS);
    const u32 blocks_per_segment = (tiles_per_segment + tiles_per_block - 1) / tiles_per_block;
    const u32 block = blockIdx.x - range.first_block;
    const u64 index = range.first / range.segment_elements + block / blocks_per_segment;
    const u64 segment_first = index * range.segment_elements;
    if (segment_first >= range.last) return;
    const u64 segment_last = min(segment_first + range.segment_elements, range.last);
    const u32 low = static_cast<u32>(max(segment_first, range.first) - segment_first);
    const u32 high = static_cast<u32>(segment_last - segment_first);
    const u32 first_tile = block % blocks_per_segment * tiles_per_block;
    const u32 last_tile = min(first_tile + tiles_per_block, (high + TILE_WEIGHTS - 1) / TILE_WEIGHTS);
    if (max(first_tile, low / TILE_WEIGHTS) >= last_tile) return;
    Weight* output = reinterpret_cast<Weight*>(range.output) + static_cast<i64>(segment_first - range.first);
    decode_tiles<THREADS, STAGED>(open_segment(range, index), max(first_tile, low / TILE_WEIGHTS), last_tile, low, high,
                                  output, table, scratch, stage, status);
}

// Decode ranges of records. Grid: for each range, blocks_per_segment blocks per segment that it touches.
extern "C" __global__ void __launch_bounds__(WIDE_THREADS)
    df11_decode(const __grid_constant__ Ranges ranges, u32 range_count, u32 tiles_per_block, u32* status) {
    __shared__ alignas(16) u32 table[TABLE_ENTRIES];
    __shared__ alignas(16) u8 stages[WIDE_THREADS / LANES * STAGE_BYTES];
    __shared__ CodeScratch<WIDE_THREADS> scratch;
    decode_ranges<WIDE_THREADS, true>(ranges, range_count, tiles_per_block, table, scratch,
                                      stages + threadIdx.x / LANES * STAGE_BYTES, status);
}

// The same with few registers and little shared memory, to run beside other kernels.
extern "C" __global__ void __launch_bounds__(SMALL_THREADS, SMALL_BLOCKS)
    df11_decode_small(const __grid_constant__ Ranges ranges, u32 range_count, u32 tiles_per_block, u32* status) {
    __shared__ alignas(16) u32 table[TABLE_ENTRIES];
    __shared__ CodeScratch<SMALL_THREADS> scratch;
    decode_ranges<SMALL_THREADS, false>(ranges, range_count, tiles_per_block, table, scratch, nullptr, status);
}

// Decode given rows of a matrix of `rows` rows of `row_weights`: output row i is row ids[i], or NaN if there is no such
// row. `range` is the whole record, with the output address of row 0. Grid: a block per id.
extern "C" __global__ void __launch_bounds__(SMALL_THREADS, SMALL_BLOCKS)
    df11_gather_rows(const __grid_constant__ Range range, const i64* ids, u64 row_weights, u64 rows, u32* status) {
    __shared__ alignas(16) u32 table[TABLE_ENTRIES];
    __shared__ CodeScratch<SMALL_THREADS> scratch;
    const i64 id = ids[blockIdx.x];
    Weight* output = reinterpret_cast<Weight*>(range.output) + blockIdx.x * row_weights;
    if (static_cast<u64>(id) >= rows) {  // negative ones included
        for (u64 j = threadIdx.x; j < row_weights; j += SMALL_THREADS) output[j] = static_cast<Weight>(EVERY_LANE);
        if (threadIdx.x == 0) note(status, BAD_ROW);
        return;
    }
    const u64 first = id * row_weights;
    const u64 last = first + row_weights;
    for (u64 index = first / range.segment_elements; index * range.segment_elements < last; ++index) {
        const u64 segment_first = index * range.segment_elements;
        const u32 low = static_cast<u32>(max(segment_first, first) - segment_first);
        const u32 high = static_cast<u32>(min(segment_first + range.segment_elements, last) - segment_first);
        decode_tiles<SMALL_THREADS, false>(
            open_segment(range, index), low / TILE_WEIGHTS, (high + TILE_WEIGHTS - 1) / TILE_WEIGHTS, low, high,
            output + static_cast<i64>(segment_first - first), table, scratch, nullptr, status);
    }
}
