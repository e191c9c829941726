/* Encode segments. In order: count pairs (SPEC.md, section 12), choose the code (section 6), write tiles (section 7);
 * casts. */

#include <stdlib.h>

#include "../formats/kernels.h"

enum {
    EXCEPTION_BITS = 32,
    /* Of an entry of the encoding table, code << 8 | flags | length: which weights of a pair are exceptions. */
    FIRST_IS_EXCEPTION = 1 << 24,
    SECOND_IS_EXCEPTION = 1 << 25,
    CODE_AND_LENGTH = FIRST_IS_EXCEPTION - 1,
};

/* The state of an encoder: 2 MB, initially zeros; qsort takes up to half a megabyte more while it sorts. */
struct df11_encoder {
    struct df11_counts counts; /* zeros except between counting and choosing the code */
    uint32_t table[SYMBOLS];   /* entries of the symbols that occur */
    int64_t exponents[256];    /* how often each occurs in the weights counted last */
    unsigned used_count;
    uint16_t used[SYMBOLS];     /* the symbols that occur, ascending */
    uint32_t count_of[SYMBOLS]; /* how often each of them occurs, by symbol */
    uint64_t by_count[SYMBOLS]; /* the same sorted: the most frequent first, of equals the smaller symbol, which is in
                                   the low 16 bits */
    /* Code lengths by symbol: of the candidate at hand, and of the best one. */
    uint8_t lengths[SYMBOLS], best_lengths[SYMBOLS];
    /* Of the symbols with a code, the one with the shortest by first and by second exponent, or -1. */
    int32_t by_first[256], by_second[256];
    int32_t place[256]; /* of an exponent in the alphabet, or -1 */
    uint8_t section[256 + SYMBOLS / 2];
    /* Package-merge. */
    int64_t leaves[TABLE_SIZE], packages[2 * TABLE_SIZE], merged[2 * TABLE_SIZE];
    uint8_t is_leaf[CODE_LIMIT][2 * TABLE_SIZE], leaf_lengths[TABLE_SIZE];
    /* One tile: its exponents in pairs, and the groups of four pairs of which one is coded as another. */
    uint16_t symbols[TILE_PAIRS];
    uint16_t marked[TILE_PAIRS / 4];
};

size_t df11_encoder_size(void)
{
    return sizeof(struct df11_encoder);
}

const uint8_t *df11_code_section(const struct df11_encoder *encoder)
{
    return encoder->section;
}

const int64_t *df11_exponents(const struct df11_encoder *encoder)
{
    return encoder->exponents;
}

struct df11_counts *df11_encoder_counts(struct df11_encoder *encoder)
{
    return &encoder->counts;
}

/* Weights apart: exponents, which in pairs are the symbols, and planes of the other bits (SPEC.md, section 5). */

ALWAYS_INLINE uint32_t load_weight(enum df11_kind kind, const uint8_t *weights, uint64_t i)
{
    uint16_t two;
    uint32_t four;

    if (df11_splits[kind].bytes == 1)
        return weights[i];
    if (df11_splits[kind].bytes == 2) {
        memcpy(&two, weights + 2 * i, sizeof two);
        return two;
    }
    memcpy(&four, weights + 4 * i, sizeof four);
    return four;
}

ALWAYS_INLINE uint8_t exponent_of(enum df11_kind kind, uint32_t weight)
{
    return (uint8_t)(weight >> df11_splits[kind].mantissa_bits & ((1u << df11_splits[kind].exponent_bits) - 1));
}

ALWAYS_INLINE void exponents_as(enum df11_kind kind, const uint8_t *weights, unsigned count, uint8_t *exponents)
{
    for (unsigned i = 0; i < count; i++)
        exponents[i] = exponent_of(kind, load_weight(kind, weights, i));
}

/* `from` on, of 32-fold `runs` of weights, `bits` bits from `shift` on, to a plane of a chunk: run k goes to the bits
 * from k * bits on. */
ALWAYS_INLINE void pack(enum df11_kind kind, const uint8_t *weights, unsigned shift, unsigned bits, uint8_t *plane)
{
    unsigned size = CHUNK_WEIGHTS / 8 * bits;
    for (unsigned i = 0; i < size; i++) {
        unsigned packed = 0;
        for (unsigned k = 0; k < 8 / bits; k++)
            packed |= (load_weight(kind, weights, k * size + i) >> shift & ((1u << bits) - 1)) << k * bits;
        plane[i] = (uint8_t)packed;
    }
}

