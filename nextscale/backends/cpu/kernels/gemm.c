/* The general matrix product (GEMM) in float32, for the gradients of linear layers. Compiled by
   nextscale/backends/cpu/kernels/compilation.py.

   As in BLIS (Van Zee and van de Geijn, 2015): both operands are copied to where the micro-kernel reads them in order,
   one for all threads and the other for each, so that neither needs to be transposed before. ROWS rows of `a`, DEPTH
   steps deep, stay in the first cache while they are multiplied by COLUMNS columns of `b`, which stay in the second.

   A value's sum runs in one order whatever rows are beside it and whatever threads there are. */

#include "products.h"

#define DEPTH 384
#define COLUMNS (8 * PANEL)

struct gemm {
    const float *a, *b;
    float *c;
    long a_row, a_step, b_step, rows, columns, depth;
    float *a_packed, *b_packed;
};

/* Steps `from` to `from + steps` of ROWS rows, or the `count` that are left, as (steps, ROWS). */
static void pack_rows(const struct gemm *all, long row, long count, long from, long steps, float *to)
{
    const float *a = all->a + row * all->a_row + from * all->a_step;
    if (all->a_row == 1) {
        for (long k = 0; k < steps; k++) memcpy(to + k * ROWS, a + k * all->a_step, count * sizeof *a);
        return;
    }
    for (long r = 0; r < count; r++)
        for (long k = 0; k < steps; k++) to[k * ROWS + r] = a[r * all->a_row + k * all->a_step];
}

/* Steps `from` to `from + steps` of PANEL columns, or the `count` that are left, then zeros, as (steps, PANEL). */
static void pack_columns(const struct gemm *all, long column, long count, long from, long steps, float *to)
{
    const float *b = all->b + from * all->b_step + column;
    for (long k = 0; k < steps; k++, b += all->b_step, to += PANEL) {
        if (count < PANEL) memset(to, 0, PANEL * sizeof *to);
        memcpy(to, b, (count < PANEL ? count : PANEL) * sizeof *to);
    }
}

static inline __attribute__((always_inline)) void micro_kernel(
    const int rows, const float *a, const float *b, long steps, int add, float *c, long c_row, long count)
{
    const float *from[ROWS];
    float *to[ROWS], part[ROWS][PANEL];
    const int whole = count >= PANEL;
    for (int r = 0; r < rows; r++) {
        from[r] = a + r, to[r] = c + r * c_row;
        for (int v = 0; v < VECTORS; v++) __builtin_prefetch(to[r] + v * LANES, 1);
    }
    if (whole) {
        products(rows, VECTORS, 0, add, from, ROWS, b, PANEL, steps, to, 0);
        return;
    }
    for (int r = 0; r < rows; r++) memcpy(part[r], to[r], count * sizeof *c), to[r] = part[r];
    products(rows, VECTORS, 0, add, from, ROWS, b, PANEL, steps, to, 0);
    for (int r = 0; r < rows; r++) memcpy(c + r * c_row, part[r], count * sizeof *c);
}

#define CASE(n) case n: micro_kernel(n, a, b + j * steps, steps, from > 0, to + j, all->columns, count - j); break;

/* Columns `column` to `column + count` of all rows, of the packed steps. */
static void some_columns(const struct gemm *all, long column, long count, long from, long steps, float *b)
{
    for (long j = 0; j < count; j += PANEL) pack_columns(all, column + j, count - j, from, steps, b + j * steps);
    for (long row = 0; row < all->rows; row += ROWS) {
        const float *a = all->a_packed + row * steps;
        float *to = all->c + row * all->columns + column;
        const long left = all->rows - row;
        for (long j = 0; j < count; j += PANEL) switch (left < ROWS ? left : ROWS) { CASES }
    }
}
#undef CASE

static void gemm_share(void *arguments)
{
    const struct gemm *all = arguments;
    const long panels = (all->columns + PANEL - 1) / PANEL, blocks = (all->rows + ROWS - 1) / ROWS;
    float *b = all->b_packed + omp_get_thread_num() * COLUMNS * DEPTH;
    long row_stop, stop;
    const long row_start = share(blocks, &row_stop), start = share(panels, &stop);
    const long parts = (stop - start + COLUMNS / PANEL - 1) / (COLUMNS / PANEL);
    for (long from = 0; from < all->depth; from += DEPTH) {
        const long steps = all->depth - from < DEPTH ? all->depth - from : DEPTH;
        if (from) GOMP_barrier(); /* others may still read the rows of the steps before */
        for (long i = row_start; i < row_stop; i++) {
            const long left = all->rows - i * ROWS;
            pack_rows(all, i * ROWS, left < ROWS ? left : ROWS, from, steps, all->a_packed + i * ROWS * steps);
        }
        GOMP_barrier();
        for (long p = 0; p < parts; p++) { /* of nearly equal size */
            const long first = (start + (stop - start) * p / parts) * PANEL;
            const long last = (start + (stop - start) * (p + 1) / parts) * PANEL;
            some_columns(all, first, (last < all->columns ? last : all->columns) - first, from, steps, b);
        }
    }
}

/* c = a b: c (rows, columns), a (rows, depth) with values `a_row` and `a_step` apart from one row and step to the next,
   b (depth, columns) with rows `b_step` apart. Scratch: a_packed (rows rounded up to ROWS, DEPTH), b_packed (threads,
   COLUMNS, DEPTH). */
void gemm(
    const float *a, const float *b, float *c, long a_row, long a_step, long b_step, long rows, long columns, long depth,
    int threads, float *a_packed, float *b_packed)
{
    struct gemm all = {a, b, c, a_row, a_step, b_step, rows, columns, depth, a_packed, b_packed};
    GOMP_parallel(gemm_share, &all, threads, 0);
}
