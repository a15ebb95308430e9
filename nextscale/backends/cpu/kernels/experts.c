/* Feed-forward experts on a CPU, computed in float32. Compiled by nextscale/backends/cpu/kernels/compilation.py.

   Weights of experts are float32, or of 16 bits and converted where they are used: once for all rows at hand.

   run_slices: y[t] = b2 + the sum over chosen experts e of W2_e act(W1_e x[t] + b1_e), experts being slices of one FFN.
   A block of up to ROWS rows of one expert goes through both products before the next: its inputs are read where they
   lie (no gather), its hidden units stay in the first cache, and its outputs are added where they belong (no scatter).
   The expert's weights, 2 S D values, stay in the second cache while the rows of a tile pass.

   choose_slices: which pairs are chosen, from the norms of the slices' outputs that a router predicts.

   run_experts: y[t] += g (W2_e gelu(W1_e x[t] + b1_e) + b2_e), experts being whole FFNs, whose weights fit no cache.
   They are read once for a tile of rows, and while the rows of one chunk of a panel are multiplied the next is fetched:
   memory and arithmetic work at the same time, which they do not in a product of few rows otherwise.

   In all of them a row's sums run in one order whatever rows are beside it and whatever threads there are. */

#include "products.h"

typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

/* One expert on a block of rows. `later`: those of a block to come, whose inputs are fetched. */
static inline __attribute__((always_inline)) void block(
    const int rows, const long *index, const float *x, float *y, const float *w1, const float *b1, const float *w2,
    long width, long size, int relu, const long *later, float *hidden)
{
    const long padded = PADDED(size);
    const float *from[ROWS];
    float *to[ROWS], part[ROWS][PANEL];
    for (int r = 0; r < rows; r++) from[r] = x + index[r] * width, to[r] = hidden + r * padded;
    for (long j = 0; j < padded; j += PANEL) {
        products(rows, VECTORS, 0, 0, from, 1, w1 + j * width, PANEL, width, to, 0);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < PANEL; i += LANES) {
                const vec value = *(const vec *)(to[r] + i) + *(const vec *)(b1 + j + i), zero = {0};
                *(vec *)(to[r] + i) = relu ? LARGER(value, zero) : gelu(value);
            }
        advance(rows, to);
    }
    for (int r = 0; r < rows; r++) from[r] = hidden + r * padded, to[r] = y + index[r] * width;
    for (long j = 0; j < width; j += PANEL) {
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) {
                if (j + PANEL < width) __builtin_prefetch(to[r] + PANEL + v * LANES, 1);
                __builtin_prefetch(x + later[r] * width + j + v * LANES);
            }
        if (j + PANEL <= width) {
            products(rows, VECTORS, 0, 1, from, 1, w2 + j * size, PANEL, size, to, 0);
            advance(rows, to);
        } else {
            float *parts[ROWS];
            for (int r = 0; r < rows; r++) parts[r] = memcpy(part[r], to[r], (width - j) * sizeof *y);
            products(rows, VECTORS, 0, 1, from, 1, w2 + j * size, PANEL, size, parts, 0);
            for (int r = 0; r < rows; r++) memcpy(to[r], part[r], (width - j) * sizeof *y);
        }
    }
}

#define CASE(n) case n: block(n, list, x, y, w1, b1, w2, width, size, relu, later, hidden); break;

/* The rows start to stop of all experts. */
static void tile_of_slices(
    const float *x, const uint8_t *chosen, float *y, const void *w1_all, const float *b1_all, const void *w2_all,
    const float *b2, long start, long stop, long experts, long width, long size, int relu, int type, long *rows,
    float *hidden)
{
    const long padded = PADDED(size), wide = PADDED(width);
    float *converted = hidden + ROWS * padded;
    for (long t = start; t < stop; t++) memcpy(y + t * width, b2, width * sizeof *y);
    for (long e = 0; e < experts; e++) {
        const float *b1 = b1_all + e * padded;
        long count = 0;
        for (long t = start; t < stop; t++) { /* without a branch, which would be foretold wrongly */
            rows[count] = t;
            count += chosen[t * experts + e];
        }
        if (!count) continue;
        const float *w1 = widened(w1_all, e * padded * width, padded * width, type, converted);
        const float *w2 = widened(w2_all, e * wide * size, wide * size, type, converted + padded * width);
        const long blocks = (count + ROWS - 1) / ROWS;
        for (long b = 0; b < blocks; b++) { /* of nearly equal size */
            const long first = count * b / blocks, many = count * (b + 1) / blocks - first;
            const long *list = rows + first, *later = first + 2 * many <= count ? list + many : list;
            switch (many) {
                CASES
            }
        }
    }
}
#undef CASE

