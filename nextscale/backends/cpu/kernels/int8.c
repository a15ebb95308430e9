/* What linear layers in 8 bits do beside their products, which are oneDNN's. Compiled by
   nextscale/backends/cpu/kernels/compilation.py; the arithmetic is that of nextscale/transformer/int8.py.

   quantise: rows of floats as bytes, each between its smallest and its largest value.

   finish: from sums of integers to the layer's output, with tanh-GELU if so asked; finish_and_quantise: on to the bytes
   that the next layer takes, a row while it is in the first cache.

   A row does not depend on the rows beside it.

   quantise_map: the map of one image, in float32 or bfloat16, as bytes with one scale and one zero (the decoder's
   convolutions, nextscale/tokenizer/int8.py). */

#include "products.h"

typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

/* `count` values from `from` on, at most LANES, the rest filled up with the first one. */
static inline vec take(const float *from, long count)
{
    if (count >= LANES) return *(const vec *)from;
    vec some = {0};
    some += from[0];
    memcpy(&some, from, count * sizeof *from);
    return some;
}

/* A row as bytes from 0 to `levels`, and x = low + scale u. A value that is not finite makes the scale NaN. */
static inline void quantise_row(const float *x, long width, int levels, uint8_t *to, float *scale, float *low)
{
    const vec first = take(x, width);
    vec least = first, most = first, poison = {0};
    for (long j = 0; j < width; j += LANES) {
        const vec value = take(x + j, width - j);
        least = SMALLER(value, least);
        most = LARGER(value, most);
        poison += value * 0.0f;
    }
    float small = least[0], large = most[0], spoiled = poison[0];
    for (int i = 1; i < LANES; i++) {
        small = least[i] < small ? least[i] : small;
        large = most[i] > large ? most[i] : large;
        spoiled += poison[i];
    }
    const float range = large - small, by = range > 0.0f ? levels / range : 0.0f;
    *scale = range / levels + spoiled;
    *low = small;
    for (long j = 0; j < width; j += LANES) {
        /* To the nearest integer, the low byte of the sum's bits. */
        const vec sum = (take(x + j, width - j) - small) * by + 12582912.0f;
        const bytes u = __builtin_convertvector((ints)sum & 255, bytes);
        memcpy(to + j, &u, width - j < LANES ? width - j : LANES);
    }
}

struct rows {
    const float *x, *scales, *lows, *sums, *bias;
    float *y;
    uint8_t *bytes;
    float *new_scales, *new_lows;
    long count, width;
    int levels, gelu;
};

/* A row of y = scale x + low sums + bias, then tanh-GELU if so asked. */
static inline void finish_row(const struct rows *all, long r, float *y)
{
    const float *x = all->x + r * all->width, scale = all->scales[r], low = all->lows[r];
    for (long j = 0; j < all->width; j += LANES) {
        const long left = all->width - j;
        vec value = take(x + j, left) * scale + take(all->sums + j, left) * low;
        if (all->bias) value += take(all->bias + j, left);
        if (all->gelu) value = gelu(value);
        memcpy(y + j, &value, (left < LANES ? left : LANES) * sizeof *y);
    }
}

static void quantise_share(void *arguments)
{
    const struct rows *all = arguments;
    long stop;
    for (long r = share(all->count, &stop); r < stop; r++)
        quantise_row(all->x + r * all->width, all->width, all->levels, all->bytes + r * all->width,
                     all->new_scales + r, all->new_lows + r);
}

static void finish_share(void *arguments)
{
    const struct rows *all = arguments;
    long stop;
    for (long r = share(all->count, &stop); r < stop; r++) {
        float *y = all->y + r * all->width;
        finish_row(all, r, y);
        if (all->bytes)
            quantise_row(y, all->width, all->levels, all->bytes + r * all->width, all->new_scales + r,
                         all->new_lows + r);
    }
}

/* x (count, width) as bytes (count, width), with a scale and a lowest value for each row. */
void quantise(
    const float *x, uint8_t *bytes, float *scales, float *lows, long count, long width, int levels, int threads)
{
    struct rows all = {.x = x, .bytes = bytes, .new_scales = scales, .new_lows = lows, .count = count, .width = width,
                       .levels = levels};
    GOMP_parallel(quantise_share, &all, threads, 0);
}

/* y = scales x + lows sums + bias: x and y (count, width), which may be one, scales and lows (count), sums and bias
   (width), which may be missing; then tanh-GELU if so asked. */
void finish(
    const float *x, const float *scales, const float *lows, const float *sums, const float *bias, float *y, long count,
    long width, int gelu, int threads)
{
    struct rows all = {.x = x, .scales = scales, .lows = lows, .sums = sums, .bias = bias, .y = y, .count = count,
                       .width = width, .gelu = gelu};
    GOMP_parallel(finish_share, &all, threads, 0);
}

/* As `finish` in place of x, with tanh-GELU, then `quantise`. */
void finish_and_quantise(
    float *x, const float *scales, const float *lows, const float *sums, const float *bias, uint8_t *bytes,
    float *new_scales, float *new_lows, long count, long width, int levels, int threads)
{
    struct rows all = {.x = x, .scales = scales, .lows = lows, .sums = sums, .bias = bias, .y = x, .bytes = bytes,
                       .new_scales = new_scales, .new_lows = new_lows, .count = count, .width = width,
                       .levels = levels, .gelu = 1};
    GOMP_parallel(finish_share, &all, threads, 0);
}

typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct map {
    const void *x;
    uint8_t *bytes;
    long count;
    float by, zero;
    int bfloat16;
};

/* Values of x as bytes: round(x by) + zero, from 0 to 255. */
static inline void quantise_values(const struct map *map, long from, uint8_t *to)
{
    vec value;
    if (map->bfloat16)
        value = (vec)(__builtin_convertvector(*(const shorts *)((const uint16_t *)map->x + from), ints) << 16);
    else
        value = *(const vec *)((const float *)map->x + from);
    const vec least = {0}, most = least + 255.0f;
    value = value * map->by + 12582912.0f - 12582912.0f + map->zero;
    value = LARGER(least, value);
    value = SMALLER(most, value);
    const bytes u = __builtin_convertvector(__builtin_convertvector(value, ints), bytes);
    memcpy(to + from, &u, LANES);
}

static void quantise_map_share(void *arguments)
{
    const struct map *map = arguments;
    long stop;
    for (long i = share(map->count / LANES, &stop); i < stop; i++) quantise_values(map, i * LANES, map->bytes);
}

/* `count` values, a multiple of LANES, of type 0 (float32) or 1 (bfloat16) as bytes: x = (u - zero) / by. */
void quantise_map(const void *x, uint8_t *bytes, long count, float by, float zero, int type, int threads)
{
    struct map map = {.x = x, .bytes = bytes, .count = count, .by = by, .zero = zero, .bfloat16 = type == 1};
    GOMP_parallel(quantise_map_share, &map, threads, 0);
}