/* The planes of a chunk. What is left of a weight without its exponent starts with the sign. */
ALWAYS_INLINE void split_chunk(enum df11_kind kind, const uint8_t *weights, uint8_t *const *planes)
{
    if (kind == BF16 || kind == F32)
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++) {
            uint32_t weight = load_weight(kind, weights, i), upper = kind == F32 ? weight >> 16 : weight;
            planes[0][i] = (uint8_t)((upper >> 8 & 0x80) | (upper & 0x7F));
        }
    if (kind == F32)
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++) {
            uint32_t weight = load_weight(kind, weights, i);
            planes[1][i] = (uint8_t)(weight >> 8);
            planes[2][i] = (uint8_t)weight;
        }
    if (kind == F16) {
        pack(kind, weights, 15, 1, planes[0]);
        pack(kind, weights, 8, 2, planes[1]);
        for (unsigned i = 0; i < CHUNK_WEIGHTS; i++)
            planes[2][i] = (uint8_t)load_weight(kind, weights, i);
    }
    if (kind == F8_E4M3)
        for (unsigned i = 0; i < CHUNK_WEIGHTS / 2; i++) {
            unsigned low = weights[i], high = weights[i + CHUNK_WEIGHTS / 2];
            low = (low >> 4 & 8) | (low & 7);
            high = (high >> 4 & 8) | (high & 7);
            planes[0][i] = (uint8_t)(low | high << 4);
        }
    if (kind == F8_E5M2) {
        pack(kind, weights, 7, 1, planes[0]);
        pack(kind, weights, 0, 2, planes[1]);
    }
}

/* Split `count` weights of a tile; planes that are left out go to one place. */
ALWAYS_INLINE void split_as(enum df11_kind kind, const uint8_t *weights, unsigned count, uint8_t *exponents,
                            uint8_t *const *planes, unsigned left_out)
{
    uint8_t unwanted[CHUNK_WEIGHTS], last[MOST_BYTES * CHUNK_WEIGHTS] = {0}, copies[MOST_PLANES][CHUNK_WEIGHTS];
    uint8_t *to[MOST_PLANES], *to_copies[MOST_PLANES];
    unsigned stored = df11_splits[kind].planes - left_out, bytes = df11_splits[kind].bytes;
    unsigned whole = count / CHUNK_WEIGHTS, rest = count % CHUNK_WEIGHTS;

    exponents_as(kind, weights, count, exponents);
    for (unsigned chunk = 0; chunk < whole; chunk++) {
        for (unsigned plane = 0; plane < MOST_PLANES; plane++)
            to[plane] = plane < stored ? planes[plane] + chunk * chunk_plane(kind, plane) : unwanted;
        split_chunk(kind, weights + bytes * CHUNK_WEIGHTS * chunk, to);
    }
    if (rest) {
        memcpy(last, weights + bytes * CHUNK_WEIGHTS * whole, bytes * rest);
        for (unsigned plane = 0; plane < MOST_PLANES; plane++)
            to_copies[plane] = copies[plane];
        split_chunk(kind, last, to_copies);
        for (unsigned plane = 0; plane < stored; plane++)
            memcpy(planes[plane] + whole * chunk_plane(kind, plane), copies[plane],
                   df11_splits[kind].bits[plane] == 8 ? rest : chunk_plane(kind, plane));
    }
}

/* Each dtype has code of its own. */
ALWAYS_INLINE void exponents_of(enum df11_kind kind, const uint8_t *weights, unsigned count, uint8_t *exponents)
{
    switch (kind) {
    case F16:
        exponents_as(F16, weights, count, exponents);
        break;
    case F32:
        exponents_as(F32, weights, count, exponents);
        break;
    case F8_E4M3:
        exponents_as(F8_E4M3, weights, count, exponents);
        break;
    case F8_E5M2:
        exponents_as(F8_E5M2, weights, count, exponents);
        break;
    default:
        exponents_as(BF16, weights, count, exponents);
    }
}

ALWAYS_INLINE void split(enum df11_kind kind, const uint8_t *weights, unsigned count, uint8_t *exponents,
                         uint8_t *const *planes, unsigned left_out)
{
    switch (kind) {
    case F16:
        split_as(F16, weights, count, exponents, planes, left_out);
        break;
    case F32:
        split_as(F32, weights, count, exponents, planes, left_out);
        break;
    case F8_E4M3:
        split_as(F8_E4M3, weights, count, exponents, planes, left_out);
        break;
    case F8_E5M2:
        split_as(F8_E5M2, weights, count, exponents, planes, left_out);
        break;
    default:
        split_as(BF16, weights, count, exponents, planes, left_out);
    }
}

