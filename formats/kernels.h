/* What the CPU kernels share: the constants of layout.py, status codes, unaligned loads, and the choice of
 * instructions.
 *
 * decode.c (formats) and encode.c (converter) hold the kernels; src/df11/_kernels.c checks what Python passes and calls
 * them. A kernel trusts sizes, offsets and tables, which its caller has checked or df11_build_decode_table has made,
 * but nothing that it reads from a segment. It keeps no memory and does not call Python. */
#ifndef DF11_KERNELS_H
#define DF11_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "df11 needs a little-endian machine: containers and weights are little-endian, and nothing here swaps bytes"
#endif
#if SIZE_MAX < UINT64_MAX
#error "df11 needs a 64-bit machine"
#endif

enum {
    LANES = 32,
    TILE_WEIGHTS = 8192,
    TILE_PAIRS = TILE_WEIGHTS / 2,
    CHUNK_WEIGHTS = 256,
    CHUNK_PAIRS = CHUNK_WEIGHTS / 2,
    TILE_CHUNKS = TILE_WEIGHTS / CHUNK_WEIGHTS,
    CODE_LIMIT = 12,
    TABLE_SIZE = 1 << CODE_LIMIT, /* also the sum of 2^(12 - length) over a complete code */
    STREAM_UNIT = 16,
    STREAM_END = 16,
    MAX_SEGMENT_WEIGHTS = 1 << 24,
    SYMBOLS = 1 << 16, /* a pair of exponents: e1 << 8 | e0 */
    /* Bytes after the end of a segment that encoding may write to, before it finds that a tile does not fit. */
    ENCODE_SLACK = 8192,
};

/* The dtypes of records, by their code in the record header: layout.py has the same table, and a test compares them. */
enum df11_kind { BF16 = 1, F16, F32, F8_E4M3, F8_E5M2, KINDS };

enum { MOST_PLANES = 3, MOST_BYTES = 4 };

struct df11_split {
    unsigned bytes, exponent_bits, mantissa_bits, planes;
    unsigned bits[MOST_PLANES]; /* of a weight in each plane */
};

static const struct df11_split df11_splits[KINDS] = {
    [BF16] = {2, 8, 7, 1, {8}},
    [F16] = {2, 5, 10, 3, {1, 2, 8}},
    [F32] = {4, 8, 23, 3, {8, 8, 8}},
    [F8_E4M3] = {1, 4, 3, 1, {4}},
    [F8_E5M2] = {1, 5, 2, 2, {1, 2}},
};

/* What is wrong with a segment; Python's formats/kernels.py takes these from the module. */
enum df11_status { OK, BAD_TILE, BAD_LANE, BAD_EXCEPTION, DIFFERENT, BAD_ALPHABET, BAD_LENGTH, INCOMPLETE_CODE };

/* Why encoding has not made a segment. */
enum { LANE_OVERFLOW = -1, NOT_SMALLER = -2 };

#if defined(__GNUC__) || defined(__clang__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define RESTRICT __restrict__
typedef uint16_t __attribute__((may_alias)) any_u16; /* halves of what was stored as u32 */
#else
#include <intrin.h>
#define ALWAYS_INLINE static __forceinline
#define UNLIKELY(x) (x)
#define RESTRICT __restrict
typedef uint16_t any_u16;
#endif

/* The same C, compiled once more for CPUs of 2013 and later: loops become AVX2, shifts take one instruction. Where the
 * compiler cannot do that, there is the portable code alone. */
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define HAVE_AVX2 1
#define AVX2 __attribute__((target("avx2,bmi,bmi2,lzcnt")))
#endif

/* From the inline function NAME, define NAME_portable and, where the compiler can, NAME_avx2; CHOOSE calls the one for
 * this CPU. */
#ifdef HAVE_AVX2
#define COMPILE_TWICE(type, name, parameters, arguments)                                                               \
    static type name##_portable parameters                                                                             \
    {                                                                                                                  \
        return name arguments;                                                                                         \
    }                                                                                                                  \
    AVX2 static type name##_avx2 parameters                                                                            \
    {                                                                                                                  \
        return name arguments;                                                                                         \
    }
#define CHOOSE(name, arguments) (df11_use_avx2 ? name##_avx2 arguments : name##_portable arguments)
#else
#define COMPILE_TWICE(type, name, parameters, arguments)                                                               \
    static type name##_portable parameters                                                                             \
    {                                                                                                                  \
        return name arguments;                                                                                         \
    }
#define CHOOSE(name, arguments) name##_portable arguments
#endif

/* Set once, when the module is loaded: cpu.c. */
extern int df11_use_avx2, df11_use_sha;
void df11_choose_instructions(void);

ALWAYS_INLINE uint64_t load_u64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

ALWAYS_INLINE unsigned load_u16(const uint8_t *from)
{
    return (unsigned)from[0] | (unsigned)from[1] << 8;
}

ALWAYS_INLINE void store_u64(uint8_t *to, uint64_t value)
{
    memcpy(to, &value, sizeof value);
}

ALWAYS_INLINE void store_u16(uint8_t *to, unsigned value)
{
    to[0] = (uint8_t)value;
    to[1] = (uint8_t)(value >> 8);
}

