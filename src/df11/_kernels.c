/* The Python module of the CPU kernels: checks arguments, releases the interpreter lock, and calls. Typed functions for
 * the rest of this package are in df11/formats/kernels.py and df11/converter/kernels.py. Only CPython's limited API is
 * used: one build works with every version from 3.11 on. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "../../converter/dfloat11/kernels.h"
#include "../../formats/kernels.h"

/* Buffers. */

/* A contiguous, aligned buffer of at least `count` items of `size` bytes; on failure an exception is set. */
static int get_buffer(PyObject *object, Py_buffer *buffer, const char *name, Py_ssize_t size, Py_ssize_t count,
                      int writable)
{
    if (PyObject_GetBuffer(object, buffer, PyBUF_ND | (writable ? PyBUF_WRITABLE : 0)) < 0)
        return -1;
    if (buffer->itemsize == size && (uintptr_t)buffer->buf % (uintptr_t)size == 0 && buffer->len / size >= count)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s: expected at least %zd aligned items of %zd bytes, found %zd bytes in items of %zd", name, count,
                 size, buffer->len, buffer->itemsize);
    PyBuffer_Release(buffer);
    return -1;
}

/* Several buffers: all or none. */
struct wanted {
    PyObject *object;
    const char *name;
    Py_ssize_t size, count;
    int writable;
};

static int get_buffers(const struct wanted *wanted, Py_buffer *buffers, int count)
{
    for (int i = 0; i < count; i++)
        if (get_buffer(wanted[i].object, &buffers[i], wanted[i].name, wanted[i].size, wanted[i].count,
                       wanted[i].writable)
            < 0) {
            while (i--)
                PyBuffer_Release(&buffers[i]);
            return -1;
        }
    return 0;
}

static void release_buffers(Py_buffer *buffers, int count)
{
    for (int i = 0; i < count; i++)
        PyBuffer_Release(&buffers[i]);
}

static int require(int condition, const char *what)
{
    if (!condition)
        PyErr_Format(PyExc_ValueError, "kernels: %s", what);
    return condition;
}

/* Whether there is such a dtype, with so many planes that can be left out. */
static int check_kind(unsigned kind, unsigned left_out)
{
    return require(kind >= BF16 && kind < KINDS, "kind") && require(left_out < df11_splits[kind].planes, "left_out");
}

/* Decoding. */

static const char TABLE[] = "df11.table";

static void free_table(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, TABLE));
}

/* (section, alphabet size, kind) -> a table that cannot be changed from outside, or the status. */
static PyObject *build_decode_table(PyObject *module, PyObject *arguments)
{
    PyObject *section, *capsule;
    Py_ssize_t size;
    unsigned kind;
    Py_buffer buffer;
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OnI", &section, &size, &kind)
        || !require(size >= 1 && size <= 256, "alphabet size") || !check_kind(kind, 0)
        || get_buffer(section, &buffer, "section", 1, size + (size * size + 1) / 2, 0) < 0)
        return NULL;
    uint32_t *table = calloc(TABLE_SIZE, sizeof *table);
    enum df11_status status = table ? df11_build_decode_table(buffer.buf, (unsigned)size, kind, table) : OK;
    PyBuffer_Release(&buffer);
    if (!table)
        return PyErr_NoMemory();
    if (status != OK) {
        free(table);
        return PyLong_FromLong((long)status);
    }
    if (!(capsule = PyCapsule_New(table, TABLE, free_table)))
        free(table);
    return capsule;
}

/* Whether the sections of a segment, and 16 bytes more, lie inside; `end` is its size, or the size that it must stay
 * below. */