COMPILE_TWICE(void, exponents_of, (enum df11_kind kind, const uint8_t *weights, unsigned count, uint8_t *exponents),
              (kind, weights, count, exponents))
COMPILE_TWICE(void, split,
              (enum df11_kind kind, const uint8_t *weights, unsigned count, uint8_t *exponents, uint8_t *const *planes,
               unsigned left_out),
              (kind, weights, count, exponents, planes, left_out))

/* Counting. */

/* Add the pairs of `count` weights to the counts; a last weight without a partner forms no pair. `weights` need not be
 * aligned. */
void df11_count_pairs(struct df11_counts *counts, enum df11_kind kind, const uint8_t *weights, uint64_t count)
{
    uint16_t symbols[1024];

    counts->weights += count;
    while (count > 1) {
        unsigned pairs = count / 2 < 1024 ? (unsigned)(count / 2) : 1024;
        CHOOSE(exponents_of, (kind, weights, 2 * pairs, (uint8_t *)symbols));
        for (unsigned i = 0; i + 1 < pairs; i += 2) {
            counts->pairs[0][symbols[i]]++;
            counts->pairs[1][symbols[i + 1]]++;
        }
        if (pairs & 1)
            counts->pairs[0][symbols[pairs - 1]]++;
        count -= 2 * pairs;
        weights += 2 * pairs * df11_splits[kind].bytes;
    }
}

/* Count exponents, i64 [256], for weights that df11_count_pairs does not see. */
void df11_count_exponents(enum df11_kind kind, const void *weights, uint64_t count, int64_t *exponents)
{
    const uint8_t *at = weights;
    uint8_t found[2048];
    uint32_t counts[4][256];

    memset(exponents, 0, 256 * sizeof *exponents);
    memset(counts, 0, sizeof counts);
    for (uint64_t done = 0; done < count;) {
        unsigned some = count - done < 2048 ? (unsigned)(count - done) : 2048;
        CHOOSE(exponents_of, (kind, at + done * df11_splits[kind].bytes, some, found));
        for (unsigned i = 0; i < some; i++)
            counts[i & 3][found[i]]++;
        done += some;
        if (done == count || done % ((uint64_t)1 << 30) == 0) {
            for (unsigned e = 0; e < 256; e++)
                exponents[e] += (int64_t)counts[0][e] + counts[1][e] + counts[2][e] + counts[3][e];
            memset(counts, 0, sizeof counts);
        }
    }
}

static int ascending(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return (a > b) - (a < b);
}

/* List what occurs, and leave the counts zero. */
static void collect(struct df11_encoder *encoder)
{
    unsigned n = 0;

    memset(encoder->exponents, 0, sizeof encoder->exponents);
    for (unsigned first = 0; first < SYMBOLS; first += 16) {
        uint32_t any = 0;
        for (unsigned i = first; i < first + 16; i++)
            any |= encoder->counts.pairs[0][i] | encoder->counts.pairs[1][i];
        for (unsigned symbol = first; any && symbol < first + 16; symbol++) {
            uint32_t count = encoder->counts.pairs[0][symbol] + encoder->counts.pairs[1][symbol];
            encoder->counts.pairs[0][symbol] = encoder->counts.pairs[1][symbol] = 0;
            if (!count)
                continue;
            encoder->count_of[symbol] = count;
            encoder->exponents[symbol & 255] += count;
            encoder->exponents[symbol >> 8] += count;
            encoder->by_count[n] = (uint64_t)(UINT32_MAX - count) << 16 | symbol;
            encoder->used[n++] = (uint16_t)symbol;
        }
    }
    encoder->counts.weights = 0;
    encoder->used_count = n;
    qsort(encoder->by_count, n, sizeof *encoder->by_count, ascending);
}

static unsigned symbol_by_count(const struct df11_encoder *encoder, unsigned i)
{
    return (unsigned)(encoder->by_count[i] & 0xFFFF);
}

/* Choosing the code. */

/* Optimal code lengths of at most 12 bits for m >= 2 counts, ascending: package-merge (Larmore and Hirschberg, 1990).
 * The code is complete. */
