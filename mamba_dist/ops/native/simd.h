// Vectors of VECTOR_BYTES bytes for the kernels of the `cpu` backend, and the functions of the
// paper on them: exp, softplus, sigmoid.
//
// GCC's and Clang's vector extension, so that one source serves AVX-512, AVX2, SSE2 and NEON. The
// few intrinsics are where the compilers' own code for a plain expression is slower. Arithmetic is
// in fp32, or in fp64 for gradient checks; bf16 is a storage format only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef VECTOR_BYTES
#error "VECTOR_BYTES is the width of the machine's vectors: 64, 32 or 16"
#endif

#define MAMBA_INLINE static MAMBA_INLINE_MEMBER
#define MAMBA_INLINE_MEMBER inline __attribute__((always_inline))

// Keeps the compiler from merging the operation that gives `vector` with those that use it.
#if defined(__x86_64__)
#define MAMBA_FINISHED(vector) asm("" : "+v"(vector))
#elif defined(__aarch64__)
#define MAMBA_FINISHED(vector) asm("" : "+w"(vector))
#else
#define MAMBA_FINISHED(vector)
#endif

struct bf16 {
    uint16_t bits;
};

template <class Real>
struct Lanes {
    static constexpr int count = VECTOR_BYTES / sizeof(Real);
    typedef Real type __attribute__((vector_size(VECTOR_BYTES)));
};
using float_v = Lanes<float>::type;
using double_v = Lanes<double>::type;
typedef int32_t int_v __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t uint_v __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t half_bits_v __attribute__((vector_size(VECTOR_BYTES / 2)));

// Real of a storage type: what arithmetic on it is done in.
template <class Storage>
struct Compute {
    using real = Storage;
};
template <>
struct Compute<bf16> {
    using real = float;
};
template <class Storage>
struct Compute<const Storage> : Compute<Storage> {};

// ---- scalars

MAMBA_INLINE float to_real(float x) { return x; }
MAMBA_INLINE double to_real(double x) { return x; }
MAMBA_INLINE float to_real(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

MAMBA_INLINE void from_real(float x, float* to) { *to = x; }
MAMBA_INLINE void from_real(double x, double* to) { *to = x; }
MAMBA_INLINE void from_real(float x, bf16* to) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    // Round to nearest even; a NaN keeps a set mantissa bit instead of carrying into the sign.
    to->bits = x != x ? uint16_t((bits >> 16) | 0x40u)
                      : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// ---- loads and stores, unaligned

MAMBA_INLINE float_v load(const float* p) {
    float_v v;
    memcpy(&v, p, sizeof v);
    return v;
}
MAMBA_INLINE double_v load(const double* p) {
    double_v v;
    memcpy(&v, p, sizeof v);
    return v;
}
MAMBA_INLINE float_v load(const bf16* p) {
    half_bits_v bits;
    memcpy(&bits, p, sizeof bits);
    return (float_v)(__builtin_convertvector(bits, uint_v) << 16);
}

MAMBA_INLINE void store(float* p, float_v v) { memcpy(p, &v, sizeof v); }
MAMBA_INLINE void store(double* p, double_v v) { memcpy(p, &v, sizeof v); }
MAMBA_INLINE void store(bf16* p, float_v v) {
    uint_v bits = (uint_v)v;
    uint_v rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    uint_v is_nan = (uint_v)(v != v);
    bits = (rounded & ~is_nan) | ((bits | 0x400000u) & is_nan);
    half_bits_v halves = __builtin_convertvector(bits >> 16, half_bits_v);
    memcpy(p, &halves, sizeof halves);
}

// The first `count` lanes, the rest 0: for the last channels of a row.
template <class Storage>
MAMBA_INLINE typename Lanes<typename Compute<Storage>::real>::type load_part(const Storage* p,
                                                                             int count) {
    using real = typename Compute<Storage>::real;
    if (count == Lanes<real>::count) return load(p);
    Storage lanes[Lanes<real>::count];
    memset(lanes, 0, sizeof lanes);
    memcpy(lanes, p, size_t(count) * sizeof(Storage));
    return load(lanes);
}

template <class Storage, class Vector>
MAMBA_INLINE void store_part(Storage* p, Vector v, int count) {
    using real = typename Compute<Storage>::real;
    if (count == Lanes<real>::count) return store(p, v);
    Storage lanes[Lanes<real>::count];
    store(lanes, v);
    memcpy(p, lanes, size_t(count) * sizeof(Storage));
}

// ---- arithmetic

template <class Real>
MAMBA_INLINE typename Lanes<Real>::type splat(Real x) {
    return x - typename Lanes<Real>::type{};
}

template <class Vector>
MAMBA_INLINE auto lane_sum(Vector v) {
    auto sum = v[0];
    for (int i = 1; i < int(sizeof(Vector) / sizeof(sum)); i++) sum += v[i];
    return sum;
}

// Sums of adjacent lanes, those of `first` in the lower half.
template <class Vector>
MAMBA_INLINE Vector pair_sums(Vector first, Vector second) {
    constexpr int half = sizeof(Vector) / sizeof(first[0]) / 2;
    Vector sums;
    for (int i = 0; i < half; i++) {
        sums[i] = first[2 * i] + first[2 * i + 1];
        sums[half + i] = second[2 * i] + second[2 * i + 1];
    }
    return sums;
}
#if defined(__clang__) || __GNUC__ >= 12
MAMBA_INLINE float_v pair_sums(float_v first, float_v second) {
#if VECTOR_BYTES == 64
    return __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                                   28, 30) +
           __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27,
                                   29, 31);
