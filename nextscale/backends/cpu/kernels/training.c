/* What a training step computes beside its products, on a CPU in float32. Compiled by
   nextscale/backends/cpu/kernels/compilation.py.

   attend_gradient: that of `attend` (blocks.c), called for all scales. Scores are computed again, as there with keys
   along the rows and queries along the lanes; every product has the shape of those there.

   gelu_or_gradient: tanh-GELU, or its gradient, in one pass.

   gradient_of_rows: that of LayerNorm with adaLN (`modulate`, blocks.c), or of a branch times gamma, in one pass.

   A value's sum runs in one order whatever images are beside it and whatever threads there are. */

#include "attention.h"

struct gradient {
    const float *qkv, *keys, *lengths, *y, *softmax, *dy;
    float *dqkv, *dlengths;
    const long *spans;
    long scales, batch, heads, tokens, at_once;
    int normalise;
    float *scratch;
    const float **pointers;
};

#define BLOCK(n, blocks, b) ((n) * ((b) + 1) / (blocks) - (n) * (b) / (blocks))

/* to[r] += a[r] . panel for `many` rows: a (many, steps) with values `a_row` and `a_step` apart, panel (steps, HEAD) */
#define CASE(n) case n: \
    for (int r = 0; r < n; r++) from[r] = a + (first + r) * a_row, into[r] = to + (first + r) * to_row + j; \
    products(n, VECTORS, 0, 1, from, a_step, panel + j, panel_row, steps, into, 0); \
    break;

static void add_products(
    const float *a, long many, long a_row, long a_step, const float *panel, long panel_row, long steps, float *to,
    long to_row)
{
    const long blocks = (many + ROWS - 1) / ROWS;
    const float *from[ROWS];
    float *into[ROWS];
    for (int j = 0; j < HEAD; j += PANEL)
        for (long b = 0; b < blocks; b++) {
            const long first = many * b / blocks;
            switch (BLOCK(many, blocks, b)) { CASES }
        }
}
#undef CASE

/* What one head works with: its place in the arrays, and its scratch. */
struct head {
    const float *q, *k, *y, *dy, *softmax; /* q and k of the length that they are multiplied with */
    const float **keys, **values;
    float *dq, *dk, *dv, *queries, *dys, *scores, *dscores;
    long width, at_once;
};

/* `count` <= PANEL queries from `n` on, and the keys before `end` */
static inline __attribute__((always_inline)) void some_gradients(
    const int vectors, const struct head *head, long n, long count, long end)
{
    const long lanes = vectors * LANES, width = head->width;
    float delta[PANEL] = {0}, largest[PANEL] = {0}, by[PANEL] = {0};
    as_columns(vectors, head->q + n * HEAD, HEAD, count, 1.0f, 0, head->queries);
    as_columns(vectors, head->dy + n * width, width, count, 1.0f, 0, head->dys);
    for (long i = 0; i < count; i++) {
        vec sum = {0};
        for (int j = 0; j < HEAD; j += LANES)
            sum += *(const vec *)(head->y + (n + i) * width + j) * *(const vec *)(head->dy + (n + i) * width + j);
        delta[i] = total(sum), largest[i] = head->softmax[2 * (n + i)], by[i] = 1.0f / head->softmax[2 * (n + i) + 1];
    }
    for (long start = 0; start < end; start += head->at_once) {
        const long many = end - start < head->at_once ? end - start : head->at_once;
        all_scores(vectors, head->keys + start, many, head->queries, head->scores);
        all_scores(vectors, head->values + start, many, head->dys, head->dscores);
        for (int v = 0; v < lanes; v += LANES) {
            const vec top = *(const vec *)(largest + v), share = *(const vec *)(by + v), d = *(const vec *)(delta + v);
            for (long m = 0; m < many; m++) {
                vec *s = (vec *)(head->scores + m * lanes + v), *ds = (vec *)(head->dscores + m * lanes + v);
                *s = power(*s * LOG2E - top) * share;
                *ds = *s * (*ds - d);
            }
        }
        add_products(head->scores, many, lanes, 1, head->dy + n * width, width, count, head->dv + start * 3 * width,
                     3 * width);
        add_products(head->dscores, many, lanes, 1, head->q + n * HEAD, HEAD, count, head->dk + start * 3 * width,
                     3 * width);
        add_products(head->dscores, count, 1, lanes, head->k + start * HEAD, HEAD, many, head->dq + n * 3 * width,
                     3 * width);
    }
}

/* In place of `to`, the gradient of x length / |x|, that of x: `x` has values `apart` from one vector to the next, the
   scaled vectors HEAD. Returns the gradient of the length. */
