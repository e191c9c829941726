/* Decode and compare coded segments: SPEC.md, sections 6 to 8, in that order. Read it beside reference.py, which does
 * the same slowly. */

#include "kernels.h"

/* Section 6: the code table. */

static unsigned length_of(const uint8_t *grid, unsigned cell)
{
    return (grid[cell >> 1] >> ((cell & 1) * 4)) & 15;
}

/* Expand a code table section into the decoding table, u32 [4096], initially zeros, indexed by the next 12 bits of a
 * lane. An entry is e1 << 23 | e0 << 7 | length: the exponents are where two BF16 values in a u32 have them, whatever
 * the dtype, and no length exceeds 12, even if the section changes meanwhile. The section has alphabet_size +
 * ceil(alphabet_size^2 / 2) bytes. */
enum df11_status df11_build_decode_table(const uint8_t *section, unsigned alphabet_size, enum df11_kind kind,
                                         uint32_t *table)
{
    const uint8_t *grid = section + alphabet_size;
    unsigned cells = alphabet_size * alphabet_size, codes = 0, kraft = 0;
    unsigned counts[CODE_LIMIT + 1] = {0}, next_code[CODE_LIMIT + 1];

    for (unsigned i = 1; i < alphabet_size; i++)
        if (section[i] <= section[i - 1])
            return BAD_ALPHABET;
    if (section[alphabet_size - 1] >> df11_splits[kind].exponent_bits)
        return BAD_ALPHABET;
    for (unsigned cell = 0; cell < cells; cell++) {
        unsigned length = length_of(grid, cell);
        if (length > CODE_LIMIT)
            return BAD_LENGTH;
        if (length) {
            counts[length]++;
            codes++;
            kraft += (unsigned)TABLE_SIZE >> length;
        }
    }
    if ((cells & 1) && grid[cells >> 1] >> 4)
        return BAD_LENGTH;
    int single = codes == 1 && counts[1] == 1; /* the only code, of length 1: it stands for either bit */
    if (kraft != TABLE_SIZE && !single)
        return INCOMPLETE_CODE;

    number_codes(counts, next_code);
    for (unsigned cell = 0; cell < cells; cell++) {
        unsigned length = length_of(grid, cell);
        if (!length || length > CODE_LIMIT)
            continue;
        uint32_t entry =
            (uint32_t)section[cell / alphabet_size] << 23 | (uint32_t)section[cell % alphabet_size] << 7 | length;
        unsigned slot = single ? 0 : reversed(next_code[length]++, length), step = single ? 1 : 1u << length;
        for (; slot < TABLE_SIZE; slot += step)
            table[slot] = entry;
    }
    return OK;
}

/* Sections 7 and 8: tiles and lanes. */

/* One chunk: 4 pairs of every lane. `position`: each lane's next bit, from the start of the segment. `limit`: the last
 * bit at which an 8-byte load stays inside, or 0 if damaged codes cannot lead outside. `pairs`: u32 [128], table
 * entries in the order of the weights.
 *
 * This is one of the two loops that decide the speed. A look-up has to wait about ten cycles for the one before it in
 * its lane; four interleaved lanes keep the CPU busy meanwhile. The topmost bit of a window marks its end: its position
 * after four shifts tells how many bits were taken, so that no lengths need to be added. (A window has at least 57
 * bits, four codes take at most 48: the mark is never looked up.) `pairs` is volatile because four stores are faster
 * than a vector assembled from four entries. */
ALWAYS_INLINE void decode_chunk(const struct df11_segment *segment, uint64_t *position, uint64_t limit,
                                volatile uint32_t *pairs)
{
    const uint64_t mark = (uint64_t)1 << 63;
    const uint32_t *table = segment->table;

    for (unsigned lane = 0; lane < LANES; lane += 4, position += 4, pairs += 16) {
        uint64_t window[4];
        for (unsigned j = 0; j < 4; j++)
            window[j] = load_u64(segment->bytes + (position[j] >> 3)) >> (position[j] & 7) | mark;
        for (unsigned pair = 0; pair < 4; pair++)
            for (unsigned j = 0; j < 4; j++) {
                uint32_t entry = table[window[j] & (TABLE_SIZE - 1)];
                pairs[4 * j + pair] = entry;
                window[j] >>= entry & 63;
            }
        for (unsigned j = 0; j < 4; j++) {
            position[j] += leading_zeros(window[j]);
            if (limit && position[j] > limit)
                position[j] = limit;
        }
    }
}

