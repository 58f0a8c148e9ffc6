/* The merge arithmetic compiled: raw bytes of the inputs in, raw bytes of the output out, in tiles that stay in the
 * first-level cache. Every operation is the one that the numpy code performs, in the same order and precision, so that
 * both give the same bytes; no fused multiply-add (compiled with -ffp-contract=off), no reassociation.
 *
 * kernels.inc holds all of it for float32 and float64; fused.inc the most used parts again, for float32 and in vectors.
 * transfer.inc reads and writes files on the way in and out, and hashes (blake3.inc) and measures what passes; bundle.inc does
 * all of it for many pieces in one call.
 *
 * No Python, no allocation beyond scratch, no globals but the one that tests set: called through ctypes, without
 * Python's lock.
 */
#define _GNU_SOURCE /* sync_file_range */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ABI 14
#define TILE 1024
#define REDUCE 65536
#define LANES 64
#define LEVELS 10 /* REDUCE / LANES = 2^10 rows */
#define SLACK 16  /* places that may be written past those that count */

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define BY_TARGET
#include <immintrin.h>
#else
#define CLONES
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define INLINE static inline
#define PREFETCH(address)
#endif

enum { BF16, F16, F32, F64 };
static const int64_t SIZES[] = {2, 2, 4, 8};
enum { DIVIDE_NONE, DIVIDE_WEIGHT, DIVIDE_COUNT };

/* What to do with a block of n elements of m models; see native/tasks.py, which mirrors it. */
typedef struct {
    int64_t n;
    int32_t m;
    int32_t base_dtype;
    int32_t out_dtype;
    int32_t elect;             /* 0: weighted sum; 1: elect signs */
    int32_t weighted_election; /* election on weighted deltas */
    int32_t divide;
    int32_t zero_is_positive;
    int32_t trims; /* whether cutoff holds */
    const void **raws;
    const int32_t *dtypes;
    const void *base; /* NULL: weights are merged, not deltas */
    void *out;
    const double *weight;
    const float *cutoff;
    const float *ceiling; /* magnitudes above it go; NULL: none do */
    const double *factor; /* NULL: none */
    const uint8_t *mask;  /* [m, n] booleans or NULL */
    double scale;
    double least;    /* a divisor below it counts as it; 0: an empty one as 1 */
    float spread;    /* elements that differ less over the models go, where `selects` holds */
    int32_t selects;
} Task;

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* float16 -> float32 exactly: shift into place and correct the exponent by a multiplication, which also normalises
 * subnormals. */
INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t rest = (uint32_t)(half & 0x7fff) << 13;
    float scaled = as_float(rest) * as_float(0x77800000u); /* 2^112 */
    uint32_t special = rest | 0x7f800000u | ((rest & 0x007fffffu) ? 0x00400000u : 0); /* infinity, quiet NaN */
    uint32_t bits = rest >= 0x0f800000u ? special : as_bits(scaled);
    return as_float(bits | sign);
}

/* float32 -> float16 to nearest even. */
INLINE uint16_t float_to_half(float value) {
    uint32_t bits = as_bits(value);
    uint32_t sign = bits & 0x80000000u;
    uint32_t rest = bits ^ sign;
    /* adding 0.5 puts the subnormal's last place where float32's is, so that the addition rounds it */
    uint32_t small = as_bits(as_float(rest) + 0.5f) - 0x3f000000u;
    uint32_t normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    /* a NaN keeps the upper bits of its payload, and at least one */
    uint32_t payload = (rest >> 13) & 0x3ffu;
    uint32_t special = rest > 0x7f800000u ? 0x7c00u | (payload ? payload : 1u) : 0x7c00u;
    uint32_t half = rest < (113u << 23) ? small : normal;
    half = rest >= 0x477ff000u ? special : half; /* 65520 and above round to infinity */
    return (uint16_t)(half | (sign >> 16));
}

INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

/* The bits inside the window [first, first + span) to `out`; how many they are. A branch could not be predicted. */
static int64_t put_aside(const uint32_t *bits, int64_t n, uint32_t first, uint32_t span, uint32_t *out) {
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) {
        out[count] = bits[j];
        count += bits[j] - first < span;
    }
    return count;
}

#define T float
#define NAME(x) x##_f32
#define ABS fabsf
#include "kernels.inc"
#undef T
#undef NAME
#undef ABS

