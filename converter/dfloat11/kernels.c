/* DFloat11's layout: decode blocks of a unit, and encode a unit. Sizes have been checked; nothing that is read from a
 * checkpoint is trusted. */
#include "kernels.h"

#include "../../formats/kernels.h"

static const uint64_t WINDOW_MASK = (1 << DFLOAT11_WINDOW) - 1;

ALWAYS_INLINE uint64_t load_big_endian(const uint8_t *from)
{
    uint64_t value = load_u64(from);
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_bswap64(value);
#else
    return _byteswap_uint64(value);
#endif
}

/* The bits from `position` on, 57 at least, at the top. */
ALWAYS_INLINE uint64_t bits_at(const uint8_t *codes, uint64_t position)
{
    return load_big_endian(codes + (position >> 3)) << (position & 7);
}

/* The exponent that the bits at the top of `window` are the code of, and its length; 0 if there is none. The tables are
 * passed through as DFloat11's own kernel does: an entry that no code leads to may be anything, even lead back. */
static unsigned step(const struct df11_dfloat11_table *table, uint64_t window, unsigned *exponent)
{
    unsigned row = 0;
    for (unsigned depth = 0; depth < DFLOAT11_DEPTH; depth++, window <<= 8) {
        unsigned byte = (unsigned)(window >> 56), entry = table->rows[row][byte];
        if (entry < DFLOAT11_EXPONENTS) {
            unsigned length = table->lengths[entry];
            *exponent = entry;
            return table->usable[row][byte] && length > 8 * depth && length <= 8 * depth + 8 ? length : 0;
        }
        row = DFLOAT11_ROW - entry;
    }
    return 0;
}

/* Of an entry: whether all entries that its code leaves open are the same. What the code's end mark leaves in a table,
 * which is no code, often fails here. */
static int is_whole(const uint8_t *row, unsigned byte, unsigned length)
{
    if (!length)
        return 0;
    unsigned size = 1u << (7 - (length - 1) % 8), first = byte & ~(size - 1);
    for (unsigned other = first; other < first + size; other++)
        if (row[other] != row[byte])
            return 0;
    return 1;
}

/* `luts`: `rows` rows, the last of which are the lengths; rows is 2 to 18. */
enum df11_dfloat11_status df11_dfloat11_build(const uint8_t *luts, unsigned rows, struct df11_dfloat11_table *table)
{
    unsigned tables = rows - 1;
    const uint8_t *lengths = luts + tables * DFLOAT11_ROW;

    for (unsigned exponent = 0; exponent < DFLOAT11_ROW; exponent++)
        if (lengths[exponent] > (exponent < DFLOAT11_EXPONENTS ? 32 : 0))
            return DFLOAT11_BAD_LENGTH;
    for (unsigned i = 0; i < tables * DFLOAT11_ROW; i++)
        if (luts[i] >= DFLOAT11_EXPONENTS && (unsigned)DFLOAT11_ROW - luts[i] >= tables)
            return DFLOAT11_BAD_TABLE;
    memset(table, 0, sizeof *table);
    memcpy(table->lengths, lengths, DFLOAT11_ROW);
    memcpy(table->rows, luts, tables * DFLOAT11_ROW);
    for (unsigned row = 0; row < tables; row++)
        for (unsigned byte = 0; byte < DFLOAT11_ROW; byte++) {
            unsigned entry = table->rows[row][byte];
            table->usable[row][byte]
                = entry < DFLOAT11_EXPONENTS && is_whole(table->rows[row], byte, lengths[entry]);
        }
    for (uint64_t window = 0; window <= WINDOW_MASK; window++) {
        uint64_t found = 0, ends = 0xFFFF; /* a code that is not there ends nowhere */
        unsigned bits = 0, count = 0, exponent = 0;
        for (; count < 4 && bits < DFLOAT11_WINDOW; count++) {
            unsigned length = step(table, window << (64 - DFLOAT11_WINDOW + bits), &exponent);
            if (!length || bits + length > DFLOAT11_WINDOW)
                break;
            found |= (uint64_t)exponent << (8 * count);
            bits += length;
            ends &= ~((uint64_t)(15 - bits) << (4 * count));
        }
        table->steps[window] = found | (uint64_t)count << 32 | ends << 40 | (uint64_t)bits << 56;
    }
    return DFLOAT11_OK;
}