static void package_merge(struct df11_encoder *encoder, unsigned m)
{
    const int64_t *leaves = encoder->leaves;
    int64_t *packages = encoder->packages, *merged = encoder->merged;
    unsigned package_count = 0;

    for (unsigned level = 0; level < CODE_LIMIT; level++) {
        unsigned leaf = 0, package = 0, total = m + package_count;
        for (unsigned k = 0; k < total; k++) {
            int is_leaf = package >= package_count || (leaf < m && leaves[leaf] <= packages[package]);
            merged[k] = is_leaf ? leaves[leaf++] : packages[package++];
            encoder->is_leaf[level][k] = (uint8_t)is_leaf;
        }
        package_count = total / 2;
        for (unsigned k = 0; k < package_count; k++)
            packages[k] = merged[2 * k] + merged[2 * k + 1];
    }
    memset(encoder->leaf_lengths, 0, m);
    unsigned need = 2 * m - 2;
    for (int level = CODE_LIMIT - 1; level >= 0; level--) {
        unsigned taken = 0;
        for (unsigned k = 0; k < need; k++)
            taken += encoder->is_leaf[level][k];
        for (unsigned k = 0; k < taken; k++)
            encoder->leaf_lengths[k]++;
        need = 2 * (need - taken);
    }
}

/* Find the symbols with the shortest codes (on a tie, the smaller symbol) by first and by second exponent; returns the
 * shortest of all. */
static unsigned find_shortest(struct df11_encoder *encoder, const uint8_t *lengths)
{
    int best = -1;

    for (unsigned e = 0; e < 256; e++)
        encoder->by_first[e] = encoder->by_second[e] = -1;
    for (unsigned i = 0; i < encoder->used_count; i++) {
        int symbol = encoder->used[i];
        if (!lengths[symbol])
            continue;
        int32_t *first = &encoder->by_first[symbol & 255], *second = &encoder->by_second[symbol >> 8];
        if (*first < 0 || lengths[symbol] < lengths[*first])
            *first = symbol;
        if (*second < 0 || lengths[symbol] < lengths[*second])
            *second = symbol;
        if (best < 0 || lengths[symbol] < lengths[best])
            best = symbol;
    }
    return (unsigned)best;
}

/* The symbol with a code that stands in for one without, and which weights are then exceptions. */
static unsigned stand_in(const struct df11_encoder *encoder, const uint8_t *lengths, unsigned symbol, unsigned best,
                         uint32_t *flags)
{
    int same_first = encoder->by_first[symbol & 255], same_second = encoder->by_second[symbol >> 8];

    if (same_first >= 0 && (same_second < 0 || lengths[same_first] <= lengths[same_second])) {
        *flags = SECOND_IS_EXCEPTION;
        return (unsigned)same_first;
    }
    if (same_second >= 0) {
        *flags = FIRST_IS_EXCEPTION;
        return (unsigned)same_second;
    }
    *flags = FIRST_IS_EXCEPTION | SECOND_IS_EXCEPTION;
    return best;
}

/* Assign alphabet places to the exponents of all pairs that have a code; returns their number. */
static unsigned make_alphabet(struct df11_encoder *encoder, const uint8_t *lengths)
{
    unsigned size = 0;

    for (unsigned e = 0; e < 256; e++)
        encoder->place[e] = -1;
    for (unsigned i = 0; i < encoder->used_count; i++)
        if (lengths[encoder->used[i]])
            encoder->place[encoder->used[i] & 255] = encoder->place[encoder->used[i] >> 8] = 0;
    for (unsigned e = 0; e < 256; e++)
        if (encoder->place[e] == 0)
            encoder->place[e] = (int32_t)size++;
    return size;
}

/* Code the `kept` most frequent pairs, and the others as exceptions; returns the bits of codes and exceptions, and of
 * the table. */
static int64_t try_code(struct df11_encoder *encoder, unsigned kept, int64_t *table_bits)
{
    uint8_t *lengths = encoder->lengths;
    int64_t bits = 0;

    for (unsigned i = 0; i < kept; i++)
        encoder->leaves[i] = encoder->count_of[symbol_by_count(encoder, kept - 1 - i)];
    if (kept > 1)
        package_merge(encoder, kept);
    else
        encoder->leaf_lengths[0] = 1;
    for (unsigned i = 0; i < encoder->used_count; i++)
        lengths[encoder->used[i]] = 0;
    for (unsigned i = 0; i < kept; i++) {
        lengths[symbol_by_count(encoder, kept - 1 - i)] = encoder->leaf_lengths[i];
        bits += encoder->leaves[i] * encoder->leaf_lengths[i];
    }
    int64_t size = make_alphabet(encoder, lengths);
    *table_bits = 8 * size + 4 * size * size;
    unsigned best = find_shortest(encoder, lengths);
    for (unsigned i = kept; i < encoder->used_count; i++) {
        uint32_t flags;
        unsigned symbol = symbol_by_count(encoder, i), other = stand_in(encoder, lengths, symbol, best, &flags);
        unsigned weights = flags == (FIRST_IS_EXCEPTION | SECOND_IS_EXCEPTION) ? 2 : 1;
        bits += (int64_t)encoder->count_of[symbol] * (lengths[other] + weights * EXCEPTION_BITS);
    }
    return bits;
}