static float unscale(
    const float *x, const float *scaled, float *to, long apart, long count, float length, int normalise)
{
    float dlength = 0;
    for (long n = 0; n < count; n++, x += apart, to += apart, scaled += HEAD) {
        vec squares = {0}, along = {0};
        for (int j = 0; j < HEAD; j += LANES) {
            squares += *(const vec *)(x + j) * *(const vec *)(x + j);
            along += *(const vec *)(to + j) * *(const vec *)(scaled + j);
        }
        const float part = total(along) / length, by = normalise ? factor(total(squares), length) : length;
        const float back = normalise ? part / length : 0.0f;
        dlength += part;
        for (int j = 0; j < HEAD; j += LANES)
            *(vec *)(to + j) = (*(vec *)(to + j) - *(const vec *)(scaled + j) * back) * by;
    }
    return dlength;
}

static void head_gradient(const struct gradient *all, long i)
{
    const long width = all->heads * HEAD, tokens = all->tokens, b = i / all->heads, h = i % all->heads;
    const long size = PANEL * (2 * HEAD + 2 * all->at_once) + tokens * HEAD;
    const int me = omp_get_thread_num();
    const float *qkv = all->qkv + b * tokens * 3 * width + h * HEAD, length = all->lengths[h];
    float *d = all->dqkv + b * tokens * 3 * width + h * HEAD, *scratch = all->scratch + me * size;
    float *queries = scratch + tokens * HEAD;
    const float **keys = all->pointers + me * 2 * tokens, *k = all->keys + i * tokens * HEAD;
    const struct head head = {
        .q = scratch, .k = k, .y = all->y + b * tokens * width + h * HEAD, .dy = all->dy + b * tokens * width + h * HEAD,
        .softmax = all->softmax + 2 * i * tokens, .keys = keys, .values = keys + tokens,
        .dq = d, .dk = d + width, .dv = d + 2 * width, .queries = queries, .dys = queries + PANEL * HEAD,
        .scores = queries + 2 * PANEL * HEAD, .dscores = queries + PANEL * (2 * HEAD + all->at_once),
        .width = width, .at_once = all->at_once};
    for (long n = 0; n < tokens; n++) {
        keys[n] = k + n * HEAD, keys[tokens + n] = qkv + 2 * width + n * 3 * width;
        for (int part = 0; part < 3; part++) memset(d + n * 3 * width + part * width, 0, HEAD * sizeof *d);
    }
    take_keys(qkv, 3 * width, tokens, all->normalise, scratch);
    for (long j = 0; j < tokens * HEAD; j += LANES) *(vec *)(scratch + j) *= length;
    for (long s = 0; s < all->scales; s++)
        for (long n = all->spans[s]; n < all->spans[s + 1]; n += PANEL) {
            const long end = all->spans[s + 1], count = end - n < PANEL ? end - n : PANEL;
#define CASE(v) case v: some_gradients(v, &head, n, count, end); break;
            switch ((count + LANES - 1) / LANES) { VECTOR_CASES }
#undef CASE
        }
    all->dlengths[i] = unscale(qkv, scratch, d, 3 * width, tokens, length, all->normalise);
    if (all->normalise) unscale(qkv + width, k, d + width, 3 * width, tokens, 1.0f, 1);
}

static void gradient_share(void *arguments)
{
    const struct gradient *all = arguments;
    long stop;
    for (long i = share(all->batch * all->heads, &stop); i < stop; i++) head_gradient(all, i);
}

/* The gradients dqkv of qkv (batch, tokens, 3, heads, HEAD) and dlengths (batch, heads) of lengths (heads), from dy, that
   of y (batch, tokens, heads, HEAD). keys (batch, heads, tokens, HEAD): the cache that attend left; softmax: as it left
   it. spans (scales + 1): where scales begin and end; a token attends to its own scale and those before. Scratch for
   each thread: PANEL * (2 * HEAD + 2 * at_once) + tokens * HEAD floats, and 2 * tokens pointers. */
void attend_gradient(
    const float *qkv, const float *keys, const float *lengths, const float *y, const float *softmax, const float *dy,
    float *dqkv, float *dlengths, const long *spans, long scales, long batch, long heads, long tokens, long at_once,
    int normalise, int threads, float *scratch, const float **pointers)
{
    struct gradient all = {qkv, keys, lengths, y, softmax, dy, dqkv, dlengths, spans, scales, batch, heads, tokens,
                           at_once, normalise, scratch, pointers};
    GOMP_parallel(gradient_share, &all, threads, 0);
}

/* ---- tanh-GELU */

struct values {
    const float *x, *dy;
    float *to;
    long count;
};

