// Residual add and RMSNorm, forward and backward, for the `cpu` backend.
//
// Rows are read twice, the second time from the first-level cache. The backward finds the root mean
// square anew, so that nothing but the stream has to be kept. Tiles of rows write their shares of
// the weight's gradient apart, and these are added in a fixed order, whatever the threads.
//
// R rows, D width.
#include <memory>

#include "simd.h"

// Contiguous; a missing tensor is null. `real` is what it is computed in.
struct Arguments {
    const void *x, *residual, *weight;      // (R, D) x_storage, (R, D) real, (D,) real
    const void *grad_normed, *grad_stream;  // (R, D) normed_storage, (R, D) real
    void* normed;                           // (R, D) normed_storage
    void* stream;                           // (R, D) real; null in the forward if x is it
    void *grad_residual, *grad_x;           // (R, D) real, x_storage; no grad_x if they are equal
    void *grad_weight, *shares;             // (D,) real, (tiles, D) real
    double eps;
    int64_t rows, width, tile_rows, x_storage, normed_storage, threads;
};

namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t tiles(const Arguments& a) { return (a.rows + a.tile_rows - 1) / a.tile_rows; }

template <class X, class Normed>
struct Rows {
    using real = typename Compute<X>::real;
    using vector = typename Lanes<real>::type;
    static constexpr int LANES = Lanes<real>::count;

    // Calls body(first, number) for each vector of a row.
    template <class Body>
    static inline __attribute__((always_inline)) void each(int64_t width, Body body) {
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) body(c, LANES);
        if (c < width) body(c, int(width - c));
    }

    static real scale(const Arguments& a, vector squares) {
        return 1 / std::sqrt(lane_sum(squares) / real(a.width) + real(a.eps));
    }

    static void forward(const Arguments& a, int64_t row) {
        const int64_t width = a.width, start = row * width;
        const X* x = static_cast<const X*>(a.x) + start;
        const real* residual = a.residual ? static_cast<const real*>(a.residual) + start : nullptr;
        real* stream = a.stream ? static_cast<real*>(a.stream) + start : nullptr;
        const real* weight = static_cast<const real*>(a.weight);
        Normed* normed = static_cast<Normed*>(a.normed) + start;
        vector squares{};
        each(width, [&](int64_t c, int n) {
            vector v = load_part(x + c, n);
            if (residual) v = load_part(residual + c, n) + v;
            if (stream) store_part(stream + c, v, n);
            squares += v * v;
        });
        const real factor = scale(a, squares);
        each(width, [=](int64_t c, int n) {
            const vector v = stream ? load_part(stream + c, n) : load_part(x + c, n);
            store_part(normed + c, v * factor * load_part(weight + c, n), n);
        });
    }

    // With r = 1 / rms: d stream = r (g - stream r^2 mean(g stream)), g = grad_normed weight.
    static void backward(const Arguments& a, int64_t row, real* share) {
        const int64_t width = a.width, start = row * width;
        const real* stream = static_cast<const real*>(a.stream) + start;
        const real* weight = static_cast<const real*>(a.weight);
        const Normed* grad_normed = static_cast<const Normed*>(a.grad_normed) + start;
        const real* grad_stream =
            a.grad_stream ? static_cast<const real*>(a.grad_stream) + start : nullptr;
        real* grad_residual = static_cast<real*>(a.grad_residual) + start;
        X* grad_x = a.grad_x ? static_cast<X*>(a.grad_x) + start : nullptr;
        vector squares{}, products{};
        each(width, [&](int64_t c, int n) {
            const vector v = load_part(stream + c, n);
            squares += v * v;
            products += load_part(grad_normed + c, n) * load_part(weight + c, n) * v;
        });
        const real factor = scale(a, squares);
        const real slope = factor * factor * lane_sum(products) / real(width);
        each(width, [=](int64_t c, int n) {
            const vector v = load_part(stream + c, n), sent = load_part(grad_normed + c, n);
            vector grad = factor * (sent * load_part(weight + c, n) - v * slope);
            // Rounded before the addition, as where autograd adds (activation checkpointing).
            MAMBA_FINISHED(grad);
            if (grad_stream) grad += load_part(grad_stream + c, n);
            store_part(grad_residual + c, grad, n);
            if (grad_x) store_part(grad_x + c, grad, n);
            store_part(share + c, load_part(share + c, n) + sent * (v * factor), n);
        });
    }

    static void run_forward(const Arguments& a) {
#pragma omp parallel for num_threads(int(a.threads)) if (a.threads > 1)
        for (int64_t row = 0; row < a.rows; row++) forward(a, row);
    }

    static void run_backward(const Arguments& a) {
        real* shares = static_cast<real*>(a.shares);
        real* grad_weight = static_cast<real*>(a.grad_weight);
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
        {
#pragma omp for
            for (int64_t tile = 0; tile < tiles(a); tile++) {
                real* share = shares + tile * a.width;
                memset(share, 0, size_t(a.width) * sizeof(real));
                const int64_t first = tile * a.tile_rows;
                for (int64_t row = first; row < smaller(first + a.tile_rows, a.rows); row++)
                    backward(a, row, share);
            }
#pragma omp for
            for (int64_t first = 0; first < a.width; first += 64) {
                double sums[64] = {};
                const int64_t count = smaller(64, a.width - first);
                for (int64_t tile = 0; tile < tiles(a); tile++) {
                    const real* share = shares + tile * a.width + first;
                    for (int64_t c = 0; c < count; c++) sums[c] += share[c];
                }
                for (int64_t c = 0; c < count; c++) grad_weight[first + c] = real(sums[c]);
            }
        }
    }

    static void run(const Arguments& a, bool is_forward) {
        is_forward ? run_forward(a) : run_backward(a);
    }
};

void run(const Arguments& a, bool is_forward) {
    if (a.x_storage == 2) return Rows<double, double>::run(a, is_forward);
    if (a.x_storage == 1)
        return a.normed_storage == 1 ? Rows<bf16, bf16>::run(a, is_forward)
                                     : Rows<bf16, float>::run(a, is_forward);
    a.normed_storage == 1 ? Rows<float, bf16>::run(a, is_forward)
                          : Rows<float, float>::run(a, is_forward);
}

}  // namespace

extern "C" {
int64_t rms_norm_arguments_bytes() { return sizeof(Arguments); }
void rms_norm_forward(const Arguments* a) { run(*a, true); }
void rms_norm_backward(const Arguments* a) { run(*a, false); }
}