#define T double
#define NAME(x) x##_f64
#define ABS fabs
#include "kernels.inc"
#undef T
#undef NAME
#undef ABS

/* The most that may be used of what the processor has: 0 nothing of its own, 1 AVX2, 2 AVX-512. For tests. */
static int allowed = 2;

EXPORT void stockpot_allow(int32_t most) { allowed = most; }

#ifdef BY_TARGET
static int level(void) {
    if (allowed >= 2 && __builtin_cpu_supports("avx512f")) return 2;
    return allowed >= 1 && __builtin_cpu_supports("avx2");
}
#endif

#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(64)));
typedef float LooseFloats __attribute__((vector_size(64), may_alias, aligned(4)));
typedef double Doubles __attribute__((vector_size(64)));
typedef double LooseDoubles __attribute__((vector_size(64), may_alias, aligned(8)));
typedef int32_t Truths __attribute__((vector_size(64), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(64), may_alias, aligned(2)));
#define FUSED_MODELS 32

#ifdef BY_TARGET
#define FUSED_AVX512
#define FUSED_WIDTH 4
#define FUSED(x) x##_avx512
#define FOR_TARGET __attribute__((target("avx512f")))
#define FUSED_INLINE static inline __attribute__((always_inline, target("avx512f")))
#include "fused.inc"
#undef FUSED_AVX512
#undef FUSED_WIDTH
#undef FUSED
#undef FOR_TARGET
#undef FUSED_INLINE
#define FUSED_WIDTH 2
#define FUSED(x) x##_avx2
#define FOR_TARGET __attribute__((target("avx2")))
#define FUSED_INLINE static inline __attribute__((always_inline, target("avx2")))
#include "fused.inc"
#undef FUSED
#undef FOR_TARGET
#undef FUSED_INLINE
#undef FUSED_WIDTH
#define CHOOSE(name) (level() == 2 ? name##_avx512 : level() == 1 ? name##_avx2 : name##_plain)
#else
#define CHOOSE(name) name##_plain
#endif
#define FUSED_WIDTH 1
#define FUSED(x) x##_plain
#define FOR_TARGET
#define FUSED_INLINE INLINE
#include "fused.inc"
#undef FUSED
#undef FOR_TARGET
#undef FUSED_INLINE
#undef FUSED_WIDTH

/* How many elements were done at once; the rest is for the code in tiles. */
static int64_t combine_fused(const Task *t) { return t->m <= FUSED_MODELS ? CHOOSE(combine)(t) : 0; }

static int64_t split_fused(const Task *t, const uint32_t *low, const uint32_t *high, int64_t *below, uint32_t *inside,
                           int64_t *held) {
    return CHOOSE(split)(t, low, high, below, inside, held);
}

static int64_t gram_fused(const Task *t, double *total) { return CHOOSE(gram)(t, total); }

static int64_t tally_fused(const uint32_t *values, int64_t n, int32_t is_signed, uint32_t first, uint32_t span, uint32_t *out,
                           int64_t *below, int64_t *held) {
    return CHOOSE(tally)(values, n, is_signed, first, span, out, below, held);
}
#else
static int64_t tally_fused(const uint32_t *values, int64_t n, int32_t is_signed, uint32_t first, uint32_t span, uint32_t *out,
                           int64_t *below, int64_t *held) {
    return 0;
}

static int64_t gram_fused(const Task *t, double *total) { return 0; }

static int64_t combine_fused(const Task *t) { return 0; }

static int64_t split_fused(const Task *t, const uint32_t *low, const uint32_t *high, int64_t *below, uint32_t *inside,
                           int64_t *held) {
    return 0;
}
#endif

EXPORT int32_t stockpot_abi(void) { return ABI; }

/* Fill task->out. wide: compute in float64, else in float32. Returns 0, or 1 when there is no memory for scratch. */
EXPORT int32_t stockpot_combine(const Task *task, int32_t wide) {
    return wide ? combine_f64(task, 0) : combine_f32(task, combine_fused(task));
}

/* Sums in float64 over whole chunks of REDUCE elements by halving, and over what is left, added to `total` in order.
 * kind 0: products of each two of what the method sees, by rows of the upper triangle; kind 1: |delta| of each model, then
 * |what remains of it| of each; kind 2: squares of each where the models differ enough, then 1 everywhere; kind 3: 1 where the models
 * differ at all. */
