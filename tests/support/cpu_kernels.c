/* A program around the CPU kernels, for tests without Python: under sanitizers, and for other kinds of CPU under an
 * emulator.
 *
 * Commands come on standard input and results go to standard output, in little-endian u64s and bytes; cpu_kernels.py is
 * the other side. Every buffer ends at a page that may not be touched, so that a byte too far ends the program on any
 * CPU. The argument "portable" leaves the CPU's own instructions alone.
 */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../formats/kernels.h"

static void fail(const char *what)
{
    perror(what);
    exit(3);
}

/* Memory that ends at a page of no access, filled with a pattern. */
static void *guarded(uint64_t size)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), room = (size + page - 1) / page * page;
    uint8_t *start = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + room, page, PROT_NONE) != 0)
        fail("mmap");
    memset(start, 0xA5, room);
    return start + room - size;
}

static void discard(void *memory, uint64_t size)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), room = (size + page - 1) / page * page;
    munmap((uint8_t *)memory + size - room, room + page);
}

static uint64_t number(void)
{
    uint64_t value;
    if (fread(&value, sizeof value, 1, stdin) != 1)
        fail("a number is missing");
    return value;
}

static void *bytes(uint64_t size)
{
    void *memory = guarded(size);
    if (size && fread(memory, size, 1, stdin) != 1)
        fail("bytes are missing");
    return memory;
}

static void answer(uint64_t value)
{
    fwrite(&value, sizeof value, 1, stdout);
}

/* kind, planes left out, weights -> alphabet size, bits, filler, section; size and exceptions for lanes of one and of two bytes, and after
 * each the bytes from the tile descriptors on, if there are any; exponents. */
static void encode(struct df11_encoder *encoder)
{
    enum df11_kind kind = (enum df11_kind)number();
    uint64_t left_out = number(), count = number(), width = df11_splits[kind].bytes;
    uint64_t raw = (32 + width * count + 15) / 16 * 16, end = raw - 16, offsets[MOST_PLANES + 1];
    void *weights = bytes(width * count);
    struct df11_code code;

    df11_build_code(encoder, kind, weights, count, &code);
    answer(code.alphabet_size), answer((uint64_t)code.bits), answer(code.filler), answer(code.section_size);
    fwrite(df11_code_section(encoder), 1, code.section_size, stdout);
    for (uint32_t lane_bytes = 1; lane_bytes <= 2; lane_bytes++) {
        uint64_t tiles = (count + TILE_WEIGHTS - 1) / TILE_WEIGHTS, exceptions = 0;
        struct df11_segment layout = {.kind = kind, .left_out = (uint32_t)left_out};
        layout.elements = (uint32_t)count, layout.lane_bytes = lane_bytes;
        layout.tiles_offset = (32 + code.section_size + 15) / 16 * 16;
        layout.lanes_offset = (layout.tiles_offset + 8 * tiles + 15) / 16 * 16;
        layout.sign_mantissa_offset = layout.lanes_offset + LANES * lane_bytes * tiles;
        place_planes(&layout, offsets);
        layout.stream_offset = offsets[MOST_PLANES];
        int64_t size = NOT_SMALLER;
        if (layout.stream_offset + STREAM_END <= end) {
            uint8_t *out = guarded(end + ENCODE_SLACK);
            memset(out, 0, end);
            size = df11_encode_tiles(encoder, weights, &layout, code.filler, out, end, &exceptions);
            answer((uint64_t)size), answer(exceptions);
            if (size > 0)
                fwrite(out + layout.tiles_offset, 1, (uint64_t)size - layout.tiles_offset, stdout);
            discard(out, end + ENCODE_SLACK);
        } else {
            answer((uint64_t)size), answer(0);
        }
    }
    fwrite(df11_exponents(encoder), sizeof(int64_t), 256, stdout);
    discard(weights, width * count);
}

/* A segment's fields and bytes -> the status of its table; if that is OK, status and tile of decoding, the weights,
 * status and tile of comparing with them, and again with one of them changed. */
