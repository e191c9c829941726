/* SHA-256 (FIPS 180-4) with x86's SHA instructions. These leave most of a core idle, as each waits for the one before
 * it, so that the pairs of the same weights are counted meanwhile at no cost (SPEC.md, section 12). On other CPUs
 * hashlib is used, and counting is a separate pass. */

#include "../formats/kernels.h"

#ifdef HAVE_AVX2
#include <immintrin.h>

enum { BLOCK = 64, BLOCK_WEIGHTS = BLOCK / 2 };

static const uint32_t START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

static const uint32_t ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#define SHA __attribute__((target("sha,sse4.1,ssse3")))

/* Four rounds, number i of sixteen, and the schedule words that follow from these rounds' words. */
#define FOUR_ROUNDS(i)                                                                                                 \
    do {                                                                                                               \
        __m128i *due = &words[(i) % 4], next = words[((i) + 1) % 4], last = words[((i) + 3) % 4];                      \
        __m128i added = _mm_add_epi32(*due, _mm_loadu_si128((const __m128i *)(ROUND + 4 * (i))));                      \
        cdgh = _mm_sha256rnds2_epu32(cdgh, abef, added);                                                               \
        abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(added, 0x0E));                                      \
        if ((i) < 12) {                                                                                                \
            __m128i sum =                                                                                              \
                _mm_add_epi32(_mm_sha256msg1_epu32(*due, next), _mm_alignr_epi8(last, words[((i) + 2) % 4], 4));       \
            *due = _mm_sha256msg2_epu32(sum, last);                                                                    \
        }                                                                                                              \
    } while (0)

/* Two pairs out of four weights. */
ALWAYS_INLINE void count_two(struct df11_counts *counts, const uint8_t *weights)
{
    uint64_t exponents = load_u64(weights) >> 7 & 0x00FF00FF00FF00FF, symbols = exponents | exponents >> 8;
    counts->pairs[0][symbols & 0xFFFF]++;
    counts->pairs[1][symbols >> 32 & 0xFFFF]++;
}

/* Hash whole blocks and, if there are counts, count 16 pairs of `weights` with each. */
SHA ALWAYS_INLINE void hash_blocks(uint32_t *state, const uint8_t *data, uint64_t blocks, struct df11_counts *counts,
                                   const uint8_t *weights)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    /* The instructions expect the words a, b, e, f of a state together, and c, d, g, h. */
    __m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);
    __m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B);
    __m128i abef = _mm_alignr_epi8(low, high, 8), cdgh = _mm_blend_epi16(high, low, 0xF0), words[4];

    for (; blocks; blocks--, data += BLOCK) {
        __m128i abef_before = abef, cdgh_before = cdgh;
        for (unsigned i = 0; i < 4; i++)
            words[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * i)), swap);
        if (counts) {
            for (unsigned i = 0; i < BLOCK; i += 8)
                count_two(counts, weights + i);
            weights += BLOCK;
        }
        FOUR_ROUNDS(0);
        FOUR_ROUNDS(1);
        FOUR_ROUNDS(2);
        FOUR_ROUNDS(3);
        FOUR_ROUNDS(4);
        FOUR_ROUNDS(5);
        FOUR_ROUNDS(6);
        FOUR_ROUNDS(7);
        FOUR_ROUNDS(8);
        FOUR_ROUNDS(9);
        FOUR_ROUNDS(10);
        FOUR_ROUNDS(11);
        FOUR_ROUNDS(12);
        FOUR_ROUNDS(13);
        FOUR_ROUNDS(14);
        FOUR_ROUNDS(15);
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    low = _mm_shuffle_epi32(abef, 0x1B), high = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(low, high, 0xF0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(high, low, 8));
}

SHA static void hash_only(uint32_t *state, const uint8_t *data, uint64_t blocks)
{
    hash_blocks(state, data, blocks, NULL, NULL);
}

SHA static void hash_and_count(uint32_t *state, const uint8_t *data, uint64_t blocks, struct df11_counts *counts,
                               const uint8_t *weights)
{
    hash_blocks(state, data, blocks, counts, weights);
}

void df11_sha256_start(struct df11_sha256 *hash)
{
    memcpy(hash->state, START, sizeof START);
    hash->size = 0;
}

/* Append `size` bytes. With counts, also count them as pairs of weights. */
void df11_sha256_update(struct df11_sha256 *hash, const uint8_t *data, uint64_t size, struct df11_counts *counts)
{
    unsigned pending = hash->size % BLOCK;
    const uint8_t *weights = data;
    uint64_t count = size / 2, left = size;

    hash->size += size;
    if (pending) {
        unsigned taken = left < BLOCK - pending ? (unsigned)left : BLOCK - pending;
        memcpy(hash->pending + pending, data, taken);
        if (pending + taken == BLOCK)
            hash_only(hash->state, hash->pending, 1);
        data += taken, left -= taken;
    }
    /* The blocks to count start with the weights, wherever those to hash start. */
    if (counts)
        hash_and_count(hash->state, data, left / BLOCK, counts, weights);
    else
        hash_only(hash->state, data, left / BLOCK);
    if (left % BLOCK)
        memcpy(hash->pending, data + left / BLOCK * BLOCK, left % BLOCK);
    if (counts) {
        uint64_t counted = left / BLOCK * BLOCK_WEIGHTS;
        counts->weights += counted;
        df11_count_pairs(counts, BF16, weights + 2 * counted, count - counted);
    }
}

/* The digest of what has been appended: 32 bytes. More may be appended. */
void df11_sha256_digest(const struct df11_sha256 *hash, uint8_t *digest)
{
    uint32_t state[8];
    uint8_t end[2 * BLOCK] = {0};
    unsigned pending = hash->size % BLOCK, blocks = pending < BLOCK - 8 ? 1 : 2;

    memcpy(state, hash->state, sizeof state);
    memcpy(end, hash->pending, pending);
    end[pending] = 0x80;
    for (unsigned i = 0; i < 8; i++)
        end[blocks * BLOCK - 1 - i] = (uint8_t)(hash->size * 8 >> 8 * i);
    hash_only(state, end, blocks);
    for (unsigned i = 0; i < 32; i++)
        digest[i] = (uint8_t)(state[i / 4] >> (24 - i % 4 * 8));
}
#endif