/* The derivative of x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
static inline vec gelu_slope(vec x)
{
    const vec squares = x * x;
    const vec sigmoid = 1.0f / (1.0f + power(-2.302208198f * (x + 0.044715f * x * squares)));
    return sigmoid + sigmoid * (1.0f - sigmoid) * x * (1.595769122f + 0.2140644482f * squares);
}

static inline void gelu_values(const float *x, const float *dy, float *to)
{
    const vec value = *(const vec *)x;
    *(vec *)to = dy ? gelu_slope(value) * *(const vec *)dy : gelu(value);
}

static void gelu_share(void *arguments)
{
    const struct values *all = arguments;
    long stop;
    for (long i = share((all->count + LANES - 1) / LANES, &stop); i < stop; i++) {
        const long from = i * LANES, left = all->count - from;
        if (left >= LANES) {
            gelu_values(all->x + from, all->dy ? all->dy + from : 0, all->to + from);
            continue;
        }
        float x[LANES] = {0}, dy[LANES] = {0};
        memcpy(x, all->x + from, left * sizeof *x);
        if (all->dy) memcpy(dy, all->dy + from, left * sizeof *x);
        gelu_values(x, all->dy ? dy : 0, x);
        memcpy(all->to + from, x, left * sizeof *x);
    }
}

/* to = gelu(x), or dy times its derivative if dy is given; `count` values. */
void gelu_or_gradient(const float *x, const float *dy, float *to, long count, int threads)
{
    struct values all = {x, dy, to, count};
    GOMP_parallel(gelu_share, &all, threads, 0);
}

/* ---- adaLN and residual */

struct rows {
    const float *x, *dy, *by;
    float *dx, *sums;
    long batch, count, width, apart, at_once;
    float eps;
};

/* Of one row: dx = d/dx of LN(x) (1 + by) times dy; dscale += LN(x) dy and dshift += dy. */
static void norm_row(
    const float *x, const float *dy, const float *by, float *dx, float *dscale, float *dshift, long width, float eps)
{
    vec sum = {0}, squares = {0}, mean_of = {0}, along = {0};
    for (long j = 0; j < width; j += LANES) sum += *(const vec *)(x + j);
    const float mean = total(sum) / width;
    for (long j = 0; j < width; j += LANES) {
        const vec rest = *(const vec *)(x + j) - mean;
        squares += rest * rest;
    }
    const float by_deviation = 1.0f / sqrtf(total(squares) / width + eps);
    for (long j = 0; j < width; j += LANES) {
        const vec normal = (*(const vec *)(x + j) - mean) * by_deviation, d = *(const vec *)(dy + j);
        const vec scaled = d * (1.0f + *(const vec *)(by + j));
        mean_of += scaled, along += scaled * normal;
        *(vec *)(dscale + j) += normal * d;
        *(vec *)(dshift + j) += d;
    }
    const float first = total(mean_of) / width, second = total(along) / width;
    for (long j = 0; j < width; j += LANES) {
        const vec normal = (*(const vec *)(x + j) - mean) * by_deviation;
        const vec scaled = *(const vec *)(dy + j) * (1.0f + *(const vec *)(by + j));
        *(vec *)(dx + j) = (scaled - first - normal * second) * by_deviation;
    }
}

/* Of one row: dx = dy by, and dby += dy x. */
static void gated_row(const float *x, const float *dy, const float *by, float *dx, float *dby, long width)
{
    for (long j = 0; j < width; j += LANES) {
        const vec d = *(const vec *)(dy + j);
        *(vec *)(dby + j) += d * *(const vec *)(x + j);
        *(vec *)(dx + j) = d * *(const vec *)(by + j);
    }
}

static void rows_share(void *arguments)
{
    const struct rows *all = arguments;
    const long count = all->count, width = all->width, chunks = (count + all->at_once - 1) / all->at_once;
    const long values = all->eps < 0 ? width : 2 * width;
    long stop;
    for (long i = share(all->batch * chunks, &stop); i < stop; i++) {
        const long b = i / chunks, begin = i % chunks * all->at_once;
        const long end = begin + all->at_once < count ? begin + all->at_once : count;
        const float *by = all->by + b * all->apart;
        float *sums = all->sums + i * values;
        memset(sums, 0, values * sizeof *sums);
        for (long n = begin; n < end; n++) {
            const long at = (b * count + n) * width;
            if (all->eps < 0) gated_row(all->x + at, all->dy + at, by, all->dx + at, sums, width);
            else norm_row(all->x + at, all->dy + at, by, all->dx + at, sums, sums + width, width, all->eps);
        }
    }
}

/* The gradients of LN(x) (1 + by) + shift, from dy, that of the result: dx, and the sums of those of `by` and of shift,
   or, with a negative eps, of x by, without LN: dx, and the sums of that of `by`. x, dy and dx (batch, count, width);
   `by` (width) of an image `apart` values from that of the next; sums (batch, chunks, 2 or 1, width), each over
   `at_once` rows of an image. width is a multiple of LANES. */
void gradient_of_rows(
    const float *x, const float *dy, const float *by, float *dx, float *sums, long batch, long count, long width,
    long apart, long at_once, float eps, int threads)
{
    struct rows all = {x, dy, by, dx, sums, batch, count, width, apart, at_once, eps};
    GOMP_parallel(rows_share, &all, threads, 0);
}