/* Write the code table section: the alphabet, and the grid of lengths. Returns its size in bytes. */
static unsigned write_section(struct df11_encoder *encoder, unsigned alphabet_size)
{
    const uint8_t *lengths = encoder->best_lengths;
    unsigned size = alphabet_size + (alphabet_size * alphabet_size + 1) / 2;
    uint8_t *grid = encoder->section + alphabet_size;

    for (unsigned e = 0; e < 256; e++)
        if (encoder->place[e] >= 0)
            encoder->section[encoder->place[e]] = (uint8_t)e;
    memset(grid, 0, size - alphabet_size);
    for (unsigned i = 0; i < encoder->used_count; i++) {
        unsigned symbol = encoder->used[i];
        if (lengths[symbol]) {
            unsigned cell =
                (unsigned)encoder->place[symbol >> 8] * alphabet_size + (unsigned)encoder->place[symbol & 255];
            grid[cell >> 1] |= (uint8_t)(lengths[symbol] << (cell & 1) * 4);
        }
    }
    return size;
}

/* The encoding table: canonical codes, first bit lowest; pairs without a code get that of their stand-in. */
static void write_table(struct df11_encoder *encoder, unsigned best)
{
    const uint8_t *lengths = encoder->best_lengths;
    unsigned counts[CODE_LIMIT + 1] = {0}, next_code[CODE_LIMIT + 1];

    for (unsigned i = 0; i < encoder->used_count; i++)
        counts[lengths[encoder->used[i]]]++;
    counts[0] = 0;
    number_codes(counts, next_code);
    for (unsigned i = 0; i < encoder->used_count; i++) {
        unsigned symbol = encoder->used[i], length = lengths[symbol];
        if (length)
            encoder->table[symbol] = reversed(next_code[length]++, length) << 8 | length;
    }
    for (unsigned i = 0; i < encoder->used_count; i++) {
        uint32_t flags;
        unsigned symbol = encoder->used[i];
        if (!lengths[symbol]) {
            unsigned other = stand_in(encoder, lengths, symbol, best, &flags);
            encoder->table[symbol] = encoder->table[other] | flags;
        }
    }
}

static int occurs(const struct df11_encoder *encoder, unsigned symbol)
{
    for (unsigned i = 0; i < encoder->used_count; i++)
        if (encoder->used[i] == symbol)
            return 1;
    return 0;
}

/* Choose which pairs of the weights (at least two) get a code, and its length; make the code table section and the
 * encoding table (SPEC.md, section 12). The pairs are counted first if they have not been. */
void df11_build_code(struct df11_encoder *encoder, enum df11_kind kind, const void *weights, uint64_t count,
                     struct df11_code *code)
{
    uint64_t pairs = count / 2;
    unsigned previous = 0;
    int64_t best_total = 0;

