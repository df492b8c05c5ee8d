// SIMD vectors of float or double, and the functions of them that a cell needs.
//
// Written with GCC's vector extensions, so that one text serves AVX-512, AVX2, SSE2 and NEON; only
// loads and stores of part of a vector name instructions.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE
#define NOINLINE __attribute__((noinline))

namespace {

// `vec` is a vector in a register, `bits` its lanes as integers, `stored` one anywhere in memory.
template <typename real>
struct Vector;

template <>
struct Vector<float> {
    static constexpr int lanes = VECTOR_BYTES / 4;
    typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef float stored __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

    static constexpr int mantissa = 23;
    static constexpr int32_t one_bits = 0x3f800000;
    static constexpr float round_to_integer = 12582912.0f;  // 1.5 · 2²³: adding it rounds
    static constexpr float ln2 = 0.693147181f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float sigmoid_limit = 65.0f, tanh_limit = 9.02f;
    static constexpr int terms = 6;  // e^r = Σ taylor[k] r^k to 2⁻²⁹, |r| ≤ ln2 / 2: minimax, from k = 2 on
    static constexpr float taylor[terms + 1] = {1.0f,           1.0f,           4.9999992e-1f,
                                               1.66664201e-1f, 4.16682262e-2f, 8.37482405e-3f,
                                               1.38368357e-3f};
};

template <>
struct Vector<double> {
    static constexpr int lanes = VECTOR_BYTES / 8;
    typedef double vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef double stored __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));

    static constexpr int mantissa = 52;
    static constexpr int64_t one_bits = 0x3ff0000000000000;
    static constexpr double round_to_integer = 6755399441055744.0;  // 1.5 · 2⁵²
    static constexpr double ln2 = 0.693147180559945309, ln2_high = 6.93145751953125e-1,
                            ln2_low = 1.42860682030941723212e-6;
    static constexpr double sigmoid_limit = 650.0, tanh_limit = 19.1;
    static constexpr int terms = 13;  // Taylor's series itself
    static constexpr double taylor[terms + 1] = {
        1.0,         1.0,          1.0 / 2,       1.0 / 6,        1.0 / 24,
        1.0 / 120,   1.0 / 720,    1.0 / 5040,    1.0 / 40320,    1.0 / 362880,
        1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

template <typename real>
using vec_of = typename Vector<real>::vec;

template <typename real>
INLINE vec_of<real> broadcast(real x) {
    return x - vec_of<real>{};
}

template <typename real>
INLINE vec_of<real> load(const real* p) {
    return (vec_of<real>)*(const typename Vector<real>::stored*)p;
}

// Keeps `v`, used several times, in a register: the compiler may else make each use a load of its own.
template <typename vec>
INLINE void hold([[maybe_unused]] vec& v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__AVX2__)
    __asm__("" : "+x"(v));
#endif
}

template <typename real>
INLINE void store(real* p, vec_of<real> v) {
    *(typename Vector<real>::stored*)p = (typename Vector<real>::stored)v;
}

// The first `n` lanes from memory, zeros after them.
template <typename real>
INLINE vec_of<real> load(const real* p, int64_t n) {
    if (n >= Vector<real>::lanes) return load(p);
#if defined(__AVX512F__)
    if constexpr (sizeof(real) == 4)
        return (vec_of<real>)_mm512_maskz_loadu_ps((1u << n) - 1, p);
    else
        return (vec_of<real>)_mm512_maskz_loadu_pd((1u << n) - 1, p);
#elif defined(__AVX2__)
    static const int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const __m256i mask = _mm256_loadu_si256((const __m256i*)(lanes + 8 - n * sizeof(real) / 4));
    if constexpr (sizeof(real) == 4)
        return (vec_of<real>)_mm256_maskload_ps(p, mask);
    else
        return (vec_of<real>)_mm256_maskload_pd(p, mask);
#else
    vec_of<real> v = {};
    for (int64_t k = 0; k < n; k++) v[k] = p[k];
    return v;
#endif
}

// The first `n` lanes to memory.
template <typename real>
INLINE void store(real* p, vec_of<real> v, int64_t n) {
    if (n >= Vector<real>::lanes) return store(p, v);
#if defined(__AVX512F__)
    if constexpr (sizeof(real) == 4)
        _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
    else
        _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v);
#else
    for (int64_t k = 0; k < n; k++) p[k] = v[k];
#endif
}

// Lane j of the result is lane j ^ distance of v.
template <typename real>
INLINE vec_of<real> swap_lanes(vec_of<real> v, int distance) {
    typename Vector<real>::bits from;
    for (int j = 0; j < Vector<real>::lanes; j++) from[j] = j ^ distance;
    return __builtin_shuffle(v, from);
}

// The sum of all lanes.
template <typename real>
INLINE real sum_lanes(vec_of<real> v) {
#pragma GCC unroll 4
    for (int distance = Vector<real>::lanes / 2; distance > 0; distance /= 2)
        v += swap_lanes<real>(v, distance);
    return v[0];
}

