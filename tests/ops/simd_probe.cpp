// Applies the functions of simd.h to arrays, for test_native_library.py.
#include "simd.h"

template <class Real>
void apply(int64_t function, const Real* x, Real* y, int64_t count) {
    using V = typename Lanes<Real>::type;
    constexpr int64_t lanes = Lanes<Real>::count;
    for (int64_t i = 0; i < count; i += lanes) {
        const int part = int(count - i < lanes ? count - i : lanes);
        V v[1] = {load_part(x + i, part)}, slope[1];
        switch (function) {
            case 0: v[0] = exp2_v(v[0]); break;
            case 1: exp2_bounded_each(v); break;
            case 2: v[0] = exp_v(v[0]); break;
            case 3: v[0] = sigmoid_v(v[0]); break;
            case 4: v[0] = softplus_v(v[0]); break;
            case 5: softplus_and_slope_each(v, slope); break;
            case 6: softplus_and_slope_each(v, slope), v[0] = slope[0]; break;
            case 7: v[0] = log1p_of_unit_v(v[0]); break;
            case 8: v[0] = at_least(v[0], V{} + 1); break;
            case 9: v[0] = at_most(v[0], V{} + 1); break;
        }
        store_part(y + i, v[0], part);
    }
}

// y[i] is the sum of the lanes of the i-th vector of x; gives the number of lanes.
template <class Real>
int64_t sum_lanes(const Real* x, Real* y) {
    constexpr int lanes = Lanes<Real>::count;
    typename Lanes<Real>::type vectors[lanes];
    for (int i = 0; i < lanes; i++) vectors[i] = load(x + i * lanes);
    store(y, lane_sums(vectors));
    return lanes;
}

extern "C" {
void apply_float32(int64_t function, const float* x, float* y, int64_t count) {
    apply(function, x, y, count);
}
void apply_float64(int64_t function, const double* x, double* y, int64_t count) {
    apply(function, x, y, count);
}
int64_t lane_sums_float32(const float* x, float* y) { return sum_lanes(x, y); }
int64_t lane_sums_float64(const double* x, double* y) { return sum_lanes(x, y); }

void to_bf16(const float* x, bf16* vectors, bf16* scalars, int64_t count) {
    constexpr int64_t lanes = Lanes<float>::count;
    for (int64_t i = 0; i < count; i += lanes) {
        const int part = int(count - i < lanes ? count - i : lanes);
        store_part(vectors + i, load_part(x + i, part), part);
    }
    for (int64_t i = 0; i < count; i++) from_real(x[i], scalars + i);
}
void from_bf16(const bf16* x, float* vectors, float* scalars, int64_t count) {
    constexpr int64_t lanes = Lanes<float>::count;
    for (int64_t i = 0; i < count; i += lanes) {
        const int part = int(count - i < lanes ? count - i : lanes);
        store_part(vectors + i, load_part(x + i, part), part);
    }
    for (int64_t i = 0; i < count; i++) scalars[i] = to_real(x[i]);
}
}
