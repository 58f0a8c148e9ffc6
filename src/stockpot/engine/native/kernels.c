/* The merge arithmetic compiled: raw bytes of the inputs in, raw bytes of the output out, in tiles that stay in the
 * first-level cache. Every operation is the one that the numpy code performs, in the same order and precision, so that
 * both give the same bytes; no fused multiply-add (compiled with -ffp-contract=off), no reassociation.
 *
 * No Python, no allocation beyond scratch, no globals: called through ctypes, without Python's lock.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ABI 1
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
#define WITH_AVX512
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

/* What to do with a block of n elements of m models; see native/__init__.py, which mirrors it. */
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
    const double *factor; /* NULL: none */
    const uint8_t *mask;  /* [m, n] booleans or NULL */
    double scale;
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

/* Copy the bits inside the window [first, first + span) to `out`; how many they are. A branch could not be predicted. */
#ifdef WITH_AVX512
__attribute__((target("avx512f"))) static int64_t put_aside_avx512(const uint32_t *bits, int64_t n, uint32_t first,
                                                                   uint32_t span, uint32_t *out) {
    __m512i low = _mm512_set1_epi32((int32_t)first), width = _mm512_set1_epi32((int32_t)span);
    int64_t count = 0;
    for (int64_t j = 0; j < n; j += 16) {
        __mmask16 there = n - j >= 16 ? 0xffff : (__mmask16)((1u << (n - j)) - 1);
        __m512i x = _mm512_maskz_loadu_epi32(there, bits + j);
        __mmask16 inside = _mm512_mask_cmplt_epu32_mask(there, _mm512_sub_epi32(x, low), width);
        _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(inside, x));
        count += __builtin_popcount(inside);
    }
    return count;
}
#endif

static int64_t put_aside(const uint32_t *bits, int64_t n, uint32_t first, uint32_t span, uint32_t *out) {
#ifdef WITH_AVX512
    if (__builtin_cpu_supports("avx512f")) return put_aside_avx512(bits, n, first, span, out);
#endif
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

EXPORT int32_t stockpot_abi(void) { return ABI; }

/* Fill task->out. wide: compute in float64, else in float32. Returns 0, or 1 when there is no memory for scratch. */
EXPORT int32_t stockpot_combine(const Task *task, int32_t wide) {
    return wide ? combine_f64(task) : combine_f32(task);
}

/* Sums in float64 over whole chunks of REDUCE elements by halving, and over what is left, added to `total` in order.
 * kind 0: a.a, a.b, b.b of two inputs; kind 1: |delta| of each model, then |what remains of it| of each. */
EXPORT int32_t stockpot_totals(const Task *task, int32_t wide, int32_t kind, double *total) {
    return wide ? totals_f64(task, kind, total) : totals_f32(task, kind, total);
}

/* The sum of the signs of the elected masses. */
EXPORT int32_t stockpot_signs(const Task *task, int32_t wide, double *total) {
    return wide ? signs_f64(task, total) : signs_f32(task, total);
}

/* Magnitudes of the deltas as bit patterns of float32 against windows [low, high) of each model: how many lie below, and
 * those inside into `inside`, n + SLACK places a model; `held` counts them. Models with low > high are passed over. */
EXPORT int32_t stockpot_split(const Task *task, int32_t wide, const uint32_t *low, const uint32_t *high, int64_t *below,
                              uint32_t *inside, int64_t *held) {
    return wide ? split_f64(task, low, high, below, inside, held) : split_f32(task, low, high, below, inside, held);
}

/* What the method sees of `runs` runs of `run` elements each: out [m, runs * run] of float64 where wide, else float32. */
EXPORT int32_t stockpot_deltas(const Task *task, int32_t wide, const int64_t *starts, int64_t runs, int64_t run, void *out) {
    return wide ? deltas_f64(task, starts, runs, run, out) : deltas_f32(task, starts, runs, run, out);
}

/* For each of `count` neighbouring ranges [edges[i], edges[i + 1]) of one input: sum of squares, how many NaN, how many
 * infinities. Counted only where the sum is not finite, which it is wherever all numbers are. */
CLONES static void measure(const void *raw, int32_t dtype, const int64_t *edges, int64_t count, double *squares,
                           int64_t *nans, int64_t *infinities) {
    for (int64_t i = 0; i < count; i++) {
        squares[i] = dtype == F64 ? squares_f64(raw, dtype, edges[i], edges[i + 1])
                                  : squares_f32(raw, dtype, edges[i], edges[i + 1]);
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

static inline void philox(const uint64_t counter[4], uint64_t k0, uint64_t k1, uint64_t out[4]) {
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

/* out[e] = byte start + e of the stream < whole, or, where equal, a second draw < rest. */
EXPORT void stockpot_mask(uint64_t k0, uint64_t k1, int64_t start, int64_t n, int32_t whole, uint64_t rest, uint8_t *out) {
    uint64_t first = (uint64_t)start / 32;
    int64_t skip = start % 32, at = 0;
    for (uint64_t block = first; at < n; block++) {
        uint64_t counter[4] = {block + 1, 0, 0, 0}, words[4]; /* numpy raises the counter before it draws */
        philox(counter, k0, k1, words);
        uint8_t bytes[32];
        for (int w = 0; w < 4; w++)
            for (int b = 0; b < 8; b++) bytes[8 * w + b] = (uint8_t)(words[w] >> (8 * b));
        int64_t stop = 32 - skip < n - at ? 32 : skip + n - at;
        for (int64_t i = skip; i < stop; i++) out[at + i - skip] = bytes[i] < whole;
        if (rest)
            for (int64_t i = skip; i < stop; i++)
                if (bytes[i] == whole) out[at + i - skip] = mix(k0, k1, (uint64_t)(start + at + i - skip)) < rest;
        at += stop - skip;
        skip = 0;
    }
}
