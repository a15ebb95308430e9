/* What the attention of sampling and its gradient share. */

#include "products.h"

/* HEAD: values of a head, a multiple of PANEL. PANEL: queries at once. VECTOR_CASES: CASE of each number of vectors that
   queries may fill. */

#if VECTORS == 4
#define VECTOR_CASES CASE(1) CASE(2) CASE(3) CASE(4)
#else
#define VECTOR_CASES CASE(1) CASE(2)
#endif

typedef float quarter __attribute__((vector_size(16), aligned(4)));

/* The sum of all lanes, by halves. */
static inline float total(vec x)
{
    quarter part[LANES / 4];
    memcpy(part, &x, sizeof x);
    for (int half = LANES / 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
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
    float by[PANEL] = {0};
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
