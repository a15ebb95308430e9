/* What a block does between its products, on a CPU in float32. Compiled by nextscale/backends/cpu/kernels/build.py.

   attend: softmax attention of a scale's queries to its own keys and all cached ones, from the projection's output as
   it lies, to the next projection's input as it lies. Scores are made with keys along the rows and queries along the
   lanes, so that a softmax is the same few vector operations for each key, without a sum across lanes.

   modulate: LayerNorm and adaLN in one pass over a row.

   A row's sums run in one order whatever rows are beside it and whatever threads there are. */

#include "products.h"

#define HEAD PANEL /* values of a head; and queries at once */

/* The sum of all lanes, by halves. */
static inline float total(vec x)
{
    x += __builtin_shuffle(x, (ints){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    x += __builtin_shuffle(x, (ints){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    x += __builtin_shuffle(x, (ints){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    x += __builtin_shuffle(x, (ints){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return x[0];
}

static inline vec larger(vec a, vec b)
{
    const ints first = a > b;
    return (vec)(((ints)a & first) | ((ints)b & ~first));
}

/* ---- attention */

/* What gives a vector with this sum of squares this length. */
static inline float factor(float squares, float length)
{
    const float norm = sqrtf(squares);
    return length / (norm < 1e-12f ? 1e-12f : norm);
}

/* `count` vectors of a head, `apart` values from one to the next, as columns of `queries` (HEAD, vectors), each of this
   length if they are to be normalised, else times `length`. */
static inline __attribute__((always_inline)) void as_columns(
    const int vectors, const float *q, long apart, long count, float length, int normalise, float *queries)
{
    const long lanes = vectors * LANES;
    float by[HEAD] = {0};
    memset(queries, 0, HEAD * lanes * sizeof *queries);
    for (long i = 0; i < count; i++)
        for (int k = 0; k < HEAD; k++) queries[k * lanes + i] = q[i * apart + k];
    for (int k = 0; k < HEAD; k++)
        for (long i = 0; i < lanes; i++) by[i] += queries[k * lanes + i] * queries[k * lanes + i];
    for (long i = 0; i < lanes; i++) by[i] = normalise ? factor(by[i], length) : length;
    for (int k = 0; k < HEAD; k++)
        for (long i = 0; i < lanes; i++) queries[k * lanes + i] *= by[i];
}

/* scores (rows, vectors) = keys . queries, queries being (HEAD, vectors) */
static inline __attribute__((always_inline)) void scored(
    const int rows, const int vectors, const float *const *keys, const float *queries, float *scores)
{
    float *to[ROWS];
    for (int r = 0; r < rows; r++) to[r] = scores + r * vectors * LANES;
    products(rows, vectors, 0, 0, keys, 1, queries, vectors * LANES, HEAD, to, 0);
}

#define CASE(n) case n: scored(n, vectors, keys + first, queries, to); break;

static inline __attribute__((always_inline)) void all_scores(
    const int vectors, const float *const *keys, long many, const float *queries, float *scores)
{
    const long blocks = (many + ROWS - 1) / ROWS;
    for (long b = 0; b < blocks; b++) { /* of nearly equal size */
        const long first = many * b / blocks;
        float *to = scores + first * vectors * LANES;
        switch (many * (b + 1) / blocks - first) {
            CASES
        }
    }
}
#undef CASE

/* What a softmax over keys that come in parts has found for each query: its largest score so far and the sum of the
   exponentials beside that; `by` is what the parts before are multiplied by when a larger one is found. */
struct softmax {
    float largest[HEAD], sums[HEAD], by[HEAD];
};

/* exp(scores - the largest) in place of `scores` (many, vectors), in units of log 2; `first`: no part was before */
static inline __attribute__((always_inline)) void exponentials(
    const int vectors, float *scores, long many, int first, struct softmax *found)
{
    for (int v = 0; v < vectors; v++) {
        vec *top = (vec *)(found->largest + v * LANES), *sum = (vec *)(found->sums + v * LANES);
        float *by = found->by + v * LANES, *start = scores + v * LANES;
        vec largest = first ? *(const vec *)start : *top;
        for (long m = 0; m < many; m++) largest = larger(*(const vec *)(start + m * vectors * LANES), largest);
        if (first) *top = largest, *sum = (vec){0};
        *(vec *)by = *top - largest;
        for (int i = 0; i < LANES; i++) by[i] = power(by[i]);
        *top = largest;
        *sum *= *(vec *)by;
        for (long m = 0; m < many; m++) {
            float *s = start + m * vectors * LANES;
            *(vec *)s -= largest;
            for (int i = 0; i < LANES; i++) s[i] = power(s[i]);
            *sum += *(const vec *)s;
        }
    }
}

/* A head's values: `old` rows that follow one another, and `new` ones `stride` apart. */
struct values {
    const float *cached, *fresh;
    long old, new, stride;
};

/* Those from `start` to `stop`. */
static inline struct values part_of(const struct values *all, long start, long stop)
{
    const long old = all->old, from = start < old ? start : old, to = stop < old ? stop : old;
    return (struct values){all->cached + from * HEAD, all->fresh + (start - from) * all->stride, to - from,
                           stop - start - (to - from), all->stride};
}

/* y[r] = by[r] y[r], unless these are the `first`, + sum over keys of weights[key][r] values[key]; weights have `lanes`
   columns */
static inline __attribute__((always_inline)) void mixed(
    const int rows, const float *weights, long lanes, const struct values *values, const float *by, int first,
    float *y, long stride)
{
    const float *of_cached[ROWS], *of_fresh[ROWS];
    float *to[ROWS];
    for (int r = 0; r < rows; r++) {
        of_cached[r] = weights + r, of_fresh[r] = weights + values->old * lanes + r, to[r] = y + r * stride;
        for (int v = 0; v < VECTORS && !first; v++) *(vec *)(to[r] + v * LANES) *= by[r];
    }
    products(rows, VECTORS, 0, !first, of_cached, lanes, values->cached, HEAD, values->old, to, 0);
    products(rows, VECTORS, 0, 1, of_fresh, lanes, values->fresh, values->stride, values->new, to, 0);
}

#define CASE(n) case n: mixed(n, scores + j, lanes, &part, found.by + j, !start, to, stride); break;

/* `count` <= HEAD queries, `apart` values from one to the next, of one head */
static inline __attribute__((always_inline)) void some_queries(
    const int vectors, const float *q, long apart, long count, float length, int normalise, const float *const *keys,
    const struct values *values, long at_once, float *y, long stride, float *queries, float *scores)
{
    const long lanes = vectors * LANES, many = values->old + values->new, blocks = (count + ROWS - 1) / ROWS;
    struct softmax found;
    as_columns(vectors, q, apart, count, length, normalise, queries);
    for (long start = 0; start < many; start += at_once) {
        const long stop = start + at_once < many ? start + at_once : many;
        const struct values part = part_of(values, start, stop);
        all_scores(vectors, keys + start, stop - start, queries, scores);
        exponentials(vectors, scores, stop - start, !start, &found);
        for (long b = 0; b < blocks; b++) {
            const long j = count * b / blocks;
            float *to = y + j * stride;
            switch (count * (b + 1) / blocks - j) {
                CASES
            }
        }
    }
    for (long j = 0; j < count; j++)
        for (int v = 0; v < VECTORS; v++) *(vec *)(y + j * stride + v * LANES) *= 1.0f / found.sums[j];
}
#undef CASE

#define LOG2E 1.44269504f

/* `count` keys, `apart` values from one to the next, to rows that follow one another, of length 1 if so asked. */
static void take_keys(const float *k, long apart, long count, int normalise, float *to)
{
    for (long n = 0; n < count; n++, k += apart, to += HEAD) {
        float by = 1.0f;
        if (normalise) {
            vec squares = {0};
            for (int j = 0; j < HEAD; j += LANES) squares += *(const vec *)(k + j) * *(const vec *)(k + j);
            by = factor(total(squares), 1.0f);
        }
        for (int j = 0; j < HEAD; j += LANES) *(vec *)(to + j) = *(const vec *)(k + j) * by;
    }
}

/* qkv: (batch, count, 3, heads, HEAD) as projected. Keys and values are put into the caches (batch, heads, length,
   HEAD) at `start` if there is room; those before are attended to as well. lengths (heads): what queries are multiplied
   by, after normalisation if that is asked for, which is of keys as well. y: (batch, count, heads, HEAD). `at_once`
   keys are scored at once. Scratch for each thread: (HEAD + at_once + count) * HEAD floats, and start + count pointers. */
void attend(
    const float *qkv, float *k_cache, float *v_cache, const float *lengths, float *y, long batch, long heads,
    long count, long start, long length, long at_once, int normalise, int threads, float *scratch,
    const float **pointers)
{
    const long width = heads * HEAD, many = start + count, room = (HEAD + at_once + count) * HEAD;
    const int kept = many <= length;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < batch * heads; i++) {
        const long b = i / heads, h = i % heads;
        float *queries = scratch + omp_get_thread_num() * room, *scores = queries + HEAD * HEAD;
        float *old = k_cache + i * length * HEAD, *fresh = kept ? old + start * HEAD : scores + at_once * HEAD;
        const float **keys = pointers + omp_get_thread_num() * many;
        const float *q = qkv + b * count * 3 * width + h * HEAD, *k = q + width, *v = k + width;
        take_keys(k, 3 * width, count, normalise, fresh);
        for (long n = 0; n < count && kept; n++)
            memcpy(v_cache + (i * length + start + n) * HEAD, v + n * 3 * width, HEAD * sizeof *v);
        for (long n = 0; n < many; n++) keys[n] = n < start ? old + n * HEAD : fresh + (n - start) * HEAD;
        const struct values values = {v_cache + i * length * HEAD, v, start, count, 3 * width};
        for (long n = 0; n < count; n += HEAD) {
            const long some = count - n < HEAD ? count - n : HEAD;
            float *to = y + (b * count + n) * width + h * HEAD;
#define CASE(v) case v: some_queries(v, q + n * 3 * width, 3 * width, some, lengths[h] * LOG2E, normalise, keys, \
                                     &values, at_once, to, width, queries, scores); break;
            switch ((some + LANES - 1) / LANES) {
                CASE(1)
                CASE(2)
#if VECTORS == 4
                CASE(3)
                CASE(4)
#endif
            }
#undef CASE
        }
    }
}

/* ---- LayerNorm and adaLN */

/* y = LN(x) (1 + scale) + shift: x (batch, count, width), scale and shift of an image (width), `apart` values from
   those of the next. width is a multiple of 16. */
void modulate(
    const float *x, const float *scale, const float *shift, float *y, long batch, long count, long width, long apart,
    float eps, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < batch * count; t++) {
        const float *from = x + t * width, *by = scale + t / count * apart, *plus = shift + t / count * apart;
        float *to = y + t * width;
        vec sum = {0}, squares = {0};
        for (long j = 0; j < width; j += LANES) sum += *(const vec *)(from + j);
        const float mean = total(sum) / width;
        for (long j = 0; j < width; j += LANES) {
            const vec rest = *(const vec *)(from + j) - mean;
            squares += rest * rest;
        }
        const float by_deviation = 1.0f / sqrtf(total(squares) / width + eps);
        for (long j = 0; j < width; j += LANES)
            *(vec *)(to + j) = (*(const vec *)(from + j) - mean) * by_deviation * (1.0f + *(const vec *)(by + j))
                               + *(const vec *)(plus + j);
    }
}