static int check_sections(const struct df11_segment *segment, uint64_t end)
{
    uint64_t tiles = ((uint64_t)segment->elements + TILE_WEIGHTS - 1) / TILE_WEIGHTS;
    uint64_t planes[MOST_PLANES + 1];

    if (!check_kind(segment->kind, segment->left_out))
        return 0;
    place_planes(segment, planes);
    return require(segment->elements >= 1 && segment->elements <= MAX_SEGMENT_WEIGHTS, "elements")
           && require(segment->lane_bytes == 1 || segment->lane_bytes == 2, "lane_bytes")
           && require(end >= STREAM_END && end <= UINT32_MAX && segment->tiles_offset <= end
                          && segment->lanes_offset <= end && segment->sign_mantissa_offset <= end
                          && segment->stream_offset <= end - STREAM_END,
                      "an offset lies outside the segment")
           && require(segment->tiles_offset + 8 * tiles <= end
                          && segment->lanes_offset + LANES * segment->lane_bytes * tiles <= end
                          && planes[MOST_PLANES] <= end,
                      "a section does not fit the segment");
}

/* Decode into the last argument, or compare with it. */
static PyObject *each_tile(PyObject *arguments, int compare)
{
    PyObject *bytes, *capsule, *weights;
    unsigned kind, left_out;
    unsigned long long elements, lane_bytes, tiles, lanes, sign_mantissa, stream, first, last;
    Py_buffer buffers[2];

    if (!PyArg_ParseTuple(arguments, "OOIIKKKKKKKKO", &bytes, &capsule, &kind, &left_out, &elements, &lane_bytes,
                          &tiles, &lanes, &sign_mantissa, &stream, &first, &last, &weights)
        || !check_kind(kind, left_out)
        || !require(elements <= MAX_SEGMENT_WEIGHTS && lane_bytes <= 2, "elements or lane_bytes")
        || !require(first <= last && last <= (elements + TILE_WEIGHTS - 1) / TILE_WEIGHTS, "tiles"))
        return NULL;
    unsigned long long end = last * TILE_WEIGHTS < elements ? last * TILE_WEIGHTS : elements;
    Py_ssize_t count = first < last ? (Py_ssize_t)(end - first * TILE_WEIGHTS) : 0;
    struct wanted wanted[] = {{bytes, "segment", 1, 0, 0},
                              {weights, "weights", df11_splits[kind].bytes, count, !compare}};
    const uint32_t *table = PyCapsule_GetPointer(capsule, TABLE);
    if (!table || get_buffers(wanted, buffers, 2) < 0)
        return NULL;
    struct df11_segment segment = {buffers[0].buf,
                                   (uint64_t)buffers[0].len,
                                   kind,
                                   left_out,
                                   (uint32_t)elements,
                                   (uint32_t)lane_bytes,
                                   tiles,
                                   lanes,
                                   sign_mantissa,
                                   stream,
                                   table};
    enum df11_status status = OK;
    uint64_t tile = 0;
    int valid = check_sections(&segment, segment.size);
    if (valid) {
        Py_BEGIN_ALLOW_THREADS status = compare ? df11_compare_tiles(&segment, first, last, buffers[1].buf, &tile)
                                                : df11_decode_tiles(&segment, first, last, buffers[1].buf, &tile);
        Py_END_ALLOW_THREADS
    }
    release_buffers(buffers, 2);
    return valid ? Py_BuildValue("iK", (int)status, (unsigned long long)tile) : NULL;
}

static PyObject *decode_tiles(PyObject *module, PyObject *arguments)
{
    (void)module;
    return each_tile(arguments, 0);
}

static PyObject *compare_tiles(PyObject *module, PyObject *arguments)
{
    (void)module;
    return each_tile(arguments, 1);
}

/* Encoding. */

static const char ENCODER[] = "df11.encoder";

/* An encoder, and whether a thread is using it: other threads get an error, as the interpreter lock does not keep them
 * out meanwhile. */
struct owned_encoder {
    struct df11_encoder *encoder;
    int busy;
};

static void free_encoder(PyObject *capsule)
{
    struct owned_encoder *owned = PyCapsule_GetPointer(capsule, ENCODER);
    free(owned->encoder);
    free(owned);
}