/* Of a value that is not zero. */
ALWAYS_INLINE unsigned leading_zeros(uint64_t value)
{
#if defined(__GNUC__) || defined(__clang__)
    return (unsigned)__builtin_clzll(value);
#else
    unsigned long top;
    _BitScanReverse64(&top, value);
    return 63 - (unsigned)top;
#endif
}

/* Canonical codes (SPEC.md, section 6): the first code of each length, from how many there are of each; counts[0] is 0.
 */
ALWAYS_INLINE void number_codes(const unsigned *counts, unsigned *next_code)
{
    unsigned code = 0;
    for (unsigned length = 1; length <= CODE_LIMIT; length++)
        next_code[length] = code = (code + counts[length - 1]) << 1;
}

/* A code as it stands in the stream: its first bit is the lowest. */
ALWAYS_INLINE unsigned reversed(unsigned code, unsigned length)
{
    unsigned result = 0;
    for (unsigned bit = 0; bit < length; bit++)
        result |= (code >> bit & 1) << (length - 1 - bit);
    return result;
}

/* A coded segment (SPEC.md, section 5): its bytes, the offsets of its sections, and its decoding table. `left_out`:
 * planes that are not stored, from the last one back. */
struct df11_segment {
    const uint8_t *bytes;
    uint64_t size;
    enum df11_kind kind;
    uint32_t left_out;
    uint32_t elements;
    uint32_t lane_bytes;
    uint64_t tiles_offset, lanes_offset, sign_mantissa_offset, stream_offset;
    const uint32_t *table;
};

/* Bytes of a plane of a chunk of 256 weights. */
ALWAYS_INLINE unsigned chunk_plane(enum df11_kind kind, unsigned plane)
{
    return CHUNK_WEIGHTS / 8 * df11_splits[kind].bits[plane];
}

/* Bytes of a plane of so many weights: the last chunk of a plane of whole bytes ends with the weights, others are
 * filled up. */
ALWAYS_INLINE uint64_t plane_size(enum df11_kind kind, unsigned plane, uint64_t weights)
{
    return df11_splits[kind].bits[plane] == 8
               ? weights
               : (weights + CHUNK_WEIGHTS - 1) / CHUNK_WEIGHTS * chunk_plane(kind, plane);
}

/* Where the planes of a segment start, and after the last one the end of them all. */
ALWAYS_INLINE void place_planes(const struct df11_segment *segment, uint64_t *offsets)
{
    uint64_t at = segment->sign_mantissa_offset;
    for (unsigned plane = 0; plane < MOST_PLANES; plane++) {
        offsets[plane] = at;
        if (plane + segment->left_out < df11_splits[segment->kind].planes)
            at += (plane_size(segment->kind, plane, segment->elements) + 15) / 16 * 16;
    }
    offsets[MOST_PLANES] = at;
}

enum df11_status df11_build_decode_table(const uint8_t *section, unsigned alphabet_size, enum df11_kind kind,
                                         uint32_t *table);
enum df11_status df11_decode_tiles(const struct df11_segment *segment, uint64_t first, uint64_t last, void *out,
                                   uint64_t *failed);
enum df11_status df11_compare_tiles(const struct df11_segment *segment, uint64_t first, uint64_t last,
                                    const void *source, uint64_t *failed);

/* Pairs counted for the next code, in two halves, so that equal neighbours do not wait for each other; and of how many
 * weights. */
struct df11_counts {
    uint32_t pairs[2][SYMBOLS];
    uint64_t weights;
};

/* encode.c: what encoding a segment takes, and the code that it gets. */
struct df11_encoder;

struct df11_code {
    unsigned alphabet_size;
    unsigned section_size; /* bytes of the code table section */
    int64_t bits;          /* of all codes and exceptions */
    unsigned filler;       /* the symbol for weights that do not exist */
};

size_t df11_encoder_size(void);
const uint8_t *df11_code_section(const struct df11_encoder *encoder);
const int64_t *df11_exponents(const struct df11_encoder *encoder);
struct df11_counts *df11_encoder_counts(struct df11_encoder *encoder);
void df11_count_pairs(struct df11_counts *counts, enum df11_kind kind, const uint8_t *weights, uint64_t count);
void df11_build_code(struct df11_encoder *encoder, enum df11_kind kind, const void *weights, uint64_t count,
                     struct df11_code *code);
int64_t df11_encode_tiles(struct df11_encoder *encoder, const void *weights, const struct df11_segment *layout,
                          unsigned filler, uint8_t *out, uint64_t end, uint64_t *exceptions);
void df11_count_exponents(enum df11_kind kind, const void *weights, uint64_t count, int64_t *exponents);
int df11_cast_f32(const uint32_t *source, uint64_t count, uint16_t *out);
void df11_narrow_f32(const uint32_t *source, uint64_t count, uint16_t *out);
uint32_t df11_any_bits(enum df11_kind kind, const uint8_t *source, uint64_t count);

#ifdef HAVE_AVX2
/* sha256.c: only for CPUs with SHA instructions. */
struct df11_sha256 {
    uint32_t state[8];
    uint64_t size; /* bytes so far */
    uint8_t pending[64];
};

void df11_sha256_start(struct df11_sha256 *hash);
void df11_sha256_update(struct df11_sha256 *hash, const uint8_t *data, uint64_t size, struct df11_counts *counts);
void df11_sha256_digest(const struct df11_sha256 *hash, uint8_t *digest);
#endif

#endif
