/* The kernels for DFloat11's layout: dfloat11/kernels.c. docs/dfloat11.md describes the layout. */
#ifndef DF11_DFLOAT11_H
#define DF11_DFLOAT11_H

#include <stdint.h>

enum {
    DFLOAT11_ROW = 256,        /* entries of a table */
    DFLOAT11_TABLES = 17,      /* the first, and those that 255 down to 240 point to */
    DFLOAT11_EXPONENTS = 240,  /* entries below are exponents */
    DFLOAT11_DEPTH = 4,        /* tables that a code passes through */
    DFLOAT11_THREAD_BITS = 64, /* of the code, that a thread decodes */
    DFLOAT11_MAX_THREADS = 1024,
    DFLOAT11_SLACK = 16, /* zero bytes that must follow the codes, as loads and damaged codes pass their end */
    DFLOAT11_WINDOW = 12 /* bits that are looked up together */
};

enum df11_dfloat11_status {
    DFLOAT11_OK,
    DFLOAT11_BAD_TABLE,    /* an entry points to no table */
    DFLOAT11_BAD_LENGTH,   /* a code of more than 32 bits, or for an exponent from 240 on */
    DFLOAT11_BAD_CODE,     /* bits that the tables give no code for */
    DFLOAT11_BAD_GAP,      /* a thread's first code starts elsewhere */
    DFLOAT11_BAD_POSITION, /* a block holds another number of weights */
    DFLOAT11_BAD_END       /* the codes end before or behind the end of their bytes */
};

/* What the tables say, in a form to decode with. */
struct df11_dfloat11_table {
    uint64_t steps[1 << DFLOAT11_WINDOW]; /* of up to four codes: the exponents; how many, in bits 32 to 39; where each ends, in
                                           * four bits, from bit 40 on; all their bits, in bits 56 to 63 */
    uint8_t rows[DFLOAT11_TABLES][DFLOAT11_ROW];
    uint8_t usable[DFLOAT11_TABLES][DFLOAT11_ROW]; /* whether all bits that a code leaves open lead to its exponent */
    uint8_t lengths[DFLOAT11_ROW];
};

/* Consecutive blocks of a unit. */
struct df11_dfloat11_blocks {
    const struct df11_dfloat11_table *table;
    const uint8_t *codes;         /* from the first block on, with DFLOAT11_SLACK bytes behind its end */
    uint64_t bits;                /* of the codes from here to the end of the unit */
    const uint8_t *gaps;          /* of the threads of these blocks, and, unless it is the last, of the next block */
    const uint32_t *positions;    /* of the blocks, and where the last one ends */
    uint64_t blocks;
    unsigned threads;             /* of a block */
    int last;                     /* whether the unit ends here */
    const uint8_t *sign_mantissa; /* from the first block on */
};

enum df11_dfloat11_status df11_dfloat11_build(const uint8_t *luts, unsigned rows, struct df11_dfloat11_table *table);
enum df11_dfloat11_status df11_dfloat11_decode(const struct df11_dfloat11_blocks *blocks, uint16_t *out,
                                               uint64_t *failed);

/* A code on its way into words of 64 bits, each of which is a thread's. */
struct df11_dfloat11_stream {
    uint64_t word;    /* the bits of the word that is not yet complete, from its highest bit on */
    uint64_t fill;    /* how many */
    uint64_t words;   /* complete ones */
    uint64_t weights; /* that have been coded */
};

int df11_dfloat11_encode(const uint16_t *weights, uint64_t count, const uint8_t *lengths, const uint32_t *codes,
                         struct df11_dfloat11_stream *stream, unsigned threads, uint8_t *out, uint8_t *gaps,
                         uint32_t *positions);
void df11_dfloat11_split(const uint16_t *weights, uint64_t count, uint8_t *out);

#endif