EXPORT int32_t stockpot_totals(const Task *task, int32_t wide, int32_t kind, double *total) {
    if (wide) return totals_f64(task, 0, kind, total);
    return totals_f32(task, kind == 0 && task->m == 2 && !task->base ? gram_fused(task, total) : 0, kind, total);
}

/* The sum of the signs of the elected masses. */
EXPORT int32_t stockpot_signs(const Task *task, int32_t wide, double *total) {
    return wide ? signs_f64(task, total) : signs_f32(task, total);
}

/* Magnitudes of the deltas as bit patterns of float32 against windows [low, high) of each model: how many lie below, and
 * those inside into `inside`, n + SLACK places a model; `held` counts them. Models with low > high are passed over. */
EXPORT int32_t stockpot_split(const Task *task, int32_t wide, const uint32_t *low, const uint32_t *high, int64_t *below,
                              uint32_t *inside, int64_t *held) {
    if (wide) return split_f64(task, 0, low, high, below, inside, held);
    return split_f32(task, split_fused(task, low, high, below, inside, held), low, high, below, inside, held);
}

/* How much the models differ in each element (see `spread`). Returns 1 when there is no memory for scratch. */
EXPORT int32_t stockpot_spread(const Task *task, int32_t wide, float *out) {
    return wide ? spreads_f64(task, out) : spreads_f32(task, out);
}

/* Of n float32 as bit patterns, which where they are signed are changed to order as the numbers do: those inside the window
 * [first, first + span) to `out`, n + SLACK places; returns how many they are. below: how many lie under it. */
EXPORT int64_t stockpot_tally(const uint32_t *values, int64_t n, int32_t is_signed, uint32_t first, uint32_t span,
                              uint32_t *out, int64_t *below) {
    int64_t held = 0;
    *below = 0;
    for (int64_t at = tally_fused(values, n, is_signed, first, span, out, below, &held); at < n; at++) {
        uint32_t x = values[at];
        if (is_signed) x ^= x >> 31 ? 0xffffffffu : 0x80000000u;
        *below += x < first;
        out[held] = x;
        held += x - first < span;
    }
    return held;
}

/* The value of `rank` in ascending order, by eleven bits at a time from the first in which any two differ: equal values, of
 * which there are many among bfloat16 deltas, cost nothing extra. scratch: n + 1 places. */
EXPORT uint32_t stockpot_select(const uint32_t *values, int64_t n, int64_t rank, uint32_t *scratch) {
    for (;;) {
        uint32_t differ = 0;
        for (int64_t i = 0; i < n; i++) differ |= values[i] ^ values[0];
        if (!differ) return values[0];
        int shift = 0;
        while (differ >> shift > 0x7ff) shift++;
        uint32_t counts[4][2048] = {{0}}, bin = 0; /* four: a counter raised twice in a row would have to wait for itself */
        for (int64_t i = 0; i < n; i++) counts[i & 3][values[i] >> shift & 0x7ff]++;
        for (;; bin++) {
            int64_t count = (int64_t)counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin];
            if (rank < count) break;
            rank -= count;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++) { /* in place from the second time on: it never overtakes itself */
            uint32_t value = values[i];
            scratch[kept] = value;
            kept += (value >> shift & 0x7ff) == bin;
        }
        values = scratch;
        n = kept;
    }
}

/* What the method sees: out [m, n], and the base if there is one [n], of float64 where wide, else float32. */
EXPORT void stockpot_see(const Task *task, int32_t wide, void *out, void *base) {
    if (wide)
        see_f64(task, out, base);
    else
        see_f32(task, out, base);
}

/* What a method gives, and the base if there is one, added up, as n elements of `dtype`. */
EXPORT void stockpot_finish(const void *result, const void *base, int64_t n, int32_t wide, int32_t dtype, void *out) {
    if (wide)
        finish_f64(result, base, n, dtype, out);
    else
        finish_f32(result, base, n, dtype, out);
}

/* What the method sees of `runs` runs of `run` elements each: out [m, runs * run] of float64 where wide, else float32. */
EXPORT int32_t stockpot_deltas(const Task *task, int32_t wide, const int64_t *starts, int64_t runs, int64_t run, void *out) {
    return wide ? deltas_f64(task, starts, runs, run, out) : deltas_f32(task, starts, runs, run, out);
}

