/* Products of a few rows and a panel of a matrix, on a CPU in float32: what all kernels are made of. */

#include <omp.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef VECTORS
#define VECTORS 4 /* of 16 columns at once */
#endif
/* Sums fill most of AVX-512's 32 registers. Not more than 12 rows: rows of 4 KiB all fall into one set of the first
   cache, which has 12 places. */
#if VECTORS == 4
#define ROWS 7
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#else
#define ROWS 12
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#define LANES 16
#define PANEL (VECTORS * LANES)
#define PADDED(n) (((n) + PANEL - 1) / PANEL * PANEL)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define AT(r) AT_(r, 0) AT_(r, 1) AT_(r, 2) AT_(r, 3)
#define EVERYWHERE AT(0) AT(1) AT(2) AT(3) AT(4) AT(5) AT(6) AT(7) AT(8) AT(9) AT(10) AT(11)

/* to[r] = a[r] . panel, added to what is there if `add`, over `steps` steps of `a_step` and `panel_step` values; with
   each step `ahead` lines of 64 bytes from `next` on are fetched. `rows`, `vectors` and `ahead` are constants. Sums are
   variables, not an array, which compilers would keep in memory between loops. */
static inline __attribute__((always_inline)) void products(
    const int rows, const int vectors, const int ahead, const int add, const float *const *a, const long a_step,
    const float *panel, const long panel_step, long steps, float *const *to, const char *next)
{
#define AT_(r, v) vec s##r##_##v = {0};
    EVERYWHERE
#undef AT_
    if (add) {
#define AT_(r, v) if (r < rows && v < vectors) s##r##_##v = *(const vec *)(to[r] + v * LANES);
        EVERYWHERE
#undef AT_
    }
    for (long k = 0; k < steps; k++) {
        const vec zero = {0}, b0 = *(const vec *)(panel + k * panel_step);
        const vec b1 = vectors > 1 ? *(const vec *)(panel + k * panel_step + LANES) : zero;
        const vec b2 = vectors > 2 ? *(const vec *)(panel + k * panel_step + 2 * LANES) : zero;
        const vec b3 = vectors > 3 ? *(const vec *)(panel + k * panel_step + 3 * LANES) : zero;
        for (int i = 0; i < ahead; i++, next += 64) __builtin_prefetch(next, 0, 2);
#define AT_(r, v) if (r < rows && v < vectors) s##r##_##v += a[r][k * a_step] * b##v;
        EVERYWHERE
#undef AT_
    }
#define AT_(r, v) if (r < rows && v < vectors) *(vec *)(to[r] + v * LANES) = s##r##_##v;
    EVERYWHERE
#undef AT_
}

/* 2^t by its whole and broken part, for t from -126 to 126; that of the nearer end beyond them */
static inline float power(float t)
{
    t = t > 126.0f ? 126.0f : t < -126.0f ? -126.0f : t;
    float whole = (t + 12582912.0f) - 12582912.0f, part = (t - whole) * 0.693147181f;
    float broken = 1.0f + part * (1.0f + part * (0.5f + part * (0.166666667f + part * (0.0416666667f
                   + part * (0.00833333333f + part * 0.00138888889f)))));
    union { int32_t i; float f; } scale = {((int32_t)whole + 127) << 23};
    return broken * scale.f;
}

/* Each of `rows` places one panel on. */
static inline __attribute__((always_inline)) void advance(const int rows, float **to)
{
    for (int r = 0; r < rows; r++) to[r] += PANEL;
}
