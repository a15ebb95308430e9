/* Products of a few rows and a panel of a matrix, on a CPU in float32: what all kernels are made of. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* LANES: values of a vector, 16 for AVX-512 and 8 for AVX2. VECTORS: of them, columns at once, 2 or 4. ROWS at once:
   sums fill most of the 32 registers of AVX-512 and of AVX2's 16. Not more than 12 rows: rows of 4 KiB all fall into
   one set of the first cache, which has 12 places. */
#if LANES == 16 && VECTORS == 4
#define ROWS 7
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#elif LANES == 16 && VECTORS == 2
#define ROWS 12
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#elif LANES == 8 && VECTORS == 2
#define ROWS 6
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#else
#error "no kernels for these LANES and VECTORS"
#endif
#define PANEL (VECTORS * LANES)
#define PADDED(n) (((n) + PANEL - 1) / PANEL * PANEL)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Threads come from the OpenMP library that torch has loaded, called as gcc's compiled code does: a compiler's own would
   start others beside them, and clang often has none. */
void GOMP_parallel(void (*work)(void *), void *arguments, unsigned threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* This thread's share of `all` items: from what is returned to `stop`. */
static inline long share(long all, long *stop)
{
    const long me = omp_get_thread_num(), threads = omp_get_num_threads();
    *stop = all * (me + 1) / threads;
    return all * me / threads;
}

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

/* a where the lane's bits are set, b where they are not */
static inline vec choose(ints where, vec a, vec b)
{
    return (vec)(((ints)a & where) | ((ints)b & ~where));
}

/* 2^t by its whole and broken part, for t from -126 to 126; that of the nearer end beyond them */
static inline vec power(vec t)
{
    const vec zero = {0};
    t = choose(t > 126.0f, zero + 126.0f, t);
    t = choose(t < -126.0f, zero - 126.0f, t);
    const vec whole = (t + 12582912.0f) - 12582912.0f, part = (t - whole) * 0.693147181f;
    const vec broken = 1.0f + part * (1.0f + part * (0.5f + part * (0.166666667f + part * (0.0416666667f
                       + part * (0.00833333333f + part * 0.00138888889f)))));
    return broken * (vec)((__builtin_convertvector(whole, ints) + 127) << 23);
}

/* Each of `rows` places one panel on. */
static inline __attribute__((always_inline)) void advance(const int rows, float **to)
{
    for (int r = 0; r < rows; r++) to[r] += PANEL;
}
