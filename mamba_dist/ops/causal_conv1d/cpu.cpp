// Causal depthwise convolution with bias and SiLU for the `cpu` backend: how the units of unit.h are
// shared by threads, the sums of their shares, and the single step of decoding.
#include "unit.h"

namespace {

// One step of decoding: channel by channel, as the states lie.
template <class Storage, int Width>
void step(const Arguments& a, int64_t row, int64_t first, int64_t channels) {
    using real = typename Compute<Storage>::real;
    constexpr int LANES = Lanes<real>::count;
    const int64_t width = Width ? Width : a.width, kept = width - 1;
    const Storage* x = static_cast<const Storage*>(a.x) + row * a.x_batch_stride;
    const real* weight = static_cast<const real*>(a.weight);
    const real* bias = static_cast<const real*>(a.bias);
    const real* before = static_cast<const real*>(a.initial_state);
    real* after = static_cast<real*>(a.final_state);
    for (int64_t block = first; block < first + channels; block += LANES) {
        const int n = int(smaller(LANES, first + channels - block));
        real sums[LANES] = {};
        for (int i = 0; i < n; i++) {
            const int64_t c = block + i, in_state = (row * a.channels + c) * kept;
            const real now = to_real(x[c]);
            real sum = (bias ? bias[c] : 0) + weight[c * width + kept] * now;
            if (before)
                for (int64_t k = 0; k < kept; k++)
                    sum += weight[c * width + k] * before[in_state + k];
            sums[i] = sum;
            if (!after || !kept) continue;
            for (int64_t k = 0; k < kept - 1; k++)
                after[in_state + k] = before ? before[in_state + k + 1] : 0;
            after[in_state + kept - 1] = now;
        }
        auto p = load(sums);
        Storage* y = static_cast<Storage*>(a.y) + row * a.channels + block;
        store_part(y, a.silu ? silu_v(p) : p, n);
    }
}

// These give 0, or 1 when there was not enough memory.
template <class Storage, int Width>
int forward(const Arguments& a) {
    const int64_t blocks = pieces(a.channels, BLOCK), units = Unit<Storage, Width>::count(a);
    if (a.length == 1) {
#pragma omp parallel for num_threads(int(a.threads)) if (a.threads > 1)
        for (int64_t i = 0; i < units; i++) {
            const int64_t first = i % blocks * BLOCK;
            step<Storage, Width>(a, i / blocks, first, smaller(BLOCK, a.channels - first));
        }
        return 0;
    }
    int failed = 0;
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
        Unit<Storage, Width> unit(a);
        if (!unit.is_ready()) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp for
        for (int64_t i = 0; i < units; i++) {
            if (!unit.is_ready()) continue;
            unit.enter(i);
            unit.forward();
        }
    }
    return failed;
}

// In fp64, since long batches have thousands of shares.
template <class Storage>
void add_shares(const Arguments& a, int64_t first) {
    using real = typename Compute<Storage>::real;
    constexpr int COUNT = 32;
    real* grad_weight = static_cast<real*>(a.grad_weight);
    real* grad_bias = static_cast<real*>(a.grad_bias);
    const int64_t shares = a.batch * pieces(a.length, a.tile_steps);
    for (int64_t j = 0; j <= a.width; j++) {
        double sums[COUNT] = {};
        for (int64_t i = 0; i < shares; i++) {
            const real* share = static_cast<const real*>(a.shares) + first +
                                (i * (a.width + 1) + j) * a.share_channels;
            for (int c = 0; c < COUNT; c++) sums[c] += share[c];
        }
        for (int64_t c = first; c < smaller(first + COUNT, a.channels); c++) {
            const real sum = real(sums[Group<Storage>::place(c) - first]);
            if (j < a.width)
                grad_weight[c * a.width + a.width - 1 - j] = sum;
            else if (grad_bias)
                grad_bias[c] = sum;
        }
    }
}

template <class Storage, int Width>
int backward(const Arguments& a) {
    const int64_t units = Unit<Storage, Width>::count(a);
    int failed = 0;
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
        Unit<Storage, Width> unit(a);
        if (!unit.is_ready()) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp for
        for (int64_t i = 0; i < units; i++) {
            if (!unit.is_ready()) continue;
            unit.enter(i);
            unit.backward();
        }
#pragma omp for
        for (int64_t c = 0; c < a.channels; c += 32) add_shares<Storage>(a, c);
    }
    return failed;
}

template <class Storage>
int run(const Arguments& a, bool is_forward) {
    switch (a.width) {
        case 2: return is_forward ? forward<Storage, 2>(a) : backward<Storage, 2>(a);
        case 3: return is_forward ? forward<Storage, 3>(a) : backward<Storage, 3>(a);
        case 4: return is_forward ? forward<Storage, 4>(a) : backward<Storage, 4>(a);
        default: return is_forward ? forward<Storage, 0>(a) : backward<Storage, 0>(a);
    }
}

int run(const Arguments& a, bool is_forward) {
    if (a.storage == 1) return run<bf16>(a, is_forward);
    if (a.storage == 2) return is_forward ? forward<double, 0>(a) : backward<double, 0>(a);
    return run<float>(a, is_forward);
}

}  // namespace

extern "C" {
int64_t causal_conv1d_arguments_bytes() { return sizeof(Arguments); }
int causal_conv1d_forward(const Arguments* a) { return run(*a, true); }
int causal_conv1d_backward(const Arguments* a) { return run(*a, false); }
}
