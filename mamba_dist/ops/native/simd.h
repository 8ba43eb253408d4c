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

#define MAMBA_INLINE static inline __attribute__((always_inline))

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

#if defined(__AVX512F__) && VECTOR_BYTES == 64
// Bits of 2^(j/16), less j << 19, so that adding (16 x) << 19 to entry 16 x mod 16 gives 2^x.
alignas(64) static const uint32_t EXP2_TABLE[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
#endif

// 2^x to 1.5e-7 in place, at most 2^-126 below the normal range, inf above it.
//
// Several vectors in lockstep: one after the other fills the scheduler with a dependent chain.
template <int Count>
MAMBA_INLINE void exp2_each(float_v (&x)[Count]) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
    // A table of 16 and a cubic: 5 multiplications instead of the 6 of a polynomial alone; the
    // additions and the permutation run on other ports. 32 and a parabola would do for the result,
    // but not for its distance from 1, where a slow decay has its rate.
    const __m512 table = _mm512_load_ps((const float*)EXP2_TABLE);
    // 1.5 * 2^19: adding it rounds x to a multiple of 1/16, whose 16-fold stands in the low bits.
    const float_v shifter = splat(786432.0f);
    float_v shifted[Count];
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) {
        x[i] = at_most(at_least(x[i], splat(-126.0f)), splat(128.0f));
    }
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) shifted[i] = x[i] + shifter;
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) x[i] -= shifted[i] - shifter;
    // Minimax in the relative error of (2^r - 1) / r over |r| <= 1/32.
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) {
        x[i] = ((x[i] * 5.550508574e-02f + 2.402335554e-01f) * x[i] + 6.931471825e-01f) * x[i] + 1.0f;
    }
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) {
        int_v entry = (int_v)_mm512_permutexvar_ps((__m512i)shifted[i], table);
        x[i] *= (float_v)(entry + ((int_v)shifted[i] << 19));
    }
#else
    // 1.5 * 2^23: adding it rounds x to a whole number, which then stands in the low bits.
    const float_v shifter = splat(12582912.0f);
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++) {
        float_v bounded = at_most(at_least(x[i], splat(-126.0f)), splat(128.0f));
        float_v shifted = bounded + shifter;
        float_v r = bounded - (shifted - shifter);
        // Minimax in the relative error of (2^r - 1) / r over |r| <= 1/2.
        float_v p = splat(1.33333535e-3f);
        p = p * r + 9.66624941e-3f;
        p = p * r + 5.55050000e-2f;
        p = p * r + 2.40223514e-1f;
        p = p * r + 6.93147144e-1f;
        p = p * r + 1.0f;
        float_v scaled = (float_v)((int_v)p + ((int_v)shifted << 23));
        // The sum of bits would read a NaN's payload as an exponent.
        x[i] = bounded == bounded ? scaled : bounded;
    }
#endif
}

// fp64 serves gradient checks only, so accuracy goes before speed.
template <int Count>
MAMBA_INLINE void exp2_each(double_v (&x)[Count]) {
    for (int i = 0; i < Count; i++) {
        for (int lane = 0; lane < Lanes<double>::count; lane++) x[i][lane] = std::exp2(x[i][lane]);
    }
}

template <class Vector>
MAMBA_INLINE Vector exp2_v(Vector x) {
    Vector one[1] = {x};
    exp2_each(one);
    return one[0];
}

MAMBA_INLINE float_v exp_v(float_v x) { return exp2_v(x * 1.44269504f); }
MAMBA_INLINE double_v exp_v(double_v x) {
    for (int i = 0; i < Lanes<double>::count; i++) x[i] = std::exp(x[i]);
    return x;
}

template <class Vector>
MAMBA_INLINE Vector sigmoid_v(Vector x) {
    return 1 / (1 + exp_v(-x));
}

// log(1 + y) for 0 <= y <= 1, as 2 artanh(y / (2 + y)).
MAMBA_INLINE float_v log1p_of_unit_v(float_v y) {
    float_v s = y / (2.0f + y), q = s * s;
    float_v p = splat(0.28178326f);
    p = p * q + 0.27960605f;
    p = p * q + 0.40024910f;
    p = p * q + 0.66666315f;
    p = p * q + 2.0f;
    return p * s;
}
MAMBA_INLINE double_v log1p_of_unit_v(double_v y) {
    for (int i = 0; i < Lanes<double>::count; i++) y[i] = std::log1p(y[i]);
    return y;
}

// max(x, 0) + log(1 + exp(-|x|)): exact for every x, without PyTorch's switch to x above 20.
template <class Vector>
MAMBA_INLINE Vector softplus_v(Vector x) {
    Vector magnitude = x < 0 ? -x : x;
    return at_least(x, Vector{}) + log1p_of_unit_v(exp_v(-magnitude));
}