static unsigned gap_of(const uint8_t *gaps, uint64_t thread)
{
    uint64_t bit = 5 * thread;
    unsigned two = (unsigned)gaps[bit >> 3] << 8;
    if ((bit & 7) > 3)
        two |= gaps[(bit >> 3) + 1];
    return two >> (11 - (bit & 7)) & 31;
}

/* Of an entry of table->steps: how many codes start before bit `left`, which is at most WINDOW, and where they end. */
ALWAYS_INLINE unsigned codes_before(uint64_t entry, unsigned left, unsigned *bits)
{
    unsigned ends = (unsigned)(entry >> 40) & 0xFFFF, several = (unsigned)(entry >> 32) & 0xFF;
    unsigned count = 1u + ((ends & 15) < left) + ((ends >> 4 & 15) < left) + ((ends >> 8 & 15) < left);
    if (count > several)
        count = several;
    *bits = ends >> (4 * count - 4) & 15;
    return count;
}

/* One block: its exponents. `position`: the bit where the next code starts. */
ALWAYS_INLINE enum df11_dfloat11_status decode_block(const struct df11_dfloat11_blocks *all, uint64_t block,
                                                     uint64_t *position, uint8_t *exponents)
{
    const struct df11_dfloat11_table *table = all->table;
    const uint8_t *codes = all->codes;
    uint64_t at = *position, count = all->positions[block + 1] - all->positions[block], found = 0;
    uint64_t first = block * all->threads;
    int last = all->last && block + 1 == all->blocks;

    for (uint64_t thread = first; thread < first + all->threads; thread++) {
        uint64_t end = (thread + 1) * DFLOAT11_THREAD_BITS;
        unsigned gap = gap_of(all->gaps, thread);
        if (last && found == count)
            break;
        if (at != thread * DFLOAT11_THREAD_BITS + gap)
            return DFLOAT11_BAD_GAP;
        uint64_t window = load_big_endian(codes + 8 * thread) << gap;
        unsigned several, bits, left = DFLOAT11_THREAD_BITS - gap;
        /* Of most of its codes all bits are in the thread's own word. */
        while (left >= DFLOAT11_WINDOW && count - found >= 4) {
            uint64_t entry = table->steps[window >> (64 - DFLOAT11_WINDOW)];
            uint32_t four = (uint32_t)entry;
            if (UNLIKELY(!(entry >> 56)))
                break;
            memcpy(exponents + found, &four, sizeof four);
            found += (unsigned)(entry >> 32) & 0xFF;
            window <<= entry >> 56;
            left -= (unsigned)(entry >> 56);
        }
        at = end - left;
        while (at < end && found < count) {
            window = bits_at(codes, at);
            uint64_t entry = table->steps[window >> (64 - DFLOAT11_WINDOW)];
            if (UNLIKELY(!(entry >> 56) || count - found < 4)) {
                unsigned exponent = 0;
                several = 1;
                if (!(bits = step(table, window, &exponent)))
                    return DFLOAT11_BAD_CODE;
                exponents[found] = (uint8_t)exponent;
            } else {
                uint32_t four = (uint32_t)entry;
                memcpy(exponents + found, &four, sizeof four);
                left = end - at < DFLOAT11_WINDOW ? (unsigned)(end - at) : DFLOAT11_WINDOW;
                several = codes_before(entry, left, &bits);
            }
            found += several;
            at += bits;
        }
        if (at < end && !last)
            return DFLOAT11_BAD_POSITION;
    }
    if (found != count)
        return DFLOAT11_BAD_POSITION;
    *position = at;
    return DFLOAT11_OK;
}

ALWAYS_INLINE void join(const uint8_t *exponents, const uint8_t *sign_mantissa, uint64_t count, uint16_t *out)
{
    for (uint64_t i = 0; i < count; i++)
        out[i] = (uint16_t)((sign_mantissa[i] & 0x80) << 8 | exponents[i] << 7 | (sign_mantissa[i] & 0x7F));
}

