/* Chosen experts of one FFN on a CPU, float32: y[t] += W2_e act(W1_e x[t] + b1_e) for every chosen pair (t, e).

   A block of up to ROWS rows of one expert goes through both products before the next: its inputs are read where they
   lie (no gather), its hidden units stay in the first cache, and its outputs are added where they belong (no scatter).
   The expert's weights, 2 S D values, stay in the second cache while the rows of a tile pass. A row's sums run in one
   order whatever rows are beside it. Compiled by nextscale/dynamic/compiled.py. */

#include <stdint.h>
#include <string.h>

#ifndef VECTORS
#define VECTORS 4 /* of 16 outputs at once */
#endif
/* Sums fill most of AVX-512's 32 registers. Not more than 12 rows: rows of 4 KiB all fall into one set of the first
   cache, which has 12 places. */
#define ROWS (VECTORS == 4 ? 7 : 12)
#define LANES 16
#define PANEL (VECTORS * LANES)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

/* sums[r] = a[r] . panel, over `depth` steps; a[r] are rows anywhere, panel is (depth, PANEL). */
static inline __attribute__((always_inline)) void products(
    const int rows, const float *const *a, const float *panel, long depth, vec sums[][VECTORS])
{
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = (vec){0};
    for (long k = 0; k < depth; k++) {
        vec b[VECTORS];
        for (int v = 0; v < VECTORS; v++) b[v] = *(const vec *)(panel + k * PANEL + v * LANES);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] += a[r][k] * b[v];
    }
}

/* tanh-GELU as x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3); 2^t by its whole and broken part */
static inline float gelu(float x)
{
    float t = -2.302208198f * (x + 0.044715f * x * x * x); /* -2 sqrt(2/pi) log2(e) */
    t = t > 126.0f ? 126.0f : t < -126.0f ? -126.0f : t;
    float whole = (t + 12582912.0f) - 12582912.0f, part = (t - whole) * 0.693147181f;
    float power = 1.0f + part * (1.0f + part * (0.5f + part * (0.166666667f + part * (0.0416666667f
                  + part * (0.00833333333f + part * 0.00138888889f)))));
    union { int32_t i; float f; } scale = {((int32_t)whole + 127) << 23};
    return x / (1.0f + power * scale.f);
}

static inline __attribute__((always_inline)) void block(
    const int rows, const long *index, const float *x, float *y, const float *w1, const float *b1, const float *w2,
    long width, long size, int relu, float *hidden)
{
    const long padded = (size + PANEL - 1) / PANEL * PANEL;
    const float *from[ROWS];
    vec sums[ROWS][VECTORS];
    for (int r = 0; r < rows; r++) from[r] = x + index[r] * width;
    for (long j = 0; j < padded; j += PANEL) {
        products(rows, from, w1 + j * width, width, sums);
        for (int r = 0; r < rows; r++) {
            float *h = hidden + r * padded + j;
            memcpy(h, sums[r], sizeof sums[r]);
            for (int i = 0; i < PANEL; i++) {
                float value = h[i] + b1[j + i];
                h[i] = relu ? (value > 0 ? value : 0) : gelu(value);
            }
        }
    }
    for (int r = 0; r < rows; r++) from[r] = hidden + r * padded;
    for (long j = 0; j < width; j += PANEL) {
        if (j + PANEL < width)
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < VECTORS; v++) __builtin_prefetch(y + index[r] * width + j + PANEL + v * LANES, 1);
        products(rows, from, w2 + j * size, size, sums);
        const long left = width - j < PANEL ? width - j : PANEL;
        for (int r = 0; r < rows; r++) {
            float *to = y + index[r] * width + j, *sum = (float *)sums[r];
            if (left == PANEL) {
                for (int v = 0; v < VECTORS; v++) *(vec *)(to + v * LANES) += sums[r][v];
            } else {
                for (long i = 0; i < left; i++) to[i] += sum[i];
            }
        }
    }
}

#define CASE(n) case n: block(n, list, x, y, w1, b1, w2, width, size, relu, hidden); break;

/* Rows start to stop. chosen: (rows, experts) bytes. w1: per expert panels (padded / PANEL, width, PANEL); b1: per
   expert (padded); w2: per expert panels (width / PANEL rounded up, size, PANEL). Scratch: rows holds stop - start
   numbers, hidden ROWS * padded floats. */
void run_experts(
    const float *x, const uint8_t *chosen, float *y, const float *w1_all, const float *b1_all, const float *w2_all,
    long start, long stop, long experts, long width, long size, int relu, long *rows, float *hidden)
{
    const long padded = (size + PANEL - 1) / PANEL * PANEL, wide = (width + PANEL - 1) / PANEL * PANEL;
    for (long e = 0; e < experts; e++) {
        const float *w1 = w1_all + e * padded * width, *b1 = b1_all + e * padded, *w2 = w2_all + e * wide * size;
        long count = 0;
        for (long t = start; t < stop; t++)
            if (chosen[t * experts + e]) rows[count++] = t;
        const long blocks = (count + ROWS - 1) / ROWS;
        for (long b = 0; b < blocks; b++) { /* of nearly equal size */
            const long first = count * b / blocks, *list = rows + first;
            switch (count * (b + 1) / blocks - first) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#if VECTORS < 4
                CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
            }
        }
    }
}
