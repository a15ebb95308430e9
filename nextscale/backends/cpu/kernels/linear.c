/* Linear layers on a CPU with weights of 16 bits, computed in float32. Compiled by nextscale/backends/cpu/kernels/compilation.py.

   A weight is read as it lies, from memory once for LAYER_ROWS rows, and some values of it at a time are converted to a panel
   in the first cache. A row's sums run in one order whatever rows are beside it and whatever threads there are. */

#include "products.h"

#define LAYER_ROWS 224 /* at once: with 56, as of experts, converting the weight takes a tenth of the time */

/* 8 values from `from` on of each of 8 rows, as 8 times 8 float32 values that lie PANEL apart. Three times the first and
   the second half of the rows are interleaved: each time a value's number, row and column in bits, turns by one bit. */
static inline void turned(const uint16_t *const *rows, long from, int type, float *to)
{
    halves now[8], next[8];
    for (int i = 0; i < 8; i++) now[i] = LOAD_HALVES(rows[i] + from);
    for (int turn = 0; turn < 3; turn++) {
        for (int i = 0; i < 4; i++) {
            next[2 * i] = ZIP_FIRST(now[i], now[i + 4]);
            next[2 * i + 1] = ZIP_SECOND(now[i], now[i + 4]);
        }
        memcpy(now, next, sizeof now);
    }
    for (int i = 0; i < 8; i++) store_wide(to + i * PANEL, now[i], type);
}

/* `steps` values from `from` on of PANEL rows as a panel (steps, PANEL). What comes `ahead` values later is fetched. */
static void panel_of(const uint16_t *const *rows, long from, long steps, long ahead, int type, float *to)
{
    for (long j = 0; j < PANEL; j += 8) {
        long i = 0;
        for (; i + 8 <= steps; i += 8) {
            for (int r = 0; r < 8 && i % 32 == 0; r++) __builtin_prefetch(rows[j + r] + from + i + ahead, 0, 2);
            turned(rows + j, from + i, type, to + i * PANEL + j);
        }
        for (; i < steps; i++) {
            uint16_t column[8];
            for (int r = 0; r < 8; r++) column[r] = rows[j + r][from + i];
            store_wide(to + i * PANEL + j, LOAD_HALVES(column), type);
        }
    }
}

struct layer {
    const float *x;
    const uint16_t *weight;
    const float *bias;
    float *y;
    long rows, depth, outputs, apart;
    int gelu, type;
    float *sums;
};

/* Outputs `p * PANEL` on of the rows `start` to `start + count`. */
static void panel_of_layer(const struct layer *all, long start, long count, long p, float *sums)
{
    const long depth = all->depth, first = p * PANEL, left = all->outputs - first < PANEL ? all->outputs - first : PANEL;
    const uint16_t *rows[PANEL];
    const float *from[LAYER_ROWS];
    float part[STEPS * PANEL], bias[PANEL] = {0};
    for (long i = 0; i < PANEL; i++) rows[i] = all->weight + (first + (i < left ? i : left - 1)) * all->apart;
    for (long r = 0; r < count; r++) from[r] = all->x + (start + r) * depth;
    for (long k = 0; k < depth; k += STEPS) {
        const long steps = depth - k < STEPS ? depth - k : STEPS;
        panel_of(rows, k, steps, k + STEPS < depth ? STEPS : PANEL * all->apart - k, all->type, part);
        chunk_products(from, count, part, k, steps, 0, 0, sums);
    }
    if (all->bias) memcpy(bias, all->bias + first, left * sizeof *bias);
    for (long r = 0; r < count; r++) {
        float *to = sums + r * PANEL;
        for (int i = 0; i < PANEL; i += LANES) {
            const vec value = *(const vec *)(to + i) + *(const vec *)(bias + i);
            *(vec *)(to + i) = all->gelu ? gelu(value) : value;
        }
        memcpy(all->y + (start + r) * all->outputs + first, to, left * sizeof *to);
    }
}

static void layer_share(void *arguments)
{
    const struct layer *all = arguments;
    float *sums = all->sums + omp_get_thread_num() * LAYER_ROWS * PANEL;
    long stop;
    for (long start = 0; start < all->rows; start += LAYER_ROWS) {
        const long count = all->rows - start < LAYER_ROWS ? all->rows - start : LAYER_ROWS;
        for (long p = share((all->outputs + PANEL - 1) / PANEL, &stop); p < stop; p++)
            panel_of_layer(all, start, count, p, sums);
    }
}

/* y (rows, outputs) = x (rows, depth) times weight (outputs, depth) transposed, plus a bias if there is one, then
   tanh-GELU if so asked. Weight: of a `type` of 16 bits, its rows `apart` values from one to the next. Scratch: sums
   (threads, LAYER_ROWS, PANEL). A thread has its part of the panels. */
void multiply(
    const float *x, const void *weight, const float *bias, float *y, long rows, long depth, long outputs, long apart,
    int gelu, int type, int threads, float *sums)
{
    struct layer all = {x, weight, bias, y, rows, depth, outputs, apart, gelu, type, sums};
    GOMP_parallel(layer_share, &all, threads, 0);
}