    if (!encoder->counts.weights)
        df11_count_pairs(&encoder->counts, kind, weights, count);
    collect(encoder);
    /* A pair rarer than about 2^-16 costs less as an exception than as a code of 12 bits, which takes 2^-12 of the code
     * space from all others. Try a few limits around that. */
    for (unsigned shift = 14; shift < 18; shift++) {
        unsigned kept = 0;
        while (kept < encoder->used_count && kept < TABLE_SIZE
               && (uint64_t)encoder->count_of[symbol_by_count(encoder, kept)] << shift >= pairs)
            kept++;
        kept = kept ? kept : 1;
        if (kept == previous)
            continue;
        int64_t table_bits, bits = try_code(encoder, kept, &table_bits);
        if (!previous || bits + table_bits < best_total) {
            code->bits = bits;
            best_total = bits + table_bits;
            for (unsigned i = 0; i < encoder->used_count; i++)
                encoder->best_lengths[encoder->used[i]] = encoder->lengths[encoder->used[i]];
        }
        previous = kept;
    }
    code->filler = find_shortest(encoder, encoder->best_lengths);
    code->alphabet_size = make_alphabet(encoder, encoder->best_lengths);
    code->section_size = write_section(encoder, code->alphabet_size);
    write_table(encoder, code->filler);
    if (count & 1) {
        unsigned exponent = exponent_of(kind, load_weight(kind, weights, count - 1));
        unsigned symbol = (code->filler & 0xFF00) | exponent;
        encoder->exponents[exponent]++;
        if (!occurs(encoder, symbol)) {
            /* Only the first weight exists: any partner will do, and only the first can be an exception. */
            int same_first = encoder->by_first[exponent];
            encoder->table[symbol] =
                same_first >= 0 ? encoder->table[same_first] : encoder->table[code->filler] | FIRST_IS_EXCEPTION;
        }
    }
}

/* Writing tiles. */

/* The bits of all lanes so far; whole bytes have been written. */
struct bits {
    uint8_t *at;
    uint64_t pending;
    unsigned count; /* of pending bits, below 8 */
};

ALWAYS_INLINE void append(struct bits *stream, uint64_t bits, unsigned count)
{
    stream->pending |= bits << stream->count;
    store_u64(stream->at, stream->pending);
    stream->count += count;
    stream->at += stream->count >> 3;
    stream->pending >>= stream->count & 0x78;
    stream->count &= 7;
}

/* The codes of four consecutive pairs. Lengths are the low six bits of entries and, as they stay below 64, of sums of
 * entries; flags lie above all codes in both. */
ALWAYS_INLINE uint64_t join_four(const uint32_t *table, const uint16_t *symbols, unsigned *length, int *any_exception)
{
    uint32_t a = table[symbols[0]], b = table[symbols[1]], c = table[symbols[2]], d = table[symbols[3]];
    uint32_t first_two = a + b, all = first_two + c + d;

    *any_exception = all > CODE_AND_LENGTH;
    if (UNLIKELY(*any_exception)) {
        a &= CODE_AND_LENGTH;
        b &= CODE_AND_LENGTH;
        c &= CODE_AND_LENGTH;
        d &= CODE_AND_LENGTH;
    }
    *length = all & 63;
    uint64_t low = a >> 8 | (uint64_t)(b >> 8) << (a & 63), high = c >> 8 | (uint64_t)(d >> 8) << (c & 63);
    return low | high << (first_two & 63);
}

/* Append the codes of all lanes; note the bits of each, and the groups with an exception in `marked`. Returns the
 * number of marked groups.
 *
 * This is the other loop that decides the speed. Each append waits for the one before it, so that groups of four pairs
 * are first joined by twos: one append for 16 weights if they have at most 56 bits together, which is nearly always the
 * case. */
ALWAYS_INLINE unsigned encode_lanes(const uint32_t *table, const uint16_t *symbols, unsigned chunks, uint8_t *out,
                                    uint64_t *lane_bits, uint16_t *marked)
{
    struct bits stream = {out, 0, 0};
    unsigned groups = 0;
    uint64_t previous = 0;

    for (unsigned lane = 0; lane < LANES; lane++) {
        unsigned at = 4 * lane, end = at + chunks * CHUNK_PAIRS;
        for (; at + CHUNK_PAIRS < end; at += 2 * CHUNK_PAIRS) {
            unsigned one_length, other_length;
            int one_marked, other_marked;
            uint64_t one = join_four(table, symbols + at, &one_length, &one_marked);
            uint64_t other = join_four(table, symbols + at + CHUNK_PAIRS, &other_length, &other_marked);
            if (UNLIKELY(one_marked))
                marked[groups++] = (uint16_t)at;
            if (UNLIKELY(other_marked))
                marked[groups++] = (uint16_t)(at + CHUNK_PAIRS);
            if (UNLIKELY(one_length + other_length > 56)) {
                append(&stream, one, one_length);
                append(&stream, other, other_length);
            } else {
                append(&stream, one | other << one_length, one_length + other_length);
            }
        }
        if (at < end) {
            unsigned length;
            int is_marked;
            uint64_t codes = join_four(table, symbols + at, &length, &is_marked);
            if (is_marked)
                marked[groups++] = (uint16_t)at;
            append(&stream, codes, length);
        }
        uint64_t now = (uint64_t)(stream.at - out) * 8 + stream.count;
        lane_bits[lane] = now - previous;
        previous = now;
    }
    return groups;
}