static PyObject *new_encoder(PyObject *module, PyObject *arguments)
{
    (void)module, (void)arguments;
    struct owned_encoder *owned = calloc(1, sizeof *owned);
    PyObject *capsule = NULL;
    if (owned && (owned->encoder = calloc(1, df11_encoder_size())))
        capsule = PyCapsule_New(owned, ENCODER, free_encoder);
    else
        PyErr_NoMemory();
    if (!capsule && owned) {
        free(owned->encoder);
        free(owned);
    }
    return capsule;
}

/* The encoder of a capsule, until it is released; null, with an exception set, if it is not one or another thread has
 * it. */
static struct owned_encoder *take_encoder(PyObject *capsule)
{
    struct owned_encoder *owned = PyCapsule_GetPointer(capsule, ENCODER);
    if (!owned || !require(!owned->busy, "an encoder serves one thread at a time"))
        return NULL;
    owned->busy = 1;
    return owned;
}

static PyObject *build_code(PyObject *module, PyObject *arguments)
{
    PyObject *capsule, *weights;
    Py_buffer buffer;
    struct df11_code code;
    unsigned kind;
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OOI", &capsule, &weights, &kind) || !check_kind(kind, 0))
        return NULL;
    if (get_buffer(weights, &buffer, "weights", df11_splits[kind].bytes, 2, 0) < 0)
        return NULL;
    struct owned_encoder *owned = take_encoder(capsule);
    uint64_t count = (uint64_t)buffer.len / df11_splits[kind].bytes;
    int valid = owned && require(count <= MAX_SEGMENT_WEIGHTS, "too many weights for a segment");
    if (valid) {
        struct df11_counts *counts = df11_encoder_counts(owned->encoder);
        valid = require(counts->weights == 0 || counts->weights == count, "other weights have been counted");
        if (!valid)
            memset(counts, 0, sizeof *counts);
    }
    if (valid) {
        Py_BEGIN_ALLOW_THREADS df11_build_code(owned->encoder, kind, buffer.buf, count, &code);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&buffer);
    PyObject *result = NULL;
    if (valid)
        result = Py_BuildValue("Iy#LI", code.alphabet_size, (const char *)df11_code_section(owned->encoder),
                               (Py_ssize_t)code.section_size, (long long)code.bits, code.filler);
    if (owned)
        owned->busy = 0;
    return result;
}

static PyObject *exponents(PyObject *module, PyObject *capsule)
{
    (void)module;
    struct owned_encoder *owned = take_encoder(capsule);
    if (!owned)
        return NULL;
    PyObject *result = PyBytes_FromStringAndSize((const char *)df11_exponents(owned->encoder), 256 * sizeof(int64_t));
    owned->busy = 0;
    return result;
}

static PyObject *encode_tiles(PyObject *module, PyObject *arguments)
{
    PyObject *capsule, *weights, *out;
    unsigned kind, left_out;
    unsigned long long filler, lane_bytes, tiles, lanes, sign_mantissa, stream, end;
    Py_buffer buffers[2];
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OOIIKKKKKKKO", &capsule, &weights, &kind, &left_out, &filler, &lane_bytes, &tiles,
                          &lanes, &sign_mantissa, &stream, &end, &out)
        || !check_kind(kind, left_out)
        || !require(filler < SYMBOLS && lane_bytes <= 2 && end <= UINT32_MAX, "filler, lane_bytes or end"))
        return NULL;
    struct wanted wanted[] = {{weights, "weights", df11_splits[kind].bytes, 1, 0},
                              {out, "out", 1, (Py_ssize_t)end + ENCODE_SLACK, 1}};
    if (get_buffers(wanted, buffers, 2) < 0)
        return NULL;
    struct owned_encoder *owned = take_encoder(capsule);
    uint64_t count = (uint64_t)buffers[0].len / df11_splits[kind].bytes, found = 0;
    int64_t size = 0;
    int valid = owned && require(count <= MAX_SEGMENT_WEIGHTS, "too many weights for a segment");
    if (valid) {
        struct df11_segment layout = {NULL,  0,     kind,          left_out, (uint32_t)count, (uint32_t)lane_bytes,
                                      tiles, lanes, sign_mantissa, stream,   NULL};
        valid = check_sections(&layout, end);
        if (valid) {
            Py_BEGIN_ALLOW_THREADS size = df11_encode_tiles(owned->encoder, buffers[0].buf, &layout, (unsigned)filler,
                                                            buffers[1].buf, end, &found);
            Py_END_ALLOW_THREADS
        }
    }
    release_buffers(buffers, 2);
    if (owned)
        owned->busy = 0;
    return valid ? Py_BuildValue("LK", (long long)size, (unsigned long long)found) : NULL;
}

