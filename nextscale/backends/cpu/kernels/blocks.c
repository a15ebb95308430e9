/* What a block does between its products, on a CPU in float32. Compiled by nextscale/backends/cpu/kernels/compilation.py.

   attend: softmax attention of a scale's queries to its own keys and all cached ones, from the projection's output as
   it lies, to the next projection's input as it lies. Scores are made with keys along the rows and queries along the
   lanes, so that a softmax is the same few vector operations for each key, without a sum across lanes.

   modulate: LayerNorm and adaLN in one pass over a row.

   A row's sums run in one order whatever rows are beside it and whatever threads there are. */

#include "attention.h"

/* What a softmax over keys that come in parts has found for each query: its largest score so far and the sum of the
   exponentials beside that; `by` is what the parts before are multiplied by when a larger one is found. */
struct softmax {
    float largest[PANEL], sums[PANEL], by[PANEL];
};

/* exp(scores - the largest) in place of `scores` (many, vectors), in units of log 2; `first`: no part was before */
static inline __attribute__((always_inline)) void exponentials(
    const int vectors, float *scores, long many, int first, struct softmax *found)
{
    for (int v = 0; v < vectors; v++) {
        vec *top = (vec *)(found->largest + v * LANES), *sum = (vec *)(found->sums + v * LANES);
        float *start = scores + v * LANES;
        vec largest = first ? *(const vec *)start : *top;
        for (long m = 0; m < many; m++) largest = LARGER(*(const vec *)(start + m * vectors * LANES), largest);
        if (first) *top = largest, *sum = (vec){0};
        const vec by = power(*top - largest);
        *(vec *)(found->by + v * LANES) = by;
        *top = largest;
        *sum *= by;
        for (long m = 0; m < many; m++) {
            vec *s = (vec *)(start + m * vectors * LANES);
            *s = power(*s - largest);
            *sum += *s;
        }
    }
}

/* `count` of a head's values, `apart` from one to the next, as rows `from` on of panels (HEAD / PANEL, many, PANEL): the
   lines that one panel of a projection's output has are a multiple of 4 KiB apart, and few of them fit the first cache. */
static void take_values(const float *v, long apart, long count, long from, long many, float *to)
{
    for (long n = 0; n < count; n++)
        for (int j = 0; j < HEAD; j += PANEL)
            memcpy(to + j * many + (from + n) * PANEL, v + n * apart + j, PANEL * sizeof *v);
}

/* y[r] = by[r] y[r], unless these are the `first`, + sum over `some` keys of weights[key][r] values[key]; weights have
   `lanes` columns, values are panels of `many` rows. */
static inline __attribute__((always_inline)) void mixed(
    const int rows, const float *weights, long lanes, const float *values, long some, long many, const float *by,
    int first, float *y, long stride)
{
    const float *from[ROWS];
    float *to[ROWS];
    for (int r = 0; r < rows; r++) from[r] = weights + r;
    for (int j = 0; j < HEAD; j += PANEL) {
        for (int r = 0; r < rows; r++) {
            to[r] = y + r * stride + j;
            for (int v = 0; v < VECTORS && !first; v++) *(vec *)(to[r] + v * LANES) *= by[r];
        }
        products(rows, VECTORS, 0, !first, from, lanes, values + j * many, PANEL, some, to, 0);
    }
}

#define CASE(n) case n: mixed(n, scores + j, lanes, values + start * PANEL, stop - start, many, found.by + j, \
                             !start, to, stride); break;