struct slices {
    const float *x;
    const uint8_t *chosen;
    float *y;
    const void *w1;
    const float *b1;
    const void *w2;
    const float *b2;
    long rows, tile, experts, width, size;
    int relu, type;
    long *indices;
    float *hidden;
    long per_thread; /* values of `hidden` for each thread */
    long next; /* row that no thread has taken */
};

static void slices_share(void *arguments)
{
    struct slices *all = arguments;
    float *hidden = all->hidden + omp_get_thread_num() * all->per_thread;
    long start;
    while ((start = __atomic_fetch_add(&all->next, all->tile, __ATOMIC_RELAXED)) < all->rows) {
        const long stop = start + all->tile < all->rows ? start + all->tile : all->rows;
        tile_of_slices(all->x, all->chosen, all->y, all->w1, all->b1, all->w2, all->b2, start, stop, all->experts,
                       all->width, all->size, all->relu, all->type, all->indices + start, hidden);
    }
}

/* `rows` (T, D) inputs, a tile of them after another. chosen: (T, experts) bytes. w1: per expert panels (padded /
   PANEL, width, PANEL); b1: per expert (padded); w2: per expert panels (width / PANEL rounded up, size, PANEL); b2:
   (width). w1 and w2 are of `type`. Scratch: indices (T), hidden (threads, per_thread): ROWS rows of padded values and, unless
   `type` is FLOAT32, the weights of one expert. */
void run_slices(
    const float *x, const uint8_t *chosen, float *y, const void *w1, const float *b1, const void *w2, const float *b2,
    long rows, long tile, long experts, long width, long size, int relu, int type, int threads, long per_thread,
    long *indices, float *hidden)
{
    struct slices all = {x, chosen, y, w1, b1, w2, b2, rows, tile, experts, width, size, relu, type, indices, hidden,
                         per_thread, 0};
    GOMP_parallel(slices_share, &all, threads, 0);
}

/* ---- which slices run */