static void decode(void)
{
    uint64_t size = number(), alphabet_size = number();
    struct df11_segment segment = {.size = size};
    segment.kind = (enum df11_kind)number(), segment.left_out = (uint32_t)number();
    segment.elements = (uint32_t)number(), segment.lane_bytes = (uint32_t)number();
    segment.tiles_offset = number(), segment.lanes_offset = number();
    segment.sign_mantissa_offset = number(), segment.stream_offset = number();
    uint64_t first = number(), last = number(), section_size = alphabet_size + (alphabet_size * alphabet_size + 1) / 2,
             tile;
    uint8_t *stored = bytes(size), *section = guarded(section_size);
    uint32_t *table = guarded(TABLE_SIZE * sizeof *table);
    memset(table, 0, TABLE_SIZE * sizeof *table);

    memcpy(section, stored + 32, section_size);
    segment.bytes = stored, segment.table = table;
    enum df11_status status = df11_build_decode_table(section, (unsigned)alphabet_size, segment.kind, table);
    answer(status);
    if (status == OK) {
        uint64_t end = last * TILE_WEIGHTS < segment.elements ? last * TILE_WEIGHTS : segment.elements,
                 count = end - first * TILE_WEIGHTS;
        uint64_t width = df11_splits[segment.kind].bytes;
        uint8_t *weights = guarded(width * count);
        memset(weights, 0, width * count);
        status = df11_decode_tiles(&segment, first, last, weights, &tile);
        answer(status), answer(tile), answer(count);
        fwrite(weights, width, count, stdout);
        status = df11_compare_tiles(&segment, first, last, weights, &tile);
        answer(status), answer(tile);
        weights[count / 2 * width] ^= 1;
        status = df11_compare_tiles(&segment, first, last, weights, &tile);
        answer(status), answer(tile);
        discard(weights, width * count);
    }
    discard(stored, size), discard(section, section_size), discard(table, TABLE_SIZE * sizeof *table);
}

/* F32 values -> whether all are exact, the BF16 values, and the upper halves. */
static void cast(void)
{
    uint64_t count = number();
    uint32_t *source = bytes(4 * count);
    uint16_t *out = guarded(2 * count);
    answer((uint64_t)df11_cast_f32(source, count, out));
    fwrite(out, 2, count, stdout);
    df11_narrow_f32(source, count, out);
    fwrite(out, 2, count, stdout);
    discard(source, 4 * count), discard(out, 2 * count);
}

/* Kind and weights -> how often each exponent occurs, and which bits are set at all. */
static void count(void)
{
    enum df11_kind kind = (enum df11_kind)number();
    uint64_t size = number(), width = df11_splits[kind].bytes;
    uint8_t *weights = bytes(width * size);
    int64_t *exponents = guarded(256 * sizeof *exponents);
    df11_count_exponents(kind, weights, size, exponents);
    fwrite(exponents, sizeof *exponents, 256, stdout);
    answer(df11_any_bits(kind, weights, size));
    discard(weights, width * size), discard(exponents, 256 * sizeof *exponents);
}

#ifdef HAVE_AVX2
/* Bytes before and after the weights of a segment -> SHA-256 of all, and the answer to encoding these weights, counted
 * while they were hashed. */
static void hash(struct df11_encoder *encoder)
{
    uint64_t before = number(), count = number(), after = number();
    uint8_t *first = bytes(before), *weights = bytes(2 * count), *last = bytes(after), digest[32];
    struct df11_sha256 state;
    struct df11_code code;

    df11_sha256_start(&state);
    df11_sha256_update(&state, first, before, NULL);
    df11_sha256_update(&state, weights, 2 * count, df11_encoder_counts(encoder));
    df11_sha256_update(&state, last, after, NULL);
    df11_sha256_digest(&state, digest);
    fwrite(digest, 1, sizeof digest, stdout);
    uint16_t *aligned = guarded(2 * count);
    memcpy(aligned, weights, 2 * count);
    df11_build_code(encoder, BF16, aligned, count, &code);
    answer((uint64_t)code.bits);
    fwrite(df11_code_section(encoder), 1, code.section_size, stdout);
    discard(first, before), discard(weights, 2 * count), discard(last, after), discard(aligned, 2 * count);
}
#endif

int main(int arguments, char **argument)
{
    struct df11_encoder *encoder = calloc(1, df11_encoder_size());
    int command;

    if (arguments < 2 || strcmp(argument[1], "portable") != 0)
        df11_choose_instructions();
    if (!encoder)
        fail("calloc");
    while ((command = getchar()) != EOF)
        switch (command) {
        case 'E': encode(encoder); break;
        case 'D': decode(); break;
        case 'C': cast(); break;
        case 'N': count(); break;
#ifdef HAVE_AVX2
        case 'H': hash(encoder); break;
#endif
        default: return 2;
        }
    free(encoder);
    return 0;
}