// Transposes a square of `lanes` vectors, by exchanging ever larger squares across its diagonal.
template <typename real>
INLINE void transpose(vec_of<real> (&rows)[Vector<real>::lanes]) {
    constexpr int lanes = Vector<real>::lanes;
#pragma GCC unroll 4
    for (int size = 1; size < lanes; size *= 2) {
        typename Vector<real>::bits upper, lower;
        for (int j = 0; j < lanes; j++) {
            upper[j] = j & size ? lanes + j - size : j;
            lower[j] = j & size ? lanes + j : j + size;
        }
#pragma GCC unroll 16
        for (int k = 0; k < lanes; k++) {
            if (k & size) continue;
            vec_of<real> a = rows[k], b = rows[k + size];
            rows[k] = __builtin_shuffle(a, b, upper);
            rows[k + size] = __builtin_shuffle(a, b, lower);
        }
    }
}

// x where -limit ≤ x ≤ limit, else the limit it exceeds. A NaN comes out again.
template <typename real>
INLINE vec_of<real> clamp(vec_of<real> x, real limit) {
    const vec_of<real> high = broadcast<real>(limit), low = broadcast<real>(-limit);
#if defined(__AVX512F__)  // of a NaN and a number, these instructions give what stands second
    if constexpr (sizeof(real) == 4)
        return (vec_of<real>)_mm512_maskz_max_ps(
            -1, (__m512)low, _mm512_maskz_min_ps(-1, (__m512)high, (__m512)x));
    else
        return (vec_of<real>)_mm512_maskz_max_pd(
            -1, (__m512d)low, _mm512_maskz_min_pd(-1, (__m512d)high, (__m512d)x));
#elif defined(__AVX2__)
    if constexpr (sizeof(real) == 4)
        return (vec_of<real>)_mm256_max_ps((__m256)low, _mm256_min_ps((__m256)high, (__m256)x));
    else
        return (vec_of<real>)_mm256_max_pd((__m256d)low, _mm256_min_pd((__m256d)high, (__m256d)x));
#else
    x = x > high ? high : x;
    return x < low ? low : x;
#endif
}

// SCALE · x = n ln2 + r. Returns expm1(r) and sets `power` = 2ⁿ: e^(SCALE x) is power + power · expm1(r).
template <int SCALE, typename real>
INLINE vec_of<real> exp_parts(vec_of<real> x, vec_of<real>& power) {
    using V = Vector<real>;
    using bits = typename V::bits;
    constexpr real log2_e = (real)1.4426950408889634074;
    const vec_of<real> shifted = x * (SCALE * log2_e) + V::round_to_integer;
    const vec_of<real> n = shifted - V::round_to_integer;
    power = (vec_of<real>)(((bits)shifted << V::mantissa) + V::one_bits);
#if defined(__FMA__) || defined(__aarch64__)  // n ln2 is not rounded
    x -= n * (V::ln2 / SCALE);
#else
    x = (x - n * (V::ln2_high / SCALE)) - n * (V::ln2_low / SCALE);
#endif
    real scale = 1;
    for (int k = 0; k < V::terms; k++) scale *= SCALE;
    vec_of<real> sum = broadcast<real>(V::taylor[V::terms] * scale);
#pragma GCC unroll 16
    for (int k = V::terms - 1; k > 1; k--) {
        scale /= SCALE;
        sum = sum * x + V::taylor[k] * scale;
    }
    return sum * (x * x) + (SCALE == 2 ? x + x : SCALE * x);
}

// 1 + e^-x.
template <typename real>
INLINE vec_of<real> one_plus_exp(vec_of<real> x) {
    vec_of<real> power;
    const vec_of<real> m = exp_parts<-1, real>(clamp<real>(x, Vector<real>::sigmoid_limit), power);
    return power * m + (power + (real)1);
}

// The sign bits of x.
template <typename real>
INLINE typename Vector<real>::bits sign_of(vec_of<real> x) {
    return (typename Vector<real>::bits)x & (typename Vector<real>::bits)broadcast<real>((real)-0.0);
}

// v with signs changed where `sign` is set.
template <typename real>
INLINE vec_of<real> with_sign(vec_of<real> v, typename Vector<real>::bits sign) {
    return (vec_of<real>)((typename Vector<real>::bits)v ^ sign);
}

// e^2|x| - 1: of a negative x it would be near -1, where tanh would take twice its rounding error.
template <typename real>
INLINE vec_of<real> expm1_twice(vec_of<real> x) {
    vec_of<real> power;
    x = clamp<real>(with_sign<real>(x, sign_of<real>(x)), Vector<real>::tanh_limit);
    const vec_of<real> m = exp_parts<2, real>(x, power);
    return power * m + (power - (real)1);
}

// v, but 0 where σ(x) is: what else is computed there is 1 / (1 + e^limit).
template <typename real>
INLINE vec_of<real> unless_closed(vec_of<real> v, vec_of<real> x) {
    return x < -broadcast<real>(Vector<real>::sigmoid_limit) ? vec_of<real>{} : v;
}

// v σ(x) where v is computed as with 1 / (1 + e^limit): 0 too where σ(x) is, but for a v that is no number.
template <typename real>
INLINE vec_of<real> through_gate(vec_of<real> v, vec_of<real> x) {
    return x < -broadcast<real>(Vector<real>::sigmoid_limit) ? v * (real)0 : v;
}

template <typename real>
INLINE vec_of<real> sigmoid(vec_of<real> x) {
    return unless_closed<real>((real)1 / one_plus_exp<real>(x), x);
}

template <typename real>
INLINE vec_of<real> tanh(vec_of<real> x) {
    const vec_of<real> e = expm1_twice<real>(x);
    return with_sign<real>(e / (e + (real)2), sign_of<real>(x));
}

}  // namespace