/* Of a plane that is left out. */
static const uint8_t zeros[CHUNK_WEIGHTS];

/* A BF16 weight from half an entry, which has the exponent in place and unwanted bits below it, and a sign/mantissa
 * byte. */
ALWAYS_INLINE uint16_t weight_of(unsigned half, unsigned s)
{
    return (uint16_t)((half & 0x7F80) | (s & 0x7F) | (s & 0x80) << 8);
}

ALWAYS_INLINE uint32_t f32_of(unsigned half, unsigned first, unsigned second, unsigned third)
{
    return (uint32_t)weight_of(half, first) << 16 | second << 8 | third;
}

/* Rows of a chunk: those weights whose bits a plane has at the same place in neighbouring bytes. With `k` constant, 16
 * weights take a few instructions. */
ALWAYS_INLINE void f16_row(unsigned k, const any_u16 *RESTRICT halves, const uint8_t *RESTRICT signs,
                           const uint8_t *RESTRICT high, const uint8_t *RESTRICT low, uint16_t *RESTRICT out)
{
    for (unsigned i = 0; i < 32; i++) {
        uint16_t sign = (uint16_t)((uint16_t)(signs[i] << (15 - k)) & 0x8000);
        uint16_t two = (uint16_t)((uint16_t)(high[i] << (8 - (k & 6))) & 0x300);
        out[i] = (uint16_t)(sign | (uint16_t)((uint16_t)(halves[i] << 3) & 0x7C00) | two | low[i]);
    }
}

ALWAYS_INLINE void e5m2_row(unsigned k, const any_u16 *RESTRICT halves, const uint8_t *RESTRICT signs,
                            const uint8_t *RESTRICT mantissas, uint8_t *RESTRICT out)
{
    for (unsigned i = 0; i < 32; i++) {
        uint16_t sign = (uint16_t)((uint16_t)(signs[i] << 7 >> k) & 0x80);
        uint16_t mantissa = (uint16_t)(mantissas[i] >> (k & 6) & 3);
        out[i] = (uint8_t)(sign | (uint16_t)((uint16_t)(halves[i] >> 5) & 0x7C) | mantissa);
    }
}

ALWAYS_INLINE void e4m3_row(unsigned k, const any_u16 *RESTRICT halves, const uint8_t *RESTRICT raw,
                            uint8_t *RESTRICT out)
{
    for (unsigned i = 0; i < 128; i++) {
        uint16_t s = (uint16_t)(raw[i] >> 4 * k);
        out[i] = (uint8_t)((uint16_t)((s & 8) << 4) | (uint16_t)((uint16_t)(halves[i] >> 4) & 0x78) | (s & 7));
    }
}

#define EACH_ROW(row) row(0) row(1) row(2) row(3) row(4) row(5) row(6) row(7)

/* Put the weights of a chunk together. `halves`: those of its entries, u16 [256]. */
ALWAYS_INLINE void assemble(enum df11_kind kind, const any_u16 *RESTRICT halves, const uint8_t *const *planes,
                            void *RESTRICT to)
{
    const uint8_t *RESTRICT first = planes[0], *RESTRICT second = planes[1], *RESTRICT third = planes[2];
    uint8_t *RESTRICT bytes = to;
    uint16_t *RESTRICT shorts = to;
    uint32_t *RESTRICT words = to;

    switch (kind) {
    case F16:
#define ROW(k) f16_row(k, halves + 32 * k, first, second + (k & 1) * 32, third + 32 * k, shorts + 32 * k);
        EACH_ROW(ROW)
#undef ROW
        break;
    case F32:
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
            words[i] = f32_of(halves[i], first[i], second[i], third[i]);
        break;
    case F8_E4M3:
        e4m3_row(0, halves, first, bytes);
        e4m3_row(1, halves + 128, first, bytes + 128);
        break;
    case F8_E5M2:
#define ROW(k) e5m2_row(k, halves + 32 * k, first, second + (k & 1) * 32, bytes + 32 * k);
        EACH_ROW(ROW)
#undef ROW
        break;
    default:
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
            shorts[i] = weight_of(halves[i], first[i]);
    }
}