#elif VECTOR_BYTES == 32
    return __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(first, second, 0, 2, 4, 6) +
           __builtin_shufflevector(first, second, 1, 3, 5, 7);
#endif
}
#endif

// Lane i of the result is the sum of the lanes of the i-th of as many vectors as there are lanes.
template <class Vector>
MAMBA_INLINE Vector lane_sums(const Vector* vectors) {
    constexpr int lanes = sizeof(Vector) / sizeof(vectors[0][0]);
    Vector sums[lanes];
    for (int i = 0; i < lanes; i++) sums[i] = vectors[i];
    // Halves the number of vectors at each level; neighbours end in the halves of one vector.
    for (int left = lanes / 2; left; left /= 2) {
        for (int i = 0; i < left; i++) {
            Vector first = sums[2 * i], second = sums[2 * i + 1];
            sums[i] = pair_sums(first, second);
        }
    }
    return sums[0];
}

// NaN lanes of x stay NaN: a comparison with NaN is false, and the instructions give their second
// operand then.
template <class Vector>
MAMBA_INLINE Vector at_least(Vector x, Vector bound) {
    return x < bound ? bound : x;
}
template <class Vector>
MAMBA_INLINE Vector at_most(Vector x, Vector bound) {
    return x > bound ? bound : x;
}
#if defined(__AVX512F__) && VECTOR_BYTES == 64
MAMBA_INLINE float_v at_least(float_v x, float_v bound) {
    return (float_v)_mm512_max_ps((__m512)bound, (__m512)x);
}
MAMBA_INLINE float_v at_most(float_v x, float_v bound) {
    return (float_v)_mm512_min_ps((__m512)bound, (__m512)x);
}
#elif defined(__AVX2__) && VECTOR_BYTES == 32
MAMBA_INLINE float_v at_least(float_v x, float_v bound) {
    return (float_v)_mm256_max_ps((__m256)bound, (__m256)x);
}
MAMBA_INLINE float_v at_most(float_v x, float_v bound) {
    return (float_v)_mm256_min_ps((__m256)bound, (__m256)x);
}
#endif

// 2^x in place to 3e-7, for |x| <= 126 and no NaN.
//
// Several vectors in lockstep: one after the other fills the scheduler with dependent chains.
template <int Count>
MAMBA_INLINE void exp2_bounded_each(float_v (&x)[Count]) {
    // 1.5 * 2^23: adding it rounds x to a whole number, which then stands in the low bits.
    const float_v shifter = splat(12582912.0f);
    float_v shifted[Count], p[Count];
    // Where x is a product, the compiler would multiply twice, for each of the two additions.
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) MAMBA_FINISHED(x[i]);
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) shifted[i] = x[i] + shifter;
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) x[i] -= shifted[i] - shifter;
    // The first three terms are the series' own, the others minimax over |r| <= 1/2. Minimax in all
    // would be 3 times closer at the ends, but biased near 0, where a slow decay multiplies the
    // bias by thousands of steps.
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) p[i] = x[i] * 1.321073505e-3f + 9.652533568e-3f;
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) p[i] = p[i] * x[i] + 5.550743639e-2f;
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) p[i] = p[i] * x[i] + 2.402265072e-1f;
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) p[i] = p[i] * x[i] + 6.931471825e-1f;
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) p[i] = p[i] * x[i] + 1.0f;
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) {
        x[i] = (float_v)((int_v)p[i] + ((int_v)shifted[i] << 23));
    }
}