COMPILE_TWICE(unsigned, encode_lanes,
              (const uint32_t *table, const uint16_t *symbols, unsigned chunks, uint8_t *out, uint64_t *lane_bits,
               uint16_t *marked),
              (table, symbols, chunks, out, lane_bits, marked))

/* Split a tile: its planes go to `planes`, its exponents to the encoder's symbols. Weights that do not exist get those
 * of the filler. */
static void split_tile(struct df11_encoder *encoder, const struct df11_segment *layout, const uint8_t *weights,
                       unsigned count, unsigned filler, uint8_t *const *planes)
{
    uint8_t *exponents = (uint8_t *)encoder->symbols;

    CHOOSE(split, (layout->kind, weights, count, exponents, planes, layout->left_out));
    for (unsigned i = count; i < TILE_WEIGHTS; i++)
        exponents[i] = (uint8_t)(filler >> 8 * (i & 1));
}

/* List the exceptions of the marked groups of a tile, from `at` on; returns the byte after them, or null if that
 * exceeds `end`. */
static uint8_t *list_exceptions(const struct df11_encoder *encoder, unsigned groups, enum df11_kind kind,
                                const uint8_t *weights, unsigned count, uint8_t *at, const uint8_t *end)
{
    for (unsigned group = 0; group < groups; group++)
        for (unsigned i = 0; i < 8; i++) {
            unsigned pair = encoder->marked[group] + i / 2, position = 2 * pair + i % 2;
            uint32_t flag = i % 2 ? SECOND_IS_EXCEPTION : FIRST_IS_EXCEPTION;
            if (!(encoder->table[encoder->symbols[pair]] & flag) || position >= count)
                continue;
            if (end - at < 4)
                return 0;
            store_u16(at, position);
            uint32_t weight = load_weight(kind, weights, position);
            store_u16(at + 2, kind == F32 ? weight >> 16 : weight);
            at += 4;
        }
    return at;
}

/* Store the lane lengths of a tile. Returns the shortest, or -1 if the others exceed it by more than one byte can
 * say. */
static int store_lane_lengths(const uint64_t *lane_bits, unsigned lane_bytes, uint8_t *out)
{
    uint64_t shortest = lane_bits[0], longest = lane_bits[0];

    for (unsigned lane = 1; lane < LANES; lane++) {
        shortest = lane_bits[lane] < shortest ? lane_bits[lane] : shortest;
        longest = lane_bits[lane] > longest ? lane_bits[lane] : longest;
    }
    if (lane_bytes == 1 && longest - shortest > 255)
        return -1;
    for (unsigned lane = 0; lane < LANES; lane++) {
        unsigned excess = (unsigned)(lane_bits[lane] - shortest);
        if (lane_bytes == 1)
            out[lane] = (uint8_t)excess;
        else
            store_u16(out + 2 * lane, excess);
    }
    return (int)shortest;
}

/* Encode all tiles of a segment into `out`, from the tile descriptors on. `layout`: elements, lane_bytes and offsets of
 * the segment to make. `end`: the size that it must stay below; `out` has ENCODE_SLACK bytes more. Returns the size of
 * the segment, LANE_OVERFLOW if its lanes differ by more than lane_bytes can say, or NOT_SMALLER if it reaches
 * `end`. */