ALWAYS_INLINE uint32_t load_weight(enum df11_kind kind, const void *weights, unsigned i)
{
    return df11_splits[kind].bytes == 1   ? ((const uint8_t *)weights)[i]
           : df11_splits[kind].bytes == 2 ? ((const uint16_t *)weights)[i]
                                          : ((const uint32_t *)weights)[i];
}

/* Compare a chunk with the source; note which weights differ, if any. */
ALWAYS_INLINE int compare(enum df11_kind kind, const any_u16 *halves, const uint8_t *const *planes, const void *source,
                          uint8_t *notes)
{
    const uint8_t *first = planes[0], *second = planes[1], *third = planes[2];
    uint32_t weights[CHUNK_WEIGHTS], different = 0;
    if (kind == BF16) { /* Without writing the weights down, which is faster. */
        uint16_t any = 0;
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
            any |= weight_of(halves[i], first[i]) ^ ((const uint16_t *)source)[i];
        if (!any)
            return 0;
    } else if (kind == F32) {
        uint32_t any = 0;
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
            any |= f32_of(halves[i], first[i], second[i], third[i]) ^ ((const uint32_t *)source)[i];
        if (!any)
            return 0;
    }
    assemble(kind, halves, planes, weights);
    for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
        different |= load_weight(kind, weights, i) ^ load_weight(kind, source, i);
    if (UNLIKELY(different))
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
            notes[i] = load_weight(kind, weights, i) != load_weight(kind, source, i);
    return different != 0;
}

/* A tile while it is decoded. In a comparison, `out` is null; a chunk that differs from the source (because of
 * exceptions, or damage) has a note for each of its weights until the exceptions have been applied. */
struct tile {
    const uint8_t *planes[MOST_PLANES];
    unsigned steps[MOST_PLANES]; /* bytes of each plane from chunk to chunk */
    uint8_t *out;
    const uint8_t *source;
    unsigned weights;
    uint64_t start[LANES + 1]; /* the first bit of each lane, and the bit after the last */
    uint64_t position[LANES];
    uint8_t differs[TILE_CHUNKS];
    uint8_t notes[TILE_WEIGHTS];
};

ALWAYS_INLINE void decode_chunks(enum df11_kind kind, const struct df11_segment *segment, struct tile *tile,
                                 uint64_t limit)
{
    uint32_t pairs[CHUNK_PAIRS];
    const any_u16 *halves = (const any_u16 *)pairs;
    const uint8_t *planes[MOST_PLANES] = {tile->planes[0], tile->planes[1], tile->planes[2]};
    unsigned bytes = df11_splits[kind].bytes;
    unsigned whole = tile->weights / CHUNK_WEIGHTS, rest = tile->weights % CHUNK_WEIGHTS;

    for (unsigned chunk = 0; chunk < whole; chunk++) {
        unsigned first = chunk * CHUNK_WEIGHTS;
        decode_chunk(segment, tile->position, limit, pairs);
        if (tile->out)
            assemble(kind, halves, planes, tile->out + bytes * first);
        else
            tile->differs[chunk] =
                (uint8_t)compare(kind, halves, planes, tile->source + bytes * first, tile->notes + first);
        for (unsigned plane = 0; plane < df11_splits[kind].planes; plane++)
            planes[plane] += tile->steps[plane];
    }
    if (rest) { /* The last chunk of a segment: nothing after its weights is read or written. */
        unsigned first = whole * CHUNK_WEIGHTS;
        uint8_t copies[MOST_PLANES][CHUNK_WEIGHTS] = {{0}};
        uint32_t weights[CHUNK_WEIGHTS];
        for (unsigned plane = 0; plane < df11_splits[kind].planes; plane++) {
            memcpy(copies[plane], planes[plane],
                   df11_splits[kind].bits[plane] == 8 ? rest : chunk_plane(kind, plane));
            planes[plane] = copies[plane];
        }
        decode_chunk(segment, tile->position, limit, pairs);
        assemble(kind, halves, planes, weights);
        if (tile->out) {
            memcpy(tile->out + bytes * first, weights, rest * bytes);
        } else {
            tile->differs[whole] = 1;
            for (unsigned i = 0; i < rest; i++)
                tile->notes[first + i] =
                    load_weight(kind, weights, i) != load_weight(kind, tile->source + bytes * first, i);
        }
    }
}