static PyObject *count_exponents(PyObject *module, PyObject *arguments)
{
    PyObject *weights, *out;
    unsigned kind;
    Py_buffer buffers[2];
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OOI", &weights, &out, &kind) || !check_kind(kind, 0))
        return NULL;
    struct wanted wanted[] = {{weights, "weights", df11_splits[kind].bytes, 0, 0}, {out, "counts", 8, 256, 1}};
    if (get_buffers(wanted, buffers, 2) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS df11_count_exponents(
        kind, buffers[0].buf, (uint64_t)buffers[0].len / df11_splits[kind].bytes, buffers[1].buf);
    Py_END_ALLOW_THREADS release_buffers(buffers, 2);
    Py_RETURN_NONE;
}

/* (source, out, round): round F32 bits to BF16 bits, or take their upper halves; returns whether rounding was exact. */
static PyObject *cast_f32(PyObject *module, PyObject *arguments)
{
    PyObject *source, *out;
    Py_buffer buffers[2];
    int rounded, exact = 1;
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OOp", &source, &out, &rounded)
        || get_buffer(source, &buffers[0], "source", 4, 0, 0) < 0)
        return NULL;
    if (get_buffer(out, &buffers[1], "out", 2, buffers[0].len / 4, 1) < 0) {
        PyBuffer_Release(&buffers[0]);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS if (rounded) exact =
        df11_cast_f32(buffers[0].buf, (uint64_t)buffers[0].len / 4, buffers[1].buf);
    else df11_narrow_f32(buffers[0].buf, (uint64_t)buffers[0].len / 4, buffers[1].buf);
    Py_END_ALLOW_THREADS release_buffers(buffers, 2);
    return PyBool_FromLong(exact);
}

static PyObject *any_bits(PyObject *module, PyObject *arguments)
{
    PyObject *weights;
    Py_buffer buffer;
    unsigned kind;
    uint32_t bits;
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OI", &weights, &kind) || !check_kind(kind, 0)
        || get_buffer(weights, &buffer, "weights", 1, 0, 0) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS bits = df11_any_bits(kind, buffer.buf, (uint64_t)buffer.len / df11_splits[kind].bytes);
    Py_END_ALLOW_THREADS PyBuffer_Release(&buffer);
    return PyLong_FromUnsignedLong(bits);
}

/* DFloat11's layout. */

static const char DFLOAT11[] = "df11.dfloat11";

static void free_dfloat11_table(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, DFLOAT11));
}

/* (luts, rows) -> a table that cannot be changed from outside, or the status. */
static PyObject *dfloat11_table(PyObject *module, PyObject *arguments)
{
    PyObject *luts, *capsule;
    Py_ssize_t rows;
    Py_buffer buffer;
    (void)module;

    if (!PyArg_ParseTuple(arguments, "On", &luts, &rows)
        || !require(rows >= 2 && rows <= DFLOAT11_TABLES + 1, "rows of luts")
        || get_buffer(luts, &buffer, "luts", 1, rows * DFLOAT11_ROW, 0) < 0)
        return NULL;
    struct df11_dfloat11_table *table = malloc(sizeof *table);
    enum df11_dfloat11_status status
        = table ? df11_dfloat11_build(buffer.buf, (unsigned)rows, table) : DFLOAT11_OK;
    PyBuffer_Release(&buffer);
    if (!table)
        return PyErr_NoMemory();
    if (status != DFLOAT11_OK) {
        free(table);
        return PyLong_FromLong((long)status);
    }
    if (!(capsule = PyCapsule_New(table, DFLOAT11, free_dfloat11_table)))
        free(table);
    return capsule;
}