// 2^x in place to 3e-7, at most 2^-126 below the normal range, inf above it, NaN for NaN.
template <int Count>
MAMBA_INLINE void exp2_each(float_v (&x)[Count]) {
    float_v given[Count];
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) {
        given[i] = x[i];
        x[i] = at_most(at_least(x[i], splat(-126.0f)), splat(128.0f));
    }
    exp2_bounded_each(x);
    // The sum of bits has read a NaN's payload as an exponent.
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) x[i] = given[i] == given[i] ? x[i] : given[i];
}

// fp64 serves gradient checks only, so accuracy goes before speed.
template <int Count>
MAMBA_INLINE void exp2_each(double_v (&x)[Count]) {
    for (int i = 0; i < Count; i++) {
        for (int lane = 0; lane < Lanes<double>::count; lane++) x[i][lane] = std::exp2(x[i][lane]);
    }
}

template <int Count>
MAMBA_INLINE void exp2_bounded_each(double_v (&x)[Count]) {
    exp2_each(x);
}

template <class Vector>
MAMBA_INLINE Vector exp2_v(Vector x) {
    Vector one[1] = {x};
    exp2_each(one);
    return one[0];
}

template <int Count>
MAMBA_INLINE void exp_each(float_v (&x)[Count]) {
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) x[i] *= 1.44269504f;
    exp2_each(x);
}
template <int Count>
MAMBA_INLINE void exp_each(double_v (&x)[Count]) {
    for (int i = 0; i < Count; i++) {
        for (int lane = 0; lane < Lanes<double>::count; lane++) x[i][lane] = std::exp(x[i][lane]);
    }
}

template <class Vector>
MAMBA_INLINE Vector exp_v(Vector x) {
    Vector one[1] = {x};
    exp_each(one);
    return one[0];
}

template <class Vector, int Count>
MAMBA_INLINE void sigmoid_each(Vector (&x)[Count]) {
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) x[i] = -x[i];
    exp_each(x);
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) x[i] = 1 / (1 + x[i]);
}

template <class Vector>
MAMBA_INLINE Vector sigmoid_v(Vector x) {
    Vector one[1] = {x};
    sigmoid_each(one);
    return one[0];
}

// 2 artanh(s) = log((1 + s) / (1 - s)) for 0 <= s <= 1/3.
MAMBA_INLINE float_v twice_artanh_v(float_v s) {
    float_v q = s * s;
    float_v p = splat(0.28178326f);
    p = p * q + 0.27960605f;
    p = p * q + 0.40024910f;
    p = p * q + 0.66666315f;
    p = p * q + 2.0f;
    return p * s;
}
MAMBA_INLINE double_v twice_artanh_v(double_v s) {
    for (int i = 0; i < Lanes<double>::count; i++) s[i] = 2 * std::atanh(s[i]);
    return s;
}

// log(1 + y) for 0 <= y <= 1.
template <class Vector>
MAMBA_INLINE Vector log1p_of_unit_v(Vector y) {
    return twice_artanh_v(y / (2 + y));
}

// max(x, 0) + log(1 + exp(-|x|)), without PyTorch's switch to x above 20; it ends at 2^-126.
template <class Vector, int Count>
MAMBA_INLINE void softplus_each(Vector (&x)[Count]) {
    Vector y[Count];
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) y[i] = x[i] < 0 ? x[i] : -x[i];
    exp_each(y);
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) x[i] = at_least(x[i], Vector{}) + log1p_of_unit_v(y[i]);
}

template <class Vector>
MAMBA_INLINE Vector softplus_v(Vector x) {
    Vector one[1] = {x};
    softplus_each(one);
    return one[0];
}

// softplus of x in place and its derivative, the sigmoid, from one exponential and one division.
template <class Vector, int Count>
MAMBA_INLINE void softplus_and_slope_each(Vector (&x)[Count], Vector (&slope)[Count]) {
    Vector y[Count];
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) y[i] = x[i] < 0 ? x[i] : -x[i];
    exp_each(y);
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) {
        Vector both = 1 / ((1 + y[i]) * (2 + y[i]));
        Vector inverse = (2 + y[i]) * both;
        slope[i] = x[i] < 0 ? y[i] * inverse : inverse;
        x[i] = at_least(x[i], Vector{}) + twice_artanh_v(y[i] * (1 + y[i]) * both);
    }
}