/* Each dtype has code of its own. */
#define DECODE_CHUNKS(limit)                                                                                           \
    switch (segment->kind) {                                                                                           \
    case F16:                                                                                                          \
        decode_chunks(F16, segment, tile, limit);                                                                      \
        break;                                                                                                         \
    case F32:                                                                                                          \
        decode_chunks(F32, segment, tile, limit);                                                                      \
        break;                                                                                                         \
    case F8_E4M3:                                                                                                      \
        decode_chunks(F8_E4M3, segment, tile, limit);                                                                  \
        break;                                                                                                         \
    case F8_E5M2:                                                                                                      \
        decode_chunks(F8_E5M2, segment, tile, limit);                                                                  \
        break;                                                                                                         \
    default:                                                                                                           \
        decode_chunks(BF16, segment, tile, limit);                                                                     \
    }

static void decode_chunks_portable(const struct df11_segment *segment, struct tile *tile, uint64_t limit)
{
    DECODE_CHUNKS(limit)
}

#ifdef HAVE_AVX2
AVX2 static void decode_chunks_avx2(const struct df11_segment *segment, struct tile *tile)
{
    DECODE_CHUNKS(0)
}
#endif

/* Find the lanes of a tile from its descriptor and its lane lengths. Returns the byte after its last exception, or 0 if
 * they do not fit. */
static uint64_t place_lanes(const struct df11_segment *segment, uint64_t index, struct tile *tile, unsigned *exceptions)
{
    uint64_t descriptor = load_u64(segment->bytes + segment->tiles_offset + 8 * index);
    const uint8_t *lengths = segment->bytes + segment->lanes_offset + index * LANES * segment->lane_bytes;
    unsigned shortest = descriptor >> 32 & 0xFFFF, chunks = (tile->weights + CHUNK_WEIGHTS - 1) / CHUNK_WEIGHTS;
    uint64_t bit = (segment->stream_offset + (descriptor & 0xFFFFFFFF) * STREAM_UNIT) * 8;

    *exceptions = (unsigned)(descriptor >> 48);
    for (unsigned lane = 0; lane < LANES; lane++) {
        unsigned length = shortest + (segment->lane_bytes == 1 ? lengths[lane] : load_u16(lengths + 2 * lane));
        if (length < 4 * chunks || length > 4 * CODE_LIMIT * chunks)
            return 0;
        tile->start[lane] = tile->position[lane] = bit;
        bit += length;
    }
    tile->start[LANES] = bit;
    uint64_t end = (bit + 31) / 32 * 4 + (uint64_t)4 * *exceptions;
    return *exceptions <= tile->weights && end <= segment->size - STREAM_END ? end : 0;
}

/* Exceptions replace weights, of F32 their upper halves; in a comparison, they decide whether a weight differs. */
static enum df11_status apply_exceptions(enum df11_kind kind, struct tile *tile, const uint8_t *list, unsigned count,
                                         int *different)
{
    int64_t previous = -1;
    for (; count; count--, list += 4) {
        unsigned position = load_u16(list), value = load_u16(list + 2);
        int64_t place = (int64_t)(position >> 3 & (LANES - 1)) << 16 | position; /* by lane, then by position */
        if (position >= tile->weights || place <= previous || (df11_splits[kind].bytes == 1 && value >> 8))
            return BAD_EXCEPTION;
        previous = place;
        const uint8_t *planes[MOST_PLANES];
        for (unsigned plane = 0; plane < MOST_PLANES; plane++)
            planes[plane] = tile->planes[plane] + position / CHUNK_WEIGHTS * tile->steps[plane];
        unsigned in_chunk = position % CHUNK_WEIGHTS;
        uint32_t weight = value;
        if (kind == F32)
            weight = (uint32_t)value << 16 | (uint32_t)(planes[1][in_chunk] << 8 | planes[2][in_chunk]);
        if (!tile->out && weight != load_weight(kind, tile->source, position))
            *different = 1;
        else if (!tile->out)
            tile->notes[position] = 0;
        else if (df11_splits[kind].bytes == 1)
            tile->out[position] = (uint8_t)weight;
        else if (df11_splits[kind].bytes == 2)
            ((uint16_t *)(void *)tile->out)[position] = (uint16_t)weight;
        else
            ((uint32_t *)(void *)tile->out)[position] = weight;
    }
    return OK;
}