static inline int32_t bits_of(float number)
{
    int32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static inline float number_of(int32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* chosen (experts): where |norm| >= least max |norm|. `wide` norms, those after `experts` are 0. */
static inline void at_least(const float *norm, long wide, long experts, float least, uint8_t *chosen)
{
    ints largest = {0}; /* without their signs, numbers and their bits are in one order */
    int32_t most = 0, bound;
    uint8_t found[wide];
    for (long e = 0; e < wide; e += LANES) {
        const ints p = *(const ints *)(norm + e) & INT32_MAX, more = p > largest;
        largest = (p & more) | (largest & ~more);
    }
    for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
    bound = bits_of(least * number_of(most));
    for (long e = 0; e < wide; e += LANES) {
        const ints enough = (*(const ints *)(norm + e) & INT32_MAX) >= bound;
        *(bytes *)(found + e) = __builtin_convertvector(enough, bytes) & 1;
    }
    memcpy(chosen, found, experts);
}

static inline __attribute__((always_inline)) void predicted(
    const int rows, const float *x, uint8_t *chosen, const float *w1, const float *w2, long experts, long width,
    long hidden, float least, float *scratch)
{
    const long padded = PADDED(hidden), wide = PADDED(experts);
    float *norm = scratch + ROWS * padded;
    const float *from[ROWS];
    float *to[ROWS];
    for (int r = 0; r < rows; r++) from[r] = x + r * width, to[r] = scratch + r * padded;
    for (long j = 0; j < padded; j += PANEL) {
        products(rows, VECTORS, 0, 0, from, 1, w1 + j * width, PANEL, width, to, 0);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < PANEL; i += LANES) *(vec *)(to[r] + i) = gelu(*(const vec *)(to[r] + i));
        advance(rows, to);
    }
    for (int r = 0; r < rows; r++) from[r] = scratch + r * padded, to[r] = norm + r * wide;
    for (long j = 0; j < wide; j += PANEL) {
        products(rows, VECTORS, 0, 0, from, 1, w2 + j * hidden, PANEL, hidden, to, 0);
        advance(rows, to);
    }
    for (int r = 0; r < rows; r++) at_least(norm + r * wide, wide, experts, least, chosen + r * experts);
}

struct choice {
    const float *x;
    uint8_t *chosen;
    const float *w1, *w2;
    long rows, experts, width, hidden;
    float least, *scratch;
};

#define CASE(n) \
    case n: predicted(n, all->x + t * width, all->chosen + t * experts, all->w1, all->w2, experts, width, hidden, \
                      all->least, mine); break;

static void choose_share(void *arguments)
{
    const struct choice *all = arguments;
    const long rows = all->rows, experts = all->experts, width = all->width, hidden = all->hidden;
    float *mine = all->scratch + omp_get_thread_num() * ROWS * (PADDED(hidden) + PADDED(experts));
    long stop;
    for (long block = share((rows + ROWS - 1) / ROWS, &stop); block < stop; block++) {
        const long t = block * ROWS;
        switch (rows - t < ROWS ? rows - t : ROWS) {
            CASES
        }
    }
}
#undef CASE

/* chosen (rows, experts): where p >= least max p, p = |W2 gelu(W1 x)|. w1: panels (padded / PANEL, width, PANEL); w2:
   panels (experts / PANEL rounded up, hidden, PANEL). Scratch: (threads, ROWS, padded + experts rounded up). */
void choose_slices(
    const float *x, uint8_t *chosen, const float *w1, const float *w2, long rows, long experts, long width, long hidden,
    float least, int threads, float *scratch)
{
    struct choice all = {x, chosen, w1, w2, rows, experts, width, hidden, least, scratch};
    GOMP_parallel(choose_share, &all, threads, 0);
}

/* ---- whole FFNs */

/* sums (count, PANEL) = the rows a (count, depth) times panel `p` (depth, PANEL) of `panels` */
static void panel_product(
    const float *const *a, long count, const void *panels, long p, long depth, int type, float *sums)
{
    const long size = bytes_of(type);
    const int lines = PANEL * size > 64 ? PANEL * size / 64 : 1;
    float converted[STEPS * PANEL];
    for (long from = 0; from < depth; from += STEPS) {
        const long steps = depth - from < STEPS ? depth - from : STEPS, place = (p * depth + from) * PANEL;
        const float *part = widened(panels, place, steps * PANEL, type, converted);
        const char *later = (const char *)panels + (place + STEPS * PANEL) * size;
        chunk_products(a, count, part, from, steps, lines, later, sums);
    }
}

struct experts {
    const float *x;
    const long *rows;
    const float *gates;
    const int32_t *ends;
    float *y;
    const void *w1;
    const float *b1;
    const void *w2;
    const float *b2;
    long experts, width, size;
    int type;
    float *hidden, *sums;
};

/* This thread's part of the panels of expert `e`, for its pairs `start` to `start + count`. */
static void tile_of_expert(const struct experts *all, long e, long start, long count, float *hidden, float *sums)
{
    const long width = all->width, size = all->size, padded = PADDED(size), wide = PADDED(width);
    const long panels = padded / PANEL, outputs = wide / PANEL;
    const float *b1 = all->b1 + e * padded, *b2 = all->b2 + e * width, *from[TILE];
    const long *rows = all->rows + start;
    long stop;
    for (long r = 0; r < count; r++) from[r] = all->x + rows[r] * width;
    for (long p = share(panels, &stop); p < stop; p++) {
        panel_product(from, count, all->w1, e * panels + p, width, all->type, sums);
        for (long r = 0; r < count; r++)
            for (long i = 0; i < PANEL; i += LANES)
                *(vec *)(hidden + r * padded + p * PANEL + i)
                    = gelu(*(const vec *)(sums + r * PANEL + i) + *(const vec *)(b1 + p * PANEL + i));
    }
    GOMP_barrier();
    for (long r = 0; r < count; r++) from[r] = hidden + r * padded;
    for (long p = share(outputs, &stop); p < stop; p++) {
        const long left = width - p * PANEL < PANEL ? width - p * PANEL : PANEL;
        panel_product(from, count, all->w2, e * outputs + p, size, all->type, sums);
        for (long r = 0; r < count; r++) {
            float *to = all->y + rows[r] * width + p * PANEL;
            for (long i = 0; i < left; i++) to[i] += all->gates[start + r] * (sums[r * PANEL + i] + b2[p * PANEL + i]);
        }
    }
}

static void experts_share(void *arguments)
{
    const struct experts *all = arguments;
    float *sums = all->sums + omp_get_thread_num() * TILE * PANEL;
    long turn = 0; /* others may still read the last hidden units */
    for (long e = 0; e < all->experts; e++)
        for (long start = e ? all->ends[e - 1] : 0; start < all->ends[e]; start += TILE) {
            const long count = all->ends[e] - start < TILE ? all->ends[e] - start : TILE;
            tile_of_expert(all, e, start, count, all->hidden + (turn++ % 2) * TILE * PADDED(all->size), sums);
        }
}

/* rows: of all pairs of row and expert, sorted by expert; ends: where each expert's end. Weights as in run_slices, b2
   (experts, width). Scratch: hidden (2, TILE, padded), sums (threads, TILE, PANEL). A thread has its part of the
   panels. */
void run_experts(
    const float *x, const long *rows, const float *gates, const int32_t *ends, float *y,
    const void *w1, const float *b1, const void *w2, const float *b2,
    long experts, long width, long size, int type, int threads, float *hidden, float *sums)
{
    struct experts all = {x, rows, gates, ends, y, w1, b1, w2, b2, experts, width, size, type, hidden, sums};
    GOMP_parallel(experts_share, &all, threads, 0);
}