/* (table, codes, their bits up to the unit's end, gaps, positions, threads, whether the unit ends, sign_mantissa, out)
 * -> (status, block) */
static PyObject *dfloat11_decode(PyObject *module, PyObject *arguments)
{
    PyObject *capsule, *objects[5];
    unsigned long long bits, threads, failed = 0;
    int last;
    Py_buffer buffers[5];
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OOKOOKpOO", &capsule, &objects[0], &bits, &objects[1], &objects[2], &threads,
                          &last, &objects[3], &objects[4]))
        return NULL;
    const struct df11_dfloat11_table *table = PyCapsule_GetPointer(capsule, DFLOAT11);
    if (!table || !require(threads >= 1 && threads <= DFLOAT11_MAX_THREADS, "threads")
        || get_buffer(objects[2], &buffers[2], "positions", 4, 2, 0) < 0)
        return NULL;
    const uint32_t *positions = buffers[2].buf;
    uint64_t blocks = (uint64_t)buffers[2].len / 4 - 1;
    int valid = require(blocks < (uint64_t)1 << 31, "too many blocks");
    for (uint64_t block = 0; valid && block < blocks; block++)
        valid = require(positions[block] <= positions[block + 1]
                            && positions[block + 1] - positions[block] <= DFLOAT11_THREAD_BITS * threads,
                        "positions");
    if (!valid) {
        PyBuffer_Release(&buffers[2]);
        return NULL;
    }
    uint64_t gaps = blocks * threads + (last ? 0 : 1), weights = positions[blocks] - positions[0];
    struct wanted wanted[] = {
        {objects[0], "codes", 1, (Py_ssize_t)(8 * threads * blocks + DFLOAT11_SLACK), 0},
        {objects[1], "gaps", 1, (Py_ssize_t)((5 * gaps + 7) / 8), 0},
        {objects[2], "positions", 4, 2, 0},
        {objects[3], "sign_mantissa", 1, (Py_ssize_t)weights, 0},
        {objects[4], "out", 2, (Py_ssize_t)weights, 1},
    };
    PyBuffer_Release(&buffers[2]);
    if (get_buffers(wanted, buffers, 5) < 0)
        return NULL;
    struct df11_dfloat11_blocks all = {table,
                                       buffers[0].buf,
                                       bits,
                                       buffers[1].buf,
                                       buffers[2].buf,
                                       blocks,
                                       (unsigned)threads,
                                       last,
                                       buffers[3].buf};
    enum df11_dfloat11_status status;
    uint64_t block = 0;
    Py_BEGIN_ALLOW_THREADS status = df11_dfloat11_decode(&all, buffers[4].buf, &block);
    Py_END_ALLOW_THREADS release_buffers(buffers, 5);
    failed = block;
    return Py_BuildValue("iK", (int)status, failed);
}