static int noted(const struct tile *tile)
{
    unsigned any = 0;
    for (unsigned first = 0; first < tile->weights; first += CHUNK_WEIGHTS)
        if (tile->differs[first / CHUNK_WEIGHTS])
            for (unsigned i = first; i < first + CHUNK_WEIGHTS && i < tile->weights; i++)
                any |= tile->notes[i];
    return any != 0;
}

static enum df11_status decode_tile(const struct df11_segment *segment, uint64_t index, struct tile *tile)
{
    unsigned exceptions;
    uint64_t end = place_lanes(segment, index, tile, &exceptions);
    if (!end)
        return BAD_TILE;
    /* Damaged codes run past their lane by at most 44 bits per chunk. If that, and the 8 bytes of a load, stay inside,
     * no clamping is needed. */
    uint64_t furthest = tile->start[LANES] / 8 + 44 * TILE_CHUNKS / 8 + 16;
#ifdef HAVE_AVX2
    if (df11_use_avx2 && furthest <= segment->size)
        decode_chunks_avx2(segment, tile);
    else
#endif
        decode_chunks_portable(segment, tile, furthest <= segment->size ? 0 : (segment->size - 8) * 8);
    for (unsigned lane = 0; lane < LANES; lane++)
        if (tile->position[lane] != tile->start[lane + 1])
            return BAD_LANE;
    int different = 0;
    enum df11_status status
        = apply_exceptions(segment->kind, tile, segment->bytes + end - 4 * exceptions, exceptions, &different);
    if (status == OK && !tile->out && (different || noted(tile)))
        return DIFFERENT;
    return status;
}

static enum df11_status each_tile(const struct df11_segment *segment, uint64_t first, uint64_t last, uint8_t *out,
                                  const uint8_t *source, uint64_t *failed)
{
    struct tile tile;
    uint64_t offsets[MOST_PLANES + 1];
    enum df11_kind kind = segment->kind;

    place_planes(segment, offsets);
    for (uint64_t index = first; index < last; index++) {
        uint64_t begin = (index - first) * TILE_WEIGHTS * df11_splits[kind].bytes;
        uint64_t left = segment->elements - index * TILE_WEIGHTS;
        tile.weights = left < TILE_WEIGHTS ? (unsigned)left : TILE_WEIGHTS;
        for (unsigned plane = 0; plane < MOST_PLANES; plane++) {
            int is_stored = plane + segment->left_out < df11_splits[kind].planes;
            tile.steps[plane] = is_stored ? chunk_plane(kind, plane) : 0;
            tile.planes[plane] =
                is_stored ? segment->bytes + offsets[plane] + index * TILE_CHUNKS * tile.steps[plane] : zeros;
        }
        tile.out = out ? out + begin : 0;
        tile.source = source ? source + begin : 0;
        enum df11_status status = decode_tile(segment, index, &tile);
        if (status != OK) {
            *failed = index;
            return status;
        }
    }
    *failed = last;
    return OK;
}

/* Decode the tiles `first` to `last` (exclusive) into `out`, which has only their weights. On an error, `failed` is the
 * tile that has it. */
enum df11_status df11_decode_tiles(const struct df11_segment *segment, uint64_t first, uint64_t last, void *out,
                                   uint64_t *failed)
{
    return each_tile(segment, first, last, out, 0, failed);
}

/* The same, but compare with `source` and write nothing: DIFFERENT means that tile `failed` is the first that
 * differs. */
enum df11_status df11_compare_tiles(const struct df11_segment *segment, uint64_t first, uint64_t last,
                                    const void *source, uint64_t *failed)
{
    return each_tile(segment, first, last, 0, source, failed);
}
