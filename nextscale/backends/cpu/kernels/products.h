/* Products of a few rows and a panel of a matrix, on a CPU in float32: what all kernels are made of. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

/* LANES: values of a vector, 16 for AVX-512, 8 for AVX2, 4 for NEON. VECTORS: of them, columns at once, 2 or 4. ROWS at
   once: sums fill most of the 32 registers of AVX-512 and NEON, and of AVX2's 16. Not more than 12 rows: rows of 4 KiB
   all fall into one set of the first cache, which has 12 places. */
#if LANES == 4 && VECTORS == 4 || LANES == 8 && VECTORS == 2
#define ROWS 6
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#elif LANES == 16 && VECTORS == 4
#define ROWS 7
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#elif (LANES == 4 || LANES == 16) && VECTORS == 2
#define ROWS 12
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
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

/* Types of weights, all computed in float32. */
enum type { FLOAT32, BFLOAT16, FLOAT16 };

static inline long bytes_of(int type)
{
    return type == FLOAT32 ? 4 : 2;
}

/* 8 values of 16 bits: loaded, the first and the second halves of two of them interleaved, and as float32, exactly. */
#ifdef __aarch64__
typedef uint16x8_t halves;
#define LOAD_HALVES(from) vld1q_u16(from)
#define ZIP_FIRST(a, b) vzip1q_u16(a, b)
#define ZIP_SECOND(a, b) vzip2q_u16(a, b)

static inline float32x4_t four(uint16x4_t bits, int type)
{
    return type == FLOAT16 ? vcvt_f32_f16(vreinterpret_f16_u16(bits)) : vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}

static inline void store_wide(float *to, halves bits, int type)
{
    vst1q_f32(to, four(vget_low_u16(bits), type));
    vst1q_f32(to + 4, four(vget_high_u16(bits), type));
}
#else
typedef __m128i halves;
#define LOAD_HALVES(from) _mm_loadu_si128((const __m128i *)(from))
#define ZIP_FIRST(a, b) _mm_unpacklo_epi16(a, b)
#define ZIP_SECOND(a, b) _mm_unpackhi_epi16(a, b)

static inline void store_wide(float *to, halves bits, int type)
{
    const __m256 shifted = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    _mm256_storeu_ps(to, type == FLOAT16 ? _mm256_cvtph_ps(bits) : shifted);
}
#endif

/* `count` values from `from` on, a multiple of 8, as float32: where they lie if they are of it, else converted in
   `to`. */
static inline const float *widened(const void *weights, long from, long count, int type, float *to)
{
    const uint16_t *half = (const uint16_t *)weights + from;
    if (type == FLOAT32) return (const float *)weights + from;
    for (long i = 0; i < count; i += 8) store_wide(to + i, LOAD_HALVES(half + i), type);
    return to;
}

/* a where the lane's bits are set, b where they are not */
static inline vec choose(ints where, vec a, vec b)
{
    return (vec)(((ints)a & where) | ((ints)b & ~where));
}

/* The larger and the smaller of a and b, b where one of them is not a number. x86 has an instruction for that; NEON's
   gives NaN. */
#if LANES == 16
#define LARGER(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define SMALLER(a, b) ((vec)_mm512_min_ps((__m512)(a), (__m512)(b)))
#elif LANES == 8
#define LARGER(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define SMALLER(a, b) ((vec)_mm256_min_ps((__m256)(a), (__m256)(b)))
#else
#define LARGER(a, b) choose((a) > (b), a, b)
#define SMALLER(a, b) choose((a) < (b), a, b)
#endif

/* 2^t by its whole and broken part, for t from -126 to 126; that of the nearer end beyond them */
static inline vec power(vec t)
{
    const vec zero = {0};
    t = LARGER(zero - 126.0f, SMALLER(zero + 126.0f, t));
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

/* tanh-GELU as x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
static inline vec gelu(vec x)
{
    return x / (1.0f + power(-2.302208198f * (x + 0.044715f * x * x * x))); /* -2 sqrt(2/pi) log2(e) */
}

/* ---- products of many steps, a chunk of them after another */

#define STEPS 128 /* of a chunk: 32 KiB of a panel of 64, which the first cache holds beside the rows' values */
#define LINES (PANEL / 16) /* of 64 bytes, of a step in float32 */
#define TILE 56   /* rows: their hidden units, of 4,096 values, stay in the second cache */

/* `steps` steps of a block's products with a panel, of which `part` holds these steps, added to `sums` (rows, PANEL)
   unless they are the first */
static inline __attribute__((always_inline)) void chunk(
    const int rows, const int ahead, const float *const *a, const float *part, long from, long steps, float *sums,
    const char *next)
{
    const float *here[ROWS];
    float *to[ROWS];
    for (int r = 0; r < rows; r++) here[r] = a[r] + from, to[r] = sums + r * PANEL;
    products(rows, VECTORS, ahead, from > 0, here, 1, part, PANEL, steps, to, next);
}

#define CASE(n) case n: \
    switch (ahead) { \
    case 0: chunk(n, 0, a + first, part, from, steps, to, next); break; \
    case 1: chunk(n, 1, a + first, part, from, steps, to, next); break; \
    case 2: chunk(n, 2, a + first, part, from, steps, to, next); break; \
    default: chunk(n, LINES, a + first, part, from, steps, to, next); \
    } \
    break;

/* The part of sums (count, PANEL) = the rows a (count, depth) times a panel (depth, PANEL) that is of the steps `from` to
   `from + steps`, which `part` holds; earlier ones were added before. Meanwhile `lines` lines of 64 bytes for each step
   are fetched, from `later` on. */
static void chunk_products(
    const float *const *a, long count, const float *part, long from, long steps, int lines, const char *later,
    float *sums)
{
    const long blocks = (count + ROWS - 1) / ROWS;
    for (long b = 0; b < blocks; b++) {
        const long first = count * b / blocks;
        /* The blocks share in fetching. */
        const int each = blocks == 1 ? lines : blocks <= 3 && lines > 1 ? 2 : 1, ahead = b * each < lines ? each : 0;
        const char *next = later + b * each * steps * 64;
        float *to = sums + first * PANEL;
        switch (count * (b + 1) / blocks - first) { CASES }
    }
}
#undef CASE