/* (weights, lengths, codes, state, threads, out, gaps, positions) -> an exponent without a code, or -1 */
static PyObject *dfloat11_encode(PyObject *module, PyObject *arguments)
{
    PyObject *objects[7];
    unsigned long long threads;
    Py_buffer buffers[7];
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OOOOKOOO", &objects[0], &objects[1], &objects[2], &objects[3], &threads,
                          &objects[4], &objects[5], &objects[6])
        || !require(threads >= 1 && threads <= DFLOAT11_MAX_THREADS, "threads")
        || get_buffer(objects[0], &buffers[0], "weights", 2, 0, 0) < 0)
        return NULL;
    Py_ssize_t count = buffers[0].len / 2, words = count / 2 + 1; /* of 32 bits at most */
    PyBuffer_Release(&buffers[0]);
    struct wanted wanted[] = {
        {objects[0], "weights", 2, count, 0},
        {objects[1], "lengths", 1, 256, 0},
        {objects[2], "codes", 4, 256, 0},
        {objects[3], "state", 8, 4, 1},
        {objects[4], "out", 1, 8 * words, 1},
        {objects[5], "gaps", 1, words, 1},
        {objects[6], "positions", 4, words / (Py_ssize_t)threads + 1, 1},
    };
    if (get_buffers(wanted, buffers, 7) < 0)
        return NULL;
    const uint8_t *lengths = buffers[1].buf;
    const uint32_t *codes = buffers[2].buf;
    struct df11_dfloat11_stream *stream = buffers[3].buf;
    int valid = require(stream->fill < 64, "state"), failed = -1;
    for (int exponent = 0; valid && exponent < 256; exponent++)
        valid = require(lengths[exponent] <= 32 && (uint64_t)codes[exponent] >> lengths[exponent] == 0, "codes");
    if (valid) {
        Py_BEGIN_ALLOW_THREADS failed
            = df11_dfloat11_encode(buffers[0].buf, (uint64_t)count, lengths, codes, stream, (unsigned)threads,
                                   buffers[4].buf, buffers[5].buf, buffers[6].buf);
        Py_END_ALLOW_THREADS
    }
    release_buffers(buffers, 7);
    return valid ? PyLong_FromLong(failed) : NULL;
}

static PyObject *dfloat11_split(PyObject *module, PyObject *arguments)
{
    PyObject *weights, *out;
    Py_buffer buffers[2];
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OO", &weights, &out) || get_buffer(weights, &buffers[0], "weights", 2, 0, 0) < 0)
        return NULL;
    if (get_buffer(out, &buffers[1], "out", 1, buffers[0].len / 2, 1) < 0) {
        PyBuffer_Release(&buffers[0]);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS df11_dfloat11_split(buffers[0].buf, (uint64_t)buffers[0].len / 2, buffers[1].buf);
    Py_END_ALLOW_THREADS release_buffers(buffers, 2);
    Py_RETURN_NONE;
}

/* SHA-256. */

#ifdef HAVE_AVX2
static const char HASH[] = "df11.sha256";

static void free_hash(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, HASH));
}

static PyObject *new_sha256(PyObject *module, PyObject *arguments)
{
    (void)module, (void)arguments;
    if (!df11_use_sha)
        Py_RETURN_NONE;
    struct df11_sha256 *hash = malloc(sizeof *hash);
    if (!hash)
        return PyErr_NoMemory();
    df11_sha256_start(hash);
    PyObject *capsule = PyCapsule_New(hash, HASH, free_hash);
    if (!capsule)
        free(hash);
    return capsule;
}

/* (hash, data, encoder or None): with an encoder, count the pairs of data for its next code, in place of any previous
 * counts. */
