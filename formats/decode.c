/* Decode and compare coded segments: SPEC.md, sections 6 to 8, in that order. Read it beside reference.py, which does
 * the same slowly. */

#include "kernels.h"

/* Section 6: the code table. */

static unsigned length_of(const uint8_t *grid, unsigned cell)
{
    return (grid[cell >> 1] >> ((cell & 1) * 4)) & 15;
}

/* Expand a code table section into the decoding table, u32 [4096], initially zeros, indexed by the next 12 bits of a
 * lane. An entry is e1 << 23 | e0 << 7 | length: the exponents are where two BF16 values in a u32 have them, and no
 * length exceeds 12, even if the section changes meanwhile. The section has alphabet_size + ceil(alphabet_size^2 / 2)
 * bytes. */
enum df11_status df11_build_decode_table(const uint8_t *section, unsigned alphabet_size, uint32_t *table)
{
    const uint8_t *grid = section + alphabet_size;
    unsigned cells = alphabet_size * alphabet_size, codes = 0, kraft = 0;
    unsigned counts[CODE_LIMIT + 1] = {0}, next_code[CODE_LIMIT + 1];

    for (unsigned i = 1; i < alphabet_size; i++)
        if (section[i] <= section[i - 1])
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

/* A weight from half an entry, which has the exponent in place and unwanted bits below it, and a sign/mantissa byte. */
ALWAYS_INLINE uint16_t weight_of(unsigned half, unsigned s)
{
    return (uint16_t)((half & 0x7F80) | (s & 0x7F) | (s & 0x80) << 8);
}

/* Put the weights of a chunk together. `halves`: those of its entries, u16 [256]. */
ALWAYS_INLINE void assemble(const any_u16 *halves, const uint8_t *sign_mantissa, uint16_t *out)
{
    for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
        out[i] = weight_of(halves[i], sign_mantissa[i]);
}

/* The same, but compare with the source; note which weights differ, if any. */
ALWAYS_INLINE int compare(const any_u16 *halves, const uint8_t *sign_mantissa, const uint16_t *source, uint8_t *notes)
{
    uint16_t different = 0;
    for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
        different |= weight_of(halves[i], sign_mantissa[i]) ^ source[i];
    if (UNLIKELY(different))
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
            notes[i] = weight_of(halves[i], sign_mantissa[i]) != source[i];
    return different != 0;
}

/* A tile while it is decoded. In a comparison, `out` is null; a chunk that differs from the source (because of
 * exceptions, or damage) has a note for each of its weights until the exceptions have been applied. */
struct tile {
    const uint8_t *sign_mantissa;
    uint16_t *out;
    const uint16_t *source;
    unsigned weights;
    uint64_t start[LANES + 1]; /* the first bit of each lane, and the bit after the last */
    uint64_t position[LANES];
    uint8_t differs[TILE_CHUNKS];
    uint8_t notes[TILE_WEIGHTS];
};

ALWAYS_INLINE void decode_chunks(const struct df11_segment *segment, struct tile *tile, uint64_t limit)
{
    uint32_t pairs[CHUNK_PAIRS];
    const any_u16 *halves = (const any_u16 *)pairs;
    unsigned whole = tile->weights / CHUNK_WEIGHTS, rest = tile->weights % CHUNK_WEIGHTS;
    uint16_t weights[CHUNK_WEIGHTS];

    for (unsigned chunk = 0; chunk < whole; chunk++) {
        unsigned first = chunk * CHUNK_WEIGHTS;
        decode_chunk(segment, tile->position, limit, pairs);
        if (tile->out)
            assemble(halves, tile->sign_mantissa + first, tile->out + first);
        else
            tile->differs[chunk] =
                (uint8_t)compare(halves, tile->sign_mantissa + first, tile->source + first, tile->notes + first);
    }
    if (rest) { /* The last chunk of a segment: nothing after its weights is read or written. */
        unsigned first = whole * CHUNK_WEIGHTS;
        uint8_t sign_mantissa[CHUNK_WEIGHTS] = {0};
        memcpy(sign_mantissa, tile->sign_mantissa + first, rest);
        decode_chunk(segment, tile->position, limit, pairs);
        assemble(halves, sign_mantissa, weights);
        if (tile->out) {
            memcpy(tile->out + first, weights, rest * sizeof *weights);
        } else {
            tile->differs[whole] = 1;
            for (unsigned i = 0; i < rest; i++)
                tile->notes[first + i] = weights[i] != tile->source[first + i];
        }
    }
}

static void decode_chunks_portable(const struct df11_segment *segment, struct tile *tile, uint64_t limit)
{
    decode_chunks(segment, tile, limit);
}

#ifdef HAVE_AVX2
AVX2 static void decode_chunks_avx2(const struct df11_segment *segment, struct tile *tile)
{
    decode_chunks(segment, tile, 0);
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

/* Exceptions replace weights; in a comparison, they decide whether a weight differs. */
static enum df11_status apply_exceptions(struct tile *tile, const uint8_t *list, unsigned count, int *different)
{
    int64_t previous = -1;
    for (; count; count--, list += 4) {
        unsigned position = load_u16(list), weight = load_u16(list + 2);
        int64_t place = (int64_t)(position >> 3 & (LANES - 1)) << 16 | position; /* by lane, then by position */
        if (position >= tile->weights || place <= previous)
            return BAD_EXCEPTION;
        previous = place;
        if (tile->out)
            tile->out[position] = (uint16_t)weight;
        else if (weight != tile->source[position])
            *different = 1;
        else
            tile->notes[position] = 0;
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
    enum df11_status status = apply_exceptions(tile, segment->bytes + end - 4 * exceptions, exceptions, &different);
    if (status == OK && !tile->out && (different || noted(tile)))
        return DIFFERENT;
    return status;
}

static enum df11_status each_tile(const struct df11_segment *segment, uint64_t first, uint64_t last, uint16_t *out,
                                  const uint16_t *source, uint64_t *failed)
{
    struct tile tile;
    for (uint64_t index = first; index < last; index++) {
        uint64_t begin = (index - first) * TILE_WEIGHTS, left = segment->elements - index * TILE_WEIGHTS;
        tile.weights = left < TILE_WEIGHTS ? (unsigned)left : TILE_WEIGHTS;
        tile.sign_mantissa = segment->bytes + segment->sign_mantissa_offset + index * TILE_WEIGHTS;
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

/* Decode the tiles `first` to `last` (exclusive) into `out`, u16, which has only their weights. On an error, `failed`
 * is the tile that has it. */
enum df11_status df11_decode_tiles(const struct df11_segment *segment, uint64_t first, uint64_t last, uint16_t *out,
                                   uint64_t *failed)
{
    return each_tile(segment, first, last, out, 0, failed);
}

/* The same, but compare with `source` and write nothing: DIFFERENT means that tile `failed` is the first that
 * differs. */
enum df11_status df11_compare_tiles(const struct df11_segment *segment, uint64_t first, uint64_t last,
                                    const uint16_t *source, uint64_t *failed)
{
    return each_tile(segment, first, last, 0, source, failed);
}