int64_t df11_encode_tiles(struct df11_encoder *encoder, const void *weights, const struct df11_segment *layout,
                          unsigned filler, uint8_t *out, uint64_t end, uint64_t *exceptions)
{
    uint64_t at = layout->stream_offset, lane_bits[LANES], offsets[MOST_PLANES + 1];
    enum df11_kind kind = layout->kind;
    const uint8_t *from = weights;

    place_planes(layout, offsets);

    *exceptions = 0;
    for (uint64_t first = 0, tile = 0; first < layout->elements; first += TILE_WEIGHTS, tile++) {
        unsigned count = layout->elements - first < TILE_WEIGHTS ? (unsigned)(layout->elements - first) : TILE_WEIGHTS;
        unsigned chunks = (count + CHUNK_WEIGHTS - 1) / CHUNK_WEIGHTS;
        uint8_t *planes[MOST_PLANES];
        for (unsigned plane = 0; plane < MOST_PLANES; plane++)
            planes[plane] = out + offsets[plane] + tile * TILE_CHUNKS * chunk_plane(kind, plane);
        split_tile(encoder, layout, from, count, filler, planes);
        unsigned groups =
            CHOOSE(encode_lanes, (encoder->table, encoder->symbols, chunks, out + at, lane_bits, encoder->marked));
        int shortest = store_lane_lengths(lane_bits, layout->lane_bytes,
                                          out + layout->lanes_offset + tile * LANES * layout->lane_bytes);
        if (shortest < 0)
            return LANE_OVERFLOW;
        uint64_t bits = 0;
        for (unsigned lane = 0; lane < LANES; lane++)
            bits += lane_bits[lane];
        uint64_t codes_end = at + (bits + 7) / 8, list = at + (bits + 31) / 32 * 4;
        memset(out + codes_end, 0, list - codes_end);
        const uint8_t *list_end =
            list > end ? 0 : list_exceptions(encoder, groups, kind, from, count, out + list, out + end);
        if (!list_end)
            return NOT_SMALLER;
        uint64_t tile_exceptions = (uint64_t)(list_end - (out + list)) / 4, used = (uint64_t)(list_end - out);
        store_u64(out + layout->tiles_offset + 8 * tile,
                  (at - layout->stream_offset) / STREAM_UNIT | (uint64_t)shortest << 32 | tile_exceptions << 48);
        *exceptions += tile_exceptions;
        at = (used + STREAM_UNIT - 1) / STREAM_UNIT * STREAM_UNIT;
        memset(out + used, 0, at - used);
        if (at + STREAM_END > end)
            return NOT_SMALLER;
        from += TILE_WEIGHTS * df11_splits[kind].bytes;
    }
    memset(out + at, 0, STREAM_END);
    return (int64_t)(at + STREAM_END);
}

/* Casts (SPEC.md, section 3). */

ALWAYS_INLINE uint32_t cast(const uint32_t *source, uint64_t count, uint16_t *out)
{
    uint32_t lost = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint32_t u = source[i], rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
        uint32_t value = (u & 0x7FFFFFFF) > 0x7F800000 ? 0xFFFF : rounded;
        out[i] = (uint16_t)value;
        lost |= u ^ value << 16;
    }
    return lost;
}

COMPILE_TWICE(uint32_t, cast, (const uint32_t *source, uint64_t count, uint16_t *out), (source, count, out))

/* Round F32 bits to BF16 bits; returns 1 if every value is exact, else 0. */
int df11_cast_f32(const uint32_t *source, uint64_t count, uint16_t *out)
{
    return CHOOSE(cast, (source, count, out)) == 0;
}

ALWAYS_INLINE void narrow(const uint32_t *source, uint64_t count, uint16_t *out)
{
    for (uint64_t i = 0; i < count; i++)
        out[i] = (uint16_t)(source[i] >> 16);
}

ALWAYS_INLINE uint32_t any_bits(const uint8_t *source, uint64_t count)
{
    uint32_t bits = 0;
    for (uint64_t i = 0; i < count; i++)
        bits |= load_weight(F32, source, i);
    return bits;
}

COMPILE_TWICE(void, narrow, (const uint32_t *source, uint64_t count, uint16_t *out), (source, count, out))
COMPILE_TWICE(uint32_t, any_bits, (const uint8_t *source, uint64_t count), (source, count))

/* The upper halves of F32 bits: BF16 bits, if all lower halves are zero. */
void df11_narrow_f32(const uint32_t *source, uint64_t count, uint16_t *out)
{
    CHOOSE(narrow, (source, count, out));
}

/* Which bits are set in any of the weights; ends early when one of those in the last plane is, as then no plane can be
 * left out. `source` need not be aligned. */
uint32_t df11_any_bits(enum df11_kind kind, const uint8_t *source, uint64_t count)
{
    unsigned bytes = df11_splits[kind].bytes;
    uint32_t bits = 0, last = (1u << df11_splits[kind].bits[df11_splits[kind].planes - 1]) - 1;
    uint64_t words = count * bytes / 4;

    for (uint64_t done = 0; done < words && !(bits & last); done += 1024) {
        uint32_t some = CHOOSE(any_bits, (source + 4 * done, words - done < 1024 ? words - done : 1024));
        for (unsigned i = 0; i < 32; i += 8 * bytes)
            bits |= bytes == 4 ? some : some >> i & ((1u << 8 * bytes) - 1);
    }
    for (uint64_t i = words * 4 / bytes; i < count; i++)
        bits |= load_weight(kind, source, i);
    return bits;
}