static PyObject *update_sha256(PyObject *module, PyObject *arguments)
{
    PyObject *hash_capsule, *data, *encoder_capsule;
    struct owned_encoder *owned = NULL;
    struct df11_counts *counts = NULL;
    Py_buffer buffer;
    (void)module;

    if (!PyArg_ParseTuple(arguments, "OOO", &hash_capsule, &data, &encoder_capsule))
        return NULL;
    struct df11_sha256 *hash = PyCapsule_GetPointer(hash_capsule, HASH);
    if (!hash || PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    int valid = encoder_capsule == Py_None
                || (require(buffer.len / 2 <= MAX_SEGMENT_WEIGHTS, "too many weights for a segment")
                    && (owned = take_encoder(encoder_capsule)));
    if (owned) {
        counts = df11_encoder_counts(owned->encoder);
        if (counts->weights)
            memset(counts, 0, sizeof *counts);
    }
    if (valid) {
        Py_BEGIN_ALLOW_THREADS df11_sha256_update(hash, buffer.buf, (uint64_t)buffer.len, counts);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&buffer);
    if (owned)
        owned->busy = 0;
    if (!valid)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *digest_sha256(PyObject *module, PyObject *capsule)
{
    uint8_t digest[32];
    (void)module;
    struct df11_sha256 *hash = PyCapsule_GetPointer(capsule, HASH);
    if (!hash)
        return NULL;
    df11_sha256_digest(hash, digest);
    return PyBytes_FromStringAndSize((const char *)digest, sizeof digest);
}
#else
static PyObject *new_sha256(PyObject *module, PyObject *arguments)
{
    (void)module, (void)arguments;
    Py_RETURN_NONE;
}
#endif

static PyMethodDef methods[] = {
    {"build_decode_table", build_decode_table, METH_VARARGS, NULL},
    {"decode_tiles", decode_tiles, METH_VARARGS, NULL},
    {"compare_tiles", compare_tiles, METH_VARARGS, NULL},
    {"new_encoder", new_encoder, METH_NOARGS, NULL},
    {"build_code", build_code, METH_VARARGS, NULL},
    {"exponents", exponents, METH_O, NULL},
    {"encode_tiles", encode_tiles, METH_VARARGS, NULL},
    {"count_exponents", count_exponents, METH_VARARGS, NULL},
    {"cast_f32", cast_f32, METH_VARARGS, NULL},
    {"any_bits", any_bits, METH_VARARGS, NULL},
    {"dfloat11_table", dfloat11_table, METH_VARARGS, NULL},
    {"dfloat11_decode", dfloat11_decode, METH_VARARGS, NULL},
    {"dfloat11_encode", dfloat11_encode, METH_VARARGS, NULL},
    {"dfloat11_split", dfloat11_split, METH_VARARGS, NULL},
    {"new_sha256", new_sha256, METH_NOARGS, NULL},
#ifdef HAVE_AVX2
    {"update_sha256", update_sha256, METH_VARARGS, NULL},
    {"digest_sha256", digest_sha256, METH_O, NULL},
#endif
    {NULL, NULL, 0, NULL},
};

static int initialise(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } constants[] = {
        {"OK", OK},
        {"BAD_TILE", BAD_TILE},
        {"BAD_LANE", BAD_LANE},
        {"BAD_EXCEPTION", BAD_EXCEPTION},
        {"DIFFERENT", DIFFERENT},
        {"BAD_ALPHABET", BAD_ALPHABET},
        {"BAD_LENGTH", BAD_LENGTH},
        {"INCOMPLETE_CODE", INCOMPLETE_CODE},
        {"LANE_OVERFLOW", LANE_OVERFLOW},
        {"NOT_SMALLER", NOT_SMALLER},
        {"ENCODE_SLACK", ENCODE_SLACK},
        {"DFLOAT11_BAD_TABLE", DFLOAT11_BAD_TABLE},
        {"DFLOAT11_BAD_LENGTH", DFLOAT11_BAD_LENGTH},
        {"DFLOAT11_BAD_CODE", DFLOAT11_BAD_CODE},
        {"DFLOAT11_BAD_GAP", DFLOAT11_BAD_GAP},
        {"DFLOAT11_BAD_POSITION", DFLOAT11_BAD_POSITION},
        {"DFLOAT11_BAD_END", DFLOAT11_BAD_END},
        {"DFLOAT11_SLACK", DFLOAT11_SLACK},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0)
            return -1;
    /* For tests, and to find out whether a bug lies in these instructions: the portable code gives the same bytes. */
    if (!getenv("DF11_PORTABLE"))
        df11_choose_instructions();
    return PyModule_AddStringConstant(module, "INSTRUCTIONS",
                                      df11_use_sha    ? "avx2, sha"
                                      : df11_use_avx2 ? "avx2"
                                                      : "portable");
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)initialise},
    {0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "df11._kernels", .m_doc = "The CPU kernels.",
                                        .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&definition);
}