/* `positions` rise by at most 64 * threads. */
ALWAYS_INLINE enum df11_dfloat11_status decode(const struct df11_dfloat11_blocks *all, uint16_t *out, uint64_t *failed)
{
    uint8_t exponents[DFLOAT11_MAX_THREADS * DFLOAT11_THREAD_BITS];
    uint64_t position = gap_of(all->gaps, 0);

    for (uint64_t block = 0; block < all->blocks; block++) {
        uint64_t start = all->positions[block] - all->positions[0];
        enum df11_dfloat11_status status = decode_block(all, block, &position, exponents);
        *failed = block;
        if (status != DFLOAT11_OK)
            return status;
        join(exponents, all->sign_mantissa + start, all->positions[block + 1] - all->positions[block], out + start);
        if (all->last && block + 1 == all->blocks)
            return position <= all->bits && all->bits - position < 8 ? DFLOAT11_OK : DFLOAT11_BAD_END;
        uint64_t next = (block + 1) * all->threads;
        if (position != next * DFLOAT11_THREAD_BITS + gap_of(all->gaps, next))
            return DFLOAT11_BAD_GAP;
    }
    return DFLOAT11_OK;
}

COMPILE_TWICE(enum df11_dfloat11_status, decode,
              (const struct df11_dfloat11_blocks *all, uint16_t *out, uint64_t *failed), (all, out, failed))

enum df11_dfloat11_status df11_dfloat11_decode(const struct df11_dfloat11_blocks *blocks, uint16_t *out,
                                               uint64_t *failed)
{
    return CHOOSE(decode, (blocks, out, failed));
}

/* Encoding. */

ALWAYS_INLINE void store_big_endian(uint8_t *to, uint64_t value)
{
    for (int byte = 0; byte < 8; byte++)
        to[byte] = (uint8_t)(value >> (56 - 8 * byte));
}

/* A thread's gap is what the code before it leaves in its word. Returns an exponent without a code, or -1. */
ALWAYS_INLINE int encode(const uint16_t *weights, uint64_t count, const uint8_t *lengths, const uint32_t *codes,
                         struct df11_dfloat11_stream *stream, unsigned threads, uint8_t *out, uint8_t *gaps,
                         uint32_t *positions)
{
    uint64_t word = stream->word, words = stream->words;
    unsigned fill = (unsigned)stream->fill;

    for (uint64_t i = 0; i < count; i++) {
        unsigned exponent = weights[i] >> 7 & 0xFF, length = lengths[exponent], room = 64 - fill;
        uint64_t code = codes[exponent];
        if (UNLIKELY(!length))
            return (int)exponent;
        if (length < room) {
            word |= code << (room - length);
            fill += length;
            continue;
        }
        fill = length - room;
        store_big_endian(out, word | code >> fill);
        out += 8;
        word = fill ? code << (64 - fill) : 0;
        *gaps++ = (uint8_t)fill;
        if (!(++words % threads))
            *positions++ = (uint32_t)(stream->weights + i + 1);
    }
    stream->word = word;
    stream->fill = fill;
    stream->words = words;
    stream->weights += count;
    return -1;
}

COMPILE_TWICE(int, encode,
              (const uint16_t *weights, uint64_t count, const uint8_t *lengths, const uint32_t *codes,
               struct df11_dfloat11_stream *stream, unsigned threads, uint8_t *out, uint8_t *gaps,
               uint32_t *positions),
              (weights, count, lengths, codes, stream, threads, out, gaps, positions))

int df11_dfloat11_encode(const uint16_t *weights, uint64_t count, const uint8_t *lengths, const uint32_t *codes,
                         struct df11_dfloat11_stream *stream, unsigned threads, uint8_t *out, uint8_t *gaps,
                         uint32_t *positions)
{
    return CHOOSE(encode, (weights, count, lengths, codes, stream, threads, out, gaps, positions));
}

ALWAYS_INLINE void split(const uint16_t *weights, uint64_t count, uint8_t *out)
{
    for (uint64_t i = 0; i < count; i++)
        out[i] = (uint8_t)((weights[i] >> 8 & 0x80) | (weights[i] & 0x7F));
}

COMPILE_TWICE(void, split, (const uint16_t *weights, uint64_t count, uint8_t *out), (weights, count, out))

void df11_dfloat11_split(const uint16_t *weights, uint64_t count, uint8_t *out)
{
    CHOOSE(split, (weights, count, out));
}