/* For each of `count` neighbouring ranges [edges[i], edges[i + 1]) of one input: sum of squares, how many NaN, how many
 * infinities. Counted only where the sum is not finite, which it is wherever all numbers are. */
#if defined(__GNUC__)
/* The same of bfloat16, two to a word: their order is of no account here. */
INLINE double squares_bf16(const void *raw, int64_t at, int64_t stop) {
    double total = 0;
    while (at + 64 <= stop) {
        int64_t end = stop - at < TILE ? at + (stop - at) / 64 * 64 : at + TILE;
        Floats a = {0}, b = {0}, c = {0}, d = {0};
        for (; at < end; at += 64) {
            const LooseWords *w = (const LooseWords *)((const uint16_t *)raw + at);
            Words first = w[0], second = w[1];
            Floats e = (Floats)(first << 16), f = (Floats)(first & 0xffff0000u);
            Floats g = (Floats)(second << 16), h = (Floats)(second & 0xffff0000u);
            a += e * e, b += f * f, c += g * g, d += h * h;
        }
        Floats sum = (a + b) + (c + d);
        for (int l = 0; l < 16; l++) total += sum[l];
    }
    return total + squares_f32(raw, BF16, at, stop);
}
#else
#define squares_bf16(raw, at, stop) squares_f32(raw, BF16, at, stop)
#endif

CLONES static void measure(const void *raw, int32_t dtype, const int64_t *edges, int64_t count, double *squares,
                           int64_t *nans, int64_t *infinities) {
    for (int64_t i = 0; i < count; i++) {
        squares[i] = dtype == F64    ? INFINITY
                     : dtype == BF16 ? squares_bf16(raw, edges[i], edges[i + 1])
                                     : squares_f32(raw, dtype, edges[i], edges[i + 1]);
        /* squares that float32 can't hold, too large or too small, are taken in float64 */
        if (!(squares[i] < INFINITY && squares[i] > 1e-30 * (double)(edges[i + 1] - edges[i])))
            squares[i] = squares_f64(raw, dtype, edges[i], edges[i + 1]);
        nans[i] = infinities[i] = 0;
        if (squares[i] < INFINITY) continue;
        double total = 0;
        for (int64_t at = edges[i]; at < edges[i + 1]; at++) {
            double x;
            load_f64(raw, dtype, at, 1, &x);
            nans[i] += x != x;
            infinities[i] += x == INFINITY || x == -INFINITY;
            if (x - x == 0) total += x * x;
        }
        squares[i] = total;
    }
}

EXPORT void stockpot_measure(const void *raw, int32_t dtype, const int64_t *edges, int64_t count, double *squares,
                             int64_t *nans, int64_t *infinities) {
    measure(raw, dtype, edges, count, squares, nans, infinities);
}

/* Random masks: see engine/masks.py, which defines the stream. */

