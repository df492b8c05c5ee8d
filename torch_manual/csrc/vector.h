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
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float sigmoid_limit = 87.0f, tanh_limit = 9.02f;
    static constexpr int terms = 6;  // expm1(r) = r + r² · polynomial, |r| ≤ ln2 / 2
    static constexpr float polynomial[terms] = {1.9875691500e-4f, 1.3981999507e-3f,
                                                8.3334519073e-3f, 4.1665795894e-2f,
                                                1.6666665459e-1f, 5.0000001201e-1f};
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
    static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
    static constexpr double sigmoid_limit = 700.0, tanh_limit = 19.1;
    static constexpr int terms = 12;  // Taylor's series
    static constexpr double polynomial[terms] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
        1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
        1.0 / 6,          0.5};
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

// z = n ln2 + r. Returns expm1(r) and sets `scale` = 2ⁿ, so that e^z = scale + scale · expm1(r).
template <typename real>
INLINE vec_of<real> exp_parts(vec_of<real> z, vec_of<real>& scale) {
    using V = Vector<real>;
    constexpr real log2_e = (real)1.4426950408889634074;
    vec_of<real> shifted = z * log2_e + V::round_to_integer, n = shifted - V::round_to_integer;
    scale = (vec_of<real>)(((typename V::bits)shifted << V::mantissa) + V::one_bits);
    vec_of<real> r = (z - n * V::ln2_high) - n * V::ln2_low;
    vec_of<real> sum = broadcast<real>(V::polynomial[0]);
#pragma GCC unroll 16
    for (int k = 1; k < V::terms; k++) sum = sum * r + V::polynomial[k];
    return sum * (r * r) + r;
}

// 1 / (1 + e^-x). A NaN fails every comparison and so comes out again.
template <typename real>
INLINE vec_of<real> sigmoid(vec_of<real> x) {
    const vec_of<real> limit = broadcast<real>(Vector<real>::sigmoid_limit);
    vec_of<real> z = -x, scale;
    z = z > limit ? limit : z;
    z = z < -limit ? -limit : z;
    vec_of<real> m = exp_parts<real>(z, scale);
    vec_of<real> s = (real)1 / (((real)1 + scale) + scale * m);
    return x < -limit ? vec_of<real>{} : s;
}

// (e^2|x| - 1) / (e^2|x| + 1), with the sign of x.
template <typename real>
INLINE vec_of<real> tanh(vec_of<real> x) {
    using bits = typename Vector<real>::bits;
    const vec_of<real> limit = broadcast<real>(Vector<real>::tanh_limit);
    const bits sign = (bits)x & (bits)broadcast<real>((real)-0.0);
    vec_of<real> a = (vec_of<real>)((bits)x ^ sign), scale;
    a = a > limit ? limit : a;
    vec_of<real> m = exp_parts<real>(a + a, scale);
    vec_of<real> e = scale * m + (scale - (real)1);
    return (vec_of<real>)((bits)(e / (e + (real)2)) ^ sign);
}

}  // namespace