/* `count` <= PANEL queries, `apart` values from one to the next, of one head */
static inline __attribute__((always_inline)) void some_queries(
    const int vectors, const float *q, long apart, long count, float length, int normalise, const float *const *keys,
    const float *values, long many, long at_once, float *y, long stride, float *queries, float *scores, float *softmax)
{
    const long lanes = vectors * LANES, blocks = (count + ROWS - 1) / ROWS;
    struct softmax found;
    as_columns(vectors, q, apart, count, length, normalise, queries);
    for (long start = 0; start < many; start += at_once) {
        const long stop = start + at_once < many ? start + at_once : many;
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
        for (int v = 0; v < HEAD / LANES; v++) *(vec *)(y + j * stride + v * LANES) *= 1.0f / found.sums[j];
    for (long j = 0; j < count && softmax; j++) softmax[2 * j] = found.largest[j], softmax[2 * j + 1] = found.sums[j];
}
#undef CASE

struct attention {
    const float *qkv;
    float *k_cache, *v_cache;
    const float *lengths;
    float *y;
    long batch, heads, count, start, length, tokens, at_once;
    int normalise;
    float *softmax, *scratch;
    const float **pointers;
};

/* Head `i`, of all heads of all images. */
static void attend_head(const struct attention *all, long i)
{
    const long heads = all->heads, count = all->count, start = all->start, length = all->length;
    const long at_once = all->at_once, width = heads * HEAD, many = start + count, b = i / heads, h = i % heads;
    const int me = omp_get_thread_num(), kept = many <= length, normalise = all->normalise;
    float *queries = all->scratch + me * (HEAD + at_once + count + many) * HEAD, *scores = queries + HEAD * HEAD;
    float *old = all->k_cache + i * length * HEAD, *fresh = kept ? old + start * HEAD : scores + at_once * HEAD;
    float *v_cache = all->v_cache + i * length * HEAD, *values = scores + (at_once + count) * HEAD;
    const float **keys = all->pointers + me * many, by = all->lengths[h] * LOG2E;
    const float *q = all->qkv + b * all->tokens * 3 * width + h * HEAD, *k = q + width, *v = k + width;
    take_keys(k, 3 * width, count, normalise, fresh);
    for (long n = 0; n < count && kept; n++)
        memcpy(v_cache + (start + n) * HEAD, v + n * 3 * width, HEAD * sizeof *v);
    for (long n = 0; n < many; n++) keys[n] = n < start ? old + n * HEAD : fresh + (n - start) * HEAD;
    take_values(v_cache, HEAD, start, 0, many, values);
    take_values(v, 3 * width, count, start, many, values);
    for (long n = 0; n < count; n += PANEL) {
        const long some = count - n < PANEL ? count - n : PANEL;
        float *to = all->y + (b * all->tokens + n) * width + h * HEAD;
        float *softmax = all->softmax ? all->softmax + 2 * (i * all->tokens + n) : 0;
#define CASE(v) case v: some_queries(v, q + n * 3 * width, 3 * width, some, by, normalise, keys, values, many, \
                                     at_once, to, width, queries, scores, softmax); break;
        switch ((some + LANES - 1) / LANES) { VECTOR_CASES }
#undef CASE
    }
}

static void attend_share(void *arguments)
{
    const struct attention *all = arguments;
    long stop;
    for (long i = share(all->batch * all->heads, &stop); i < stop; i++) attend_head(all, i);
}

/* qkv: (batch, count, 3, heads, HEAD) as projected, with `tokens` from one image to the next, as in y. Keys and values
   are put into the caches (batch, heads, length, HEAD) at `start` if there is room; those before are attended to as
   well. lengths (heads): what queries are multiplied by, after normalisation if that is asked for, which is of keys as
   well. y: (batch, count, heads, HEAD). `at_once` keys are scored at once. softmax (batch, heads, count, 2), with
   `tokens` from one head to the next, or none: each query's largest score, in units of log 2, and the sum of the
   exponentials beside it. Scratch for each thread: (HEAD + at_once + 2 count + start) * HEAD floats, and start + count pointers. */
void attend(
    const float *qkv, float *k_cache, float *v_cache, const float *lengths, float *y, long batch, long heads,
    long count, long start, long length, long tokens, long at_once, int normalise, int threads, float *softmax,
    float *scratch, const float **pointers)
{
    struct attention all = {qkv, k_cache, v_cache, lengths, y, batch, heads, count, start, length, tokens, at_once,
                            normalise, softmax, scratch, pointers};
    GOMP_parallel(attend_share, &all, threads, 0);
}

/* ---- LayerNorm and adaLN */

struct modulation {
    const float *x, *scale, *shift;
    float *y;
    long batch, count, width, apart;
    float eps;
};

static void modulate_share(void *arguments)
{
    const struct modulation *all = arguments;
    const long count = all->count, width = all->width, apart = all->apart;
    long stop;
    for (long t = share(all->batch * count, &stop); t < stop; t++) {
        const float *from = all->x + t * width, *by = all->scale + t / count * apart;
        const float *plus = all->shift + t / count * apart;
        float *to = all->y + t * width;
        vec sum = {0}, squares = {0};
        for (long j = 0; j < width; j += LANES) sum += *(const vec *)(from + j);
        const float mean = total(sum) / width;
        for (long j = 0; j < width; j += LANES) {
            const vec rest = *(const vec *)(from + j) - mean;
            squares += rest * rest;
        }
        const float by_deviation = 1.0f / sqrtf(total(squares) / width + all->eps);
        for (long j = 0; j < width; j += LANES)
            *(vec *)(to + j) = (*(const vec *)(from + j) - mean) * by_deviation * (1.0f + *(const vec *)(by + j))
                               + *(const vec *)(plus + j);
    }
}

/* y = LN(x) (1 + scale) + shift: x (batch, count, width), scale and shift of an image (width), `apart` values from
   those of the next. width is a multiple of LANES. */
void modulate(
    const float *x, const float *scale, const float *shift, float *y, long batch, long count, long width, long apart,
    float eps, int threads)
{
    struct modulation all = {x, scale, shift, y, batch, count, width, apart, eps};
    GOMP_parallel(modulate_share, &all, threads, 0);
}