INLINE void philox(const uint64_t counter[4], uint64_t k0, uint64_t k1, uint64_t out[4]) {
    uint64_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (int round = 0; round < 10; round++) {
        unsigned __int128 p0 = (unsigned __int128)0xD2E7470EE14C6C93u * c0;
        unsigned __int128 p1 = (unsigned __int128)0xCA5A826395121157u * c2;
        uint64_t h0 = (uint64_t)(p0 >> 64), l0 = (uint64_t)p0, h1 = (uint64_t)(p1 >> 64), l1 = (uint64_t)p1;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

static inline uint64_t mix(uint64_t k0, uint64_t k1, uint64_t index) {
    uint64_t z = (index * 0x9E3779B97F4A7C15u) ^ k0;
    z += k1;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

#define DRAWN 64 /* blocks of 32 bytes at a time: several in flight at once, then compared in vectors */

/* out[e] = byte start + e of the stream < whole, or, where equal, a second draw < rest. */
CLONES static void draw_mask(uint64_t k0, uint64_t k1, int64_t start, int64_t n, int32_t whole, uint64_t rest, uint8_t *out) {
    uint64_t words[4 * DRAWN];
    uint8_t bytes[32 * DRAWN], below = (uint8_t)whole;
    int64_t skip = start % 32, at = 0;
    for (uint64_t block = (uint64_t)start / 32; at < n; block += DRAWN) {
        int64_t stop = 32 * DRAWN - skip < n - at ? 32 * DRAWN : skip + n - at;
        for (int64_t b = 0; b < (stop + 31) / 32; b++) {
            uint64_t counter[4] = {block + (uint64_t)b + 1, 0, 0, 0}; /* numpy raises the counter before it draws */
            philox(counter, k0, k1, words + 4 * b);
        }
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        memcpy(bytes, words, sizeof bytes);
#else
        for (int i = 0; i < 32 * DRAWN; i++) bytes[i] = (uint8_t)(words[i / 8] >> 8 * (i % 8));
#endif
        uint8_t *to = out + at - skip;
        for (int64_t i = skip; i < stop; i++) to[i] = bytes[i] < below;
        for (int64_t w = skip / 8; rest && w < (stop + 7) / 8; w++) {
            uint64_t others; /* a byte of zero where the drawn one is `whole`, which is seldom */
            memcpy(&others, bytes + 8 * w, 8);
            others ^= below * 0x0101010101010101u;
            if (!((others - 0x0101010101010101u) & ~others & 0x8080808080808080u)) continue;
            for (int64_t i = 8 * w; i < 8 * w + 8; i++)
                if (bytes[i] == below && i >= skip && i < stop)
                    to[i] = mix(k0, k1, (uint64_t)(start + at + i - skip)) < rest;
        }
        at += stop - skip;
        skip = 0;
    }
}

EXPORT void stockpot_mask(uint64_t k0, uint64_t k1, int64_t start, int64_t n, int32_t whole, uint64_t rest, uint8_t *out) {
    draw_mask(k0, k1, start, n, whole, rest, out);
}

/* Words start, start + 1, ... of the stream. */
static void draw_words(uint64_t k0, uint64_t k1, int64_t start, int64_t n, uint64_t *out) {
    uint64_t counter[4] = {(uint64_t)start / 4 + 1, 0, 0, 0}, words[4]; /* numpy raises the counter before it draws */
    int64_t at = 0;
    for (int64_t skip = start % 4; skip && at < n; counter[0]++, skip = 0) {
        philox(counter, k0, k1, words);
        for (int64_t i = skip; i < 4 && at < n; i++) out[at++] = words[i];
    }
    for (; n - at >= 4; at += 4, counter[0]++) philox(counter, k0, k1, out + at);
    if (at < n) {
        philox(counter, k0, k1, words);
        memcpy(out + at, words, (size_t)(n - at) * 8);
    }
}

EXPORT void stockpot_words(uint64_t k0, uint64_t k1, int64_t start, int64_t n, uint64_t *out) {
    draw_words(k0, k1, start, n, out);
}

CLONES static void as_numbers(const uint64_t *words, int64_t n, int32_t wide, void *out) {
    if (wide)
        for (int64_t i = 0; i < n; i++) ((double *)out)[i] = (double)(int64_t)(words[i] >> 11) * 0x1p-53;
    else
        for (int64_t i = 0; i < n; i++) ((float *)out)[i] = (float)(int32_t)(words[i] >> 40) * 0x1p-24f;
}

/* Numbers from 0 to 1 of elements start, start + 1, ...: the upper 53 bits of a word each as float64, or 24 as float32. */
EXPORT void stockpot_uniform(uint64_t k0, uint64_t k1, int64_t start, int64_t n, int32_t wide, void *out) {
    uint64_t words[512];
    for (int64_t at = 0; at < n; at += 512) {
        int64_t some = n - at < 512 ? n - at : 512;
        draw_words(k0, k1, start + at, some, words);
        as_numbers(words, some, wide, (char *)out + at * (wide ? 8 : 4));
    }
}

/* Of each row of n deltas what orders them by magnitude, equal ones by place: both in one number. */
EXPORT void stockpot_keys(const void *deltas, int32_t wide, int64_t rows, int64_t n, uint64_t *keys) {
    for (int64_t r = 0; r < rows; r++)
        if (wide)
            keys_f64((const double *)deltas + r * n, n, keys + r * n);
        else
            keys_f32((const float *)deltas + r * n, n, keys + r * n);
}

/* Of each row those elements whose uniform number lies below their probability, low + step * (their place in the order), divided by
 * it where `inverse`. keys: the same, sorted. */
EXPORT void stockpot_prune(const uint64_t *keys, const void *deltas, const void *uniform, int32_t wide, int64_t rows, int64_t n,
                           double low, double step, int32_t inverse, void *out) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = r * n;
        if (wide)
            prune_f64(keys + at, (const double *)deltas + at, (const double *)uniform + at, n, low, step, inverse,
                      (double *)out + at);
        else
            prune_f32(keys + at, (const float *)deltas + at, (const float *)uniform + at, n, low, step, inverse,
                      (float *)out + at);
    }
}

/* The product of two rows of at most TILE elements, in lanes of float32. */
INLINE double lanes_product(const float *a, const float *b, int64_t n) {
    float sums[32] = {0};
    int64_t j = 0;
    for (; j + 32 <= n; j += 32)
        for (int l = 0; l < 32; l++) sums[l] += a[j + l] * b[j + l];
    double total = 0;
    for (int l = 0; l < 32; l++) total += sums[l];
    for (; j < n; j++) total += (double)a[j] * b[j];
    return total;
}

/* What diagnosis.measuring counts of a block, added to: products [m + 1, m + 1] (lower triangle; the base last), changed and
 * beyond [m] (by more than `large`), both [2] (elements that two or more change; those that not all change in one direction),
 * different [m, m] (whether two models differ). x [m + 1, TILE]: scratch. */
CLONES static void diagnose(const Task *t, float large, double *products, int64_t *changed, int64_t *beyond, int64_t *both,
                            uint8_t *different, float *x) {
    int32_t m = t->m;
    float *base = x + (int64_t)m * TILE;
    int32_t ups[TILE], downs[TILE], moved[TILE], several[TILE];
    for (int64_t at = 0; at < t->n; at += TILE) {
        int64_t n = t->n - at < TILE ? t->n - at : TILE;
        load_f32(t->base, t->base_dtype, at, n, base);
        for (int32_t i = 0; i < m; i++) load_f32(t->raws[i], t->dtypes[i], at, n, x + (int64_t)i * TILE);
        for (int32_t i = 0; i < m; i++)
            for (int32_t k = i + 1; k < m; k++) {
                if (different[i * m + k]) continue;
                const float *a = x + (int64_t)i * TILE, *b = x + (int64_t)k * TILE;
                int32_t unlike = 0;
                for (int64_t j = 0; j < n; j++) unlike |= a[j] != b[j];
                different[i * m + k] = unlike != 0;
            }
        for (int64_t j = 0; j < n; j++) ups[j] = downs[j] = moved[j] = several[j] = 0;
        for (int32_t i = 0; i < m; i++) {
            float *row = x + (int64_t)i * TILE;
            int32_t count = 0, far = 0;
            for (int64_t j = 0; j < n; j++) row[j] -= base[j];
            for (int64_t j = 0; j < n; j++) {
                int32_t own = row[j] != 0;
                count += own;
                far += (row[j] > large) | (row[j] < -large);
                ups[j] |= row[j] > 0;
                downs[j] |= row[j] < 0;
                several[j] |= moved[j] & own;
                moved[j] |= own;
            }
            changed[i] += count;
            beyond[i] += far;
        }
        int32_t shared = 0, conflicts = 0;
        for (int64_t j = 0; j < n; j++) shared += several[j], conflicts += ups[j] & downs[j];
        both[0] += shared;
        both[1] += conflicts;
        for (int32_t i = 0; i <= m; i++)
            for (int32_t k = 0; k <= i; k++)
                products[i * (m + 1) + k] += lanes_product(x + (int64_t)i * TILE, x + (int64_t)k * TILE, n);
    }
}

/* Returns 1 when there is no memory for scratch. */
EXPORT int32_t stockpot_diagnose(const Task *task, float large, double *products, int64_t *changed, int64_t *beyond,
                                 int64_t *both, uint8_t *different) {
    float *x = malloc(sizeof(float) * TILE * (size_t)(task->m + 1));
    if (!x) return 1;
    diagnose(task, large, products, changed, beyond, both, different, x);
    free(x);
    return 0;
}

#ifdef BY_TARGET
#include "transfer.inc"

EXPORT int32_t stockpot_transfers(void) { return level() > 0; }

EXPORT int32_t stockpot_transfer(const Stream *streams, int32_t count, int32_t write, const int64_t *pieces,
                                 int64_t piece_count, const int64_t *edges, int64_t segments) {
    return transfer(streams, count, write, pieces, piece_count, edges, segments);
}

#include "bundle.inc"
#else
EXPORT int32_t stockpot_transfers(void) { return 0; }

EXPORT int32_t stockpot_transfer(void) { return 1; }

EXPORT int64_t stockpot_bundle(const void *bundle) { return 0; }
#endif
