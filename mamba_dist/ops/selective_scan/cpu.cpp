// Selective scan of the `cpu` backend (arXiv 2312.00752, equations 2 and 4): forward, backward and
// the single step of decoding, with delta's bias and softplus, the skip D and the gate z inside.
//
// B batch, L length, E channels, N d_state, G groups. A block is one vector of adjacent channels of
// a group, a range the blocks that one thread handles together, a chunk CHUNK positions of a row.
// The forward keeps the states before each chunk; the backward rebuilds a chunk from there, and
// holds the decays and states of a few blocks and a few n at a time. What is summed over channels
// is summed over a range's blocks first, then over ranges in order: the partition follows from the
// shapes alone, so the number of threads changes no bit.

#include <cstdint>
#include <cstdlib>

#include "simd.h"

// One call's arguments: pointers, then strides and sizes in elements. Mirrored in cpu.py.
struct Call {
    const void *u, *delta, *z, *B, *C;
    const void *A, *D, *delta_bias, *initial_state, *seq_idx;
    void *y, *final_state, *chunk_states;
    const void *grad_y, *grad_final;
    void *du, *ddelta, *dz, *dB, *dC, *dA, *dD, *ddelta_bias, *dinitial;
    int64_t u_batch, u_row, delta_batch, delta_row, z_batch, z_row;
    int64_t B_batch, B_row, B_group, C_batch, C_row, C_group;
    int64_t grad_y_batch, grad_y_row, seq_idx_batch, seq_idx_row;
    int64_t batch, length, channels, d_state, groups;
    int64_t delta_softplus, seq_idx_bytes, storage, threads;
};

namespace {

#ifndef CHUNK_STEPS
#define CHUNK_STEPS 64
#endif
constexpr int64_t CHUNK = CHUNK_STEPS;
// Blocks taken through a chunk together. They share the vectors that sum over channels, and whole
// cache lines of bf16 rows.
#ifndef KBLK
#define KBLK 2
#endif
constexpr int PACK = KBLK;
// n handled together, with their states in registers.
#ifndef FWDN
#define FWDN 8
#endif
#ifndef BWDN
#define BWDN 4
#endif
constexpr int FORWARD_N = FWDN;
constexpr int BACKWARD_N = BWDN;
#ifndef RANGE_CH
#define RANGE_CH 256
#endif

template <class Real>
using Vector = typename Lanes<Real>::type;

template <class T>
T* memory(int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return static_cast<T*>(aligned_alloc(64, bytes));
}

// How the work is cut, from the shapes alone.
template <class Real>
struct Partition {
    int64_t per_group, blocks, range_blocks, ranges, tasks, chunks;

    explicit Partition(const Call& c) {
        constexpr int64_t lanes = Lanes<Real>::count;
        per_group = c.channels / c.groups;
        blocks = (per_group + lanes - 1) / lanes;
        range_blocks = RANGE_CH / lanes;
        ranges = (blocks + range_blocks - 1) / range_blocks;
        tasks = c.batch * c.groups * ranges;
        chunks = (c.length + CHUNK - 1) / CHUNK;
    }
};

// The row, group and blocks of one task.
template <class Real>
struct Range {
    int64_t row, group, index, first, blocks;

    Range(const Partition<Real>& p, const Call& c, int64_t task) {
        index = task % p.ranges;
        group = task / p.ranges % c.groups;
        row = task / p.ranges / c.groups;
        first = index * p.range_blocks;
        blocks = p.blocks - first < p.range_blocks ? p.blocks - first : p.range_blocks;
    }
};

// Adjacent channels: where they start in a row, and how many of the block's lanes are channels.
template <class Real>
struct Block {
    int64_t channel;
    int count;

    Block(const Partition<Real>& p, int64_t group, int64_t block) {
        constexpr int64_t lanes = Lanes<Real>::count;
        int64_t left = p.per_group - block * lanes;
        channel = group * p.per_group + block * lanes;
        count = int(left < 0 ? 0 : left < lanes ? left : lanes);
    }
    template <class Storage>
    inline __attribute__((always_inline)) Vector<Real> get(const Storage* row) const {
        return count ? load_part(row + channel, count) : Vector<Real>{};
    }
    template <class Storage>
    inline __attribute__((always_inline)) void put(Storage* row, Vector<Real> v) const {
        if (count) store_part(row + channel, v, count);
    }
    // One n of an (E, N) matrix: the lanes lie N apart.
    Vector<Real> column(const Real* matrix, int64_t d_state, int64_t n) const {
        Vector<Real> v{};
        for (int i = 0; i < count; i++) v[i] = matrix[(channel + i) * d_state + n];
        return v;
    }
    void put_column(Real* matrix, int64_t d_state, int64_t n, Vector<Real> v) const {
        for (int i = 0; i < count; i++) matrix[(channel + i) * d_state + n] = v[i];
    }
};

// One chunk of one row: its B and C in the compute type, and where documents start.
template <class Storage>
struct Chunk {
    using Real = typename Compute<Storage>::real;
    int64_t start;
    int steps;
    bool reset[CHUNK];
    Real *B, *C;

    void load(const Call& c, int64_t row, int64_t group, int64_t index) {
        start = index * CHUNK;
        steps = int(c.length - start < CHUNK ? c.length - start : CHUNK);
        const Storage* b = (const Storage*)c.B + row * c.B_batch + group * c.B_group;
        const Storage* r = (const Storage*)c.C + row * c.C_batch + group * c.C_group;
        for (int t = 0; t < steps; t++) {
            for (int64_t n = 0; n < c.d_state; n++) {
                B[t * c.d_state + n] = to_real(b[(start + t) * c.B_row + n]);
                C[t * c.d_state + n] = to_real(r[(start + t) * c.C_row + n]);
            }
            reset[t] = starts_document(c, row, start + t);
        }
    }
    static bool starts_document(const Call& c, int64_t row, int64_t t) {
        if (!c.seq_idx || t == 0) return false;
        int64_t at = row * c.seq_idx_batch + t * c.seq_idx_row;
        int64_t before = at - c.seq_idx_row;
        if (c.seq_idx_bytes == 8) {
            return ((const int64_t*)c.seq_idx)[at] != ((const int64_t*)c.seq_idx)[before];
        }
        return ((const int32_t*)c.seq_idx)[at] != ((const int32_t*)c.seq_idx)[before];
    }
};

constexpr double LOG2_E = 1.4426950408889634;

// softplus(x) and its derivative, the sigmoid, from one exponential and one division.
template <class V>
MAMBA_INLINE void softplus_and_slope(V x, V* value, V* slope) {
    V e = exp_v(x < 0 ? x : -x);
    V inverse = 1 / (1 + e);
    *slope = x < 0 ? e * inverse : inverse;
    *value = at_least(x, V{}) + log1p_of_unit_v(e);
}

// ---- forward

template <class Storage>
struct Forward {
    using Real = typename Compute<Storage>::real;
    using V = Vector<Real>;
    const Call& c;
    const Partition<Real>& p;
    Chunk<Storage> chunk;
    V *rate, *state;              // (range_blocks, N): A log2(e), and the running states
    V *delta, *inflow, *y;        // (CHUNK, PACK)
    void* arena;

    Forward(const Call& call, const Partition<Real>& partition) : c(call), p(partition) {
        int64_t of_range = (p.range_blocks + PACK) * c.d_state;
        int64_t of_chunk = CHUNK * PACK;
        int64_t rows = CHUNK * c.d_state;
        arena = memory<V>(2 * of_range + 3 * of_chunk + 2 * rows / Lanes<Real>::count + 2);
        rate = static_cast<V*>(arena);
        state = rate + of_range;
        delta = state + of_range;
        inflow = delta + of_chunk;
        y = inflow + of_chunk;
        chunk.B = reinterpret_cast<Real*>(y + of_chunk);
        chunk.C = chunk.B + rows;
    }
    ~Forward() { free(arena); }

    void run(const Range<Real>& range) {
        load_range(range);
        for (int64_t index = 0; index < p.chunks; index++) {
            chunk.load(c, range.row, range.group, index);
            for (int64_t i = 0; i < range.blocks; i += PACK) {
                if (c.chunk_states) keep(range, index, i);
                stage(range, i);
                for (int k = 0; k < PACK; k++) sweep(i, k);
                finish(range, i);
            }
        }
        if (c.final_state) {
            for (int64_t i = 0; i < range.blocks; i++) {
                Block<Real> block(p, range.group, range.first + i);
                Real* to = (Real*)c.final_state + range.row * c.channels * c.d_state;
                for (int64_t n = 0; n < c.d_state; n++) {
                    block.put_column(to, c.d_state, n, state[i * c.d_state + n]);
                }
            }
        }
    }

    void load_range(const Range<Real>& range) {
        const Real* from = (const Real*)c.initial_state;
        if (from) from += range.row * c.channels * c.d_state;
        for (int64_t i = 0; i < range.blocks + PACK - 1; i++) {
            Block<Real> block(p, range.group, range.first + i);
            for (int64_t n = 0; n < c.d_state; n++) {
                V a = block.column((const Real*)c.A, c.d_state, n);
                rate[i * c.d_state + n] = a * Real(LOG2_E);
                state[i * c.d_state + n] = from ? block.column(from, c.d_state, n) : V{};
            }
        }
    }

    void keep(const Range<Real>& range, int64_t index, int64_t i) {
        Real* to = (Real*)c.chunk_states;
        to += (range.row * p.chunks + index) * c.d_state * c.channels;
        for (int k = 0; k < PACK && i + k < range.blocks; k++) {
            Block<Real> block(p, range.group, range.first + i + k);
            for (int64_t n = 0; n < c.d_state; n++) {
                block.put(to + n * c.channels, state[(i + k) * c.d_state + n]);
            }
        }
    }

    void stage(const Range<Real>& range, int64_t i) {
        for (int k = 0; k < PACK; k++) {
            Block<Real> block(p, range.group, range.first + i + k);
            V bias = c.delta_bias ? block.get((const Real*)c.delta_bias) : V{};
            V skip = c.D ? block.get((const Real*)c.D) : V{};
            const Storage* u = (const Storage*)c.u + range.row * c.u_batch + chunk.start * c.u_row;
            const Storage* raw = (const Storage*)c.delta;
            raw += range.row * c.delta_batch + chunk.start * c.delta_row;
            for (int t = 0; t < chunk.steps; t++) {
                V x = block.get(u + t * c.u_row), d = block.get(raw + t * c.delta_row) + bias;
                if (c.delta_softplus) d = softplus_v(d);
                delta[t * PACK + k] = d;
                inflow[t * PACK + k] = d * x;
                y[t * PACK + k] = skip * x;
            }
        }
    }

    void sweep(int64_t i, int k) {
        int64_t n = 0, at = (i + k) * c.d_state;
        for (; n + FORWARD_N <= c.d_state; n += FORWARD_N) {
            sweep_n<FORWARD_N>(rate + at + n, state + at + n, n, k);
        }
        for (; n + 4 <= c.d_state; n += 4) sweep_n<4>(rate + at + n, state + at + n, n, k);
        for (; n < c.d_state; n++) sweep_n<1>(rate + at + n, state + at + n, n, k);
    }

    template <int COUNT>
    __attribute__((noinline)) void sweep_n(const V* a, V* h_end, int64_t first, int k) {
        constexpr int STEP = COUNT < 4 ? COUNT : 4;
        const int64_t d_state = c.d_state;
        const int steps = chunk.steps;
        const Real *B = chunk.B + first, *C = chunk.C + first;
        const V *ds = delta + k, *xs = inflow + k;
        V* ys = y + k;
        V h[COUNT];
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; j++) h[j] = h_end[j];
        for (int t = 0; t < steps; t++) {
            if (__builtin_expect(chunk.reset[t], 0)) {
#pragma GCC unroll 16
                for (int j = 0; j < COUNT; j++) h[j] = V{};
            }
            V d = ds[t * PACK], x = xs[t * PACK], sum = ys[t * PACK];
#pragma GCC unroll 16
            for (int q = 0; q < COUNT; q += STEP) {
                V decay[STEP];
#pragma GCC unroll 16
                for (int j = 0; j < STEP; j++) decay[j] = d * a[q + j];
                exp2_each(decay);
#pragma GCC unroll 16
                for (int j = 0; j < STEP; j++) h[q + j] = decay[j] * h[q + j] + x * B[q + j];
#pragma GCC unroll 16
                for (int j = 0; j < STEP; j++) sum += h[q + j] * C[q + j];
            }
            ys[t * PACK] = sum;
            B += d_state;
            C += d_state;
        }
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; j++) h_end[j] = h[j];
    }

    void finish(const Range<Real>& range, int64_t i) {
        for (int k = 0; k < PACK && i + k < range.blocks; k++) {
            Block<Real> block(p, range.group, range.first + i + k);
            Storage* out = (Storage*)c.y + (range.row * c.length + chunk.start) * c.channels;
            const Storage* z = (const Storage*)c.z;
            if (z) z += range.row * c.z_batch + chunk.start * c.z_row;
            for (int t = 0; t < chunk.steps; t++) {
                V value = y[t * PACK + k];
                if (z) {
                    V gate = block.get(z + t * c.z_row);
                    value *= gate * sigmoid_v(gate);
                }
                block.put(out + t * c.channels, value);
            }
        }
    }
};

// ---- backward

template <class Storage>
struct Backward {
    using Real = typename Compute<Storage>::real;
    using V = Vector<Real>;
    const Call& c;
    const Partition<Real>& p;
    Chunk<Storage> chunk;
    V *rate, *adjoint, *rate_sum;   // (range_blocks, N): A log2(e), adjoint of the state, grad of A
    V *skip_sum, *bias_sum;         // (range_blocks)
    V *start;                       // (PACK, N): states before the chunk
    V *u, *delta, *slope, *inflow, *dy, *y, *dz;  // (CHUNK, PACK)
    V *d_inflow, *d_exponent;       // (CHUNK, PACK): gradients of delta u and, by A, of the exponents
    V *kept;                        // (CHUNK, PACK, BACKWARD_N, 2): decay, state before the step
    V *B_sum, *C_sum;               // (CHUNK, N)
    Real *B_part, *C_part;          // (B, ranges, G, L, N)
    Real *A_part, *D_part, *bias_part;  // (B, G, blocks, N, lanes); (B, G, blocks, lanes)
    void* arena;

    Backward(const Call& call, const Partition<Real>& partition) : c(call), p(partition) {
        int64_t of_blocks = p.range_blocks + PACK, of_range = of_blocks * c.d_state;
        int64_t of_chunk = CHUNK * PACK, rows = CHUNK * c.d_state;
        constexpr int lanes = Lanes<Real>::count;
        arena = memory<V>(3 * of_range + 2 * of_blocks + PACK * c.d_state + 9 * of_chunk +
                          2 * of_chunk * BACKWARD_N + 2 * rows + 2 * rows / lanes + 2 + lanes);
        V* next = static_cast<V*>(arena);
        auto take = [&next](int64_t count) { return (next += count) - count; };
        rate = take(of_range), adjoint = take(of_range), rate_sum = take(of_range);
        skip_sum = take(of_blocks), bias_sum = take(of_blocks);
        start = take(PACK * c.d_state);
        u = take(of_chunk), delta = take(of_chunk), slope = take(of_chunk);
        inflow = take(of_chunk), dy = take(of_chunk), y = take(of_chunk), dz = take(of_chunk);
        d_inflow = take(of_chunk), d_exponent = take(of_chunk);
        kept = take(2 * of_chunk * BACKWARD_N);
        B_sum = take(rows + lanes), C_sum = take(rows);
        chunk.B = reinterpret_cast<Real*>(next);
        chunk.C = chunk.B + rows;
    }
    ~Backward() { free(arena); }

    void run(const Range<Real>& range) {
        load_range(range);
        for (int64_t index = p.chunks - 1; index >= 0; index--) {
            chunk.load(c, range.row, range.group, index);
            memset(B_sum, 0, size_t(chunk.steps * c.d_state) * sizeof(V));
            memset(C_sum, 0, size_t(chunk.steps * c.d_state) * sizeof(V));
            for (int64_t i = 0; i < range.blocks; i += PACK) {
                load_start(range, index, i);
                stage(range, i);
                if (c.z) sweep<true>(i);
                else sweep<false>(i);
                finish(range, i);
            }
            store_sums(range);
        }
        store_range(range);
    }

    void load_range(const Range<Real>& range) {
        const Real* from = (const Real*)c.grad_final;
        if (from) from += range.row * c.channels * c.d_state;
        for (int64_t i = 0; i < range.blocks + PACK - 1; i++) {
            Block<Real> block(p, range.group, range.first + i);
            for (int64_t n = 0; n < c.d_state; n++) {
                V a = block.column((const Real*)c.A, c.d_state, n);
                rate[i * c.d_state + n] = a * Real(LOG2_E);
                adjoint[i * c.d_state + n] = from ? block.column(from, c.d_state, n) : V{};
                rate_sum[i * c.d_state + n] = V{};
            }
            skip_sum[i] = bias_sum[i] = V{};
        }
    }

    void load_start(const Range<Real>& range, int64_t index, int64_t i) {
        const Real* from = (const Real*)c.chunk_states;
        from += (range.row * p.chunks + index) * c.d_state * c.channels;
        for (int k = 0; k < PACK; k++) {
            Block<Real> block(p, range.group, range.first + i + k);
            for (int64_t n = 0; n < c.d_state; n++) {
                start[k * c.d_state + n] = block.get(from + n * c.channels);
            }
        }
    }

    void stage(const Range<Real>& range, int64_t i) {
        const Storage* us = (const Storage*)c.u + range.row * c.u_batch + chunk.start * c.u_row;
        const Storage* raw = (const Storage*)c.delta + range.row * c.delta_batch;
        raw += chunk.start * c.delta_row;
        const Storage* grad = (const Storage*)c.grad_y + range.row * c.grad_y_batch;
        grad += chunk.start * c.grad_y_row;
        const Storage* z = (const Storage*)c.z;
        if (z) z += range.row * c.z_batch + chunk.start * c.z_row;
        for (int k = 0; k < PACK; k++) {
            Block<Real> block(p, range.group, range.first + i + k);
            V bias = c.delta_bias ? block.get((const Real*)c.delta_bias) : V{};
            V skip = c.D ? block.get((const Real*)c.D) : V{};
            for (int t = 0; t < chunk.steps; t++) {
                int at = t * PACK + k;
                V x = block.get(us + t * c.u_row), d = block.get(raw + t * c.delta_row) + bias;
                V g = block.get(grad + t * c.grad_y_row), s = V{} + 1;
                if (c.delta_softplus) softplus_and_slope(d, &d, &s);
                u[at] = x, delta[at] = d, slope[at] = s, inflow[at] = d * x;
                if (z) {
                    V gate = block.get(z + t * c.z_row), open = sigmoid_v(gate);
                    dz[at] = g * open * (1 + gate * (1 - open));  // silu' = s (1 + z (1 - s))
                    y[at] = skip * x;
                    g *= gate * open;
                }
                dy[at] = g;
                d_inflow[at] = d_exponent[at] = V{};
            }
        }
    }

    template <bool GATED>
    void sweep(int64_t i) {
        int64_t n = 0;
        for (; n + BACKWARD_N <= c.d_state; n += BACKWARD_N) {
            rebuild<GATED, BACKWARD_N>(i, n);
            reverse<BACKWARD_N>(i, n);
        }
        for (; n < c.d_state; n++) {
            rebuild<GATED, 1>(i, n);
            reverse<1>(i, n);
        }
    }

    // Decays and states of the chunk, the output before the gate, and C's gradient.
    template <bool GATED, int COUNT>
    __attribute__((noinline)) void rebuild(int64_t i, int64_t first) {
        const int64_t d_state = c.d_state;
        const int steps = chunk.steps;
        const V* a = rate + i * d_state + first;
        const Real *B = chunk.B + first, *C = chunk.C + first;
        V *to = kept, *sum = C_sum + first;
        V h[PACK][COUNT];
#pragma GCC unroll 16
        for (int k = 0; k < PACK; k++) {
#pragma GCC unroll 16
            for (int j = 0; j < COUNT; j++) h[k][j] = start[k * d_state + first + j];
        }
        for (int t = 0; t < steps; t++) {
            if (__builtin_expect(chunk.reset[t], 0)) {
#pragma GCC unroll 16
                for (int k = 0; k < PACK; k++) {
#pragma GCC unroll 16
                    for (int j = 0; j < COUNT; j++) h[k][j] = V{};
                }
            }
            V sums[COUNT];
#pragma GCC unroll 16
            for (int k = 0; k < PACK; k++) {
                V d = delta[t * PACK + k], x = inflow[t * PACK + k], g = dy[t * PACK + k], decay[COUNT];
#pragma GCC unroll 16
                for (int j = 0; j < COUNT; j++) decay[j] = d * a[k * d_state + j];
                exp2_each(decay);
                V out;
                if (GATED) out = y[t * PACK + k];
#pragma GCC unroll 16
                for (int j = 0; j < COUNT; j++) {
                    to[2 * j] = decay[j];
                    to[2 * j + 1] = h[k][j];
                    h[k][j] = decay[j] * h[k][j] + x * B[j];
                    sums[j] = k ? sums[j] + g * h[k][j] : sum[j] + g * h[k][j];
                    if (GATED) out += h[k][j] * C[j];
                }
                if (GATED) y[t * PACK + k] = out;
                to += 2 * COUNT;
            }
#pragma GCC unroll 16
            for (int j = 0; j < COUNT; j++) sum[j] = sums[j];
            B += d_state, C += d_state, sum += d_state;
        }
    }

    // The adjoint recurrence, from the chunk's end to its start.
    template <int COUNT>
    __attribute__((noinline)) void reverse(int64_t i, int64_t first) {
        const int64_t d_state = c.d_state;
        const int steps = chunk.steps;
        const V* a = rate + i * d_state + first;
        V *end = adjoint + i * d_state + first, *a_sum = rate_sum + i * d_state + first;
        V g[PACK][COUNT], da[PACK][COUNT];
#pragma GCC unroll 16
        for (int k = 0; k < PACK; k++) {
#pragma GCC unroll 16
            for (int j = 0; j < COUNT; j++) {
                g[k][j] = end[k * d_state + j];
                da[k][j] = V{};
            }
        }
        const Real *B = chunk.B + steps * d_state + first, *C = chunk.C + steps * d_state + first;
        V *from = kept + steps * PACK * COUNT * 2, *sum = B_sum + steps * d_state + first;
        for (int t = steps - 1; t >= 0; t--) {
            B -= d_state, C -= d_state, sum -= d_state, from -= PACK * COUNT * 2;
            V sums[COUNT];
#pragma GCC unroll 16
            for (int k = 0; k < PACK; k++) {
                V o = dy[t * PACK + k], d = delta[t * PACK + k], x = inflow[t * PACK + k];
                V of_inflow = d_inflow[t * PACK + k], of_exponent = d_exponent[t * PACK + k];
#pragma GCC unroll 16
                for (int j = 0; j < COUNT; j++) {
                    V whole = g[k][j] + o * C[j];
                    of_inflow += whole * B[j];
                    sums[j] = k ? sums[j] + whole * x : sum[j] + whole * x;
                    V sent = whole * from[(k * COUNT + j) * 2];
                    V product = sent * from[(k * COUNT + j) * 2 + 1];
                    of_exponent += product * a[k * d_state + j];
                    da[k][j] += product * d;
                    g[k][j] = sent;
                }
                d_inflow[t * PACK + k] = of_inflow, d_exponent[t * PACK + k] = of_exponent;
            }
#pragma GCC unroll 16
            for (int j = 0; j < COUNT; j++) sum[j] = sums[j];
            if (__builtin_expect(chunk.reset[t], 0)) {
#pragma GCC unroll 16
                for (int k = 0; k < PACK; k++) {
#pragma GCC unroll 16
                    for (int j = 0; j < COUNT; j++) g[k][j] = V{};
                }
            }
        }
#pragma GCC unroll 16
        for (int k = 0; k < PACK; k++) {
#pragma GCC unroll 16
            for (int j = 0; j < COUNT; j++) {
                end[k * d_state + j] = g[k][j];
                a_sum[k * d_state + j] += da[k][j];
            }
        }
    }

    void finish(const Range<Real>& range, int64_t i) {
        int64_t row = (range.row * c.length + chunk.start) * c.channels;
        for (int k = 0; k < PACK && i + k < range.blocks; k++) {
            Block<Real> block(p, range.group, range.first + i + k);
            V skip = c.D ? block.get((const Real*)c.D) : V{};
            V of_skip{}, of_bias{};
            for (int t = 0; t < chunk.steps; t++) {
                int at = t * PACK + k;
                int64_t to = row + t * c.channels;
                V g = d_inflow[at];
                // The exponents were taken with A log2(e).
                V d = (d_exponent[at] * Real(1 / LOG2_E) + g * u[at]) * slope[at];
                of_bias += d;
                of_skip += dy[at] * u[at];
                block.put((Storage*)c.ddelta + to, d);
                block.put((Storage*)c.du + to, g * delta[at] + dy[at] * skip);
                if (c.z) block.put((Storage*)c.dz + to, dz[at] * y[at]);
            }
            skip_sum[i + k] += of_skip;
            bias_sum[i + k] += of_bias;
        }
    }

    void store_sums(const Range<Real>& range) {
        constexpr int lanes = Lanes<Real>::count;
        int64_t count = chunk.steps * c.d_state;
        int64_t at = ((range.row * p.ranges + range.index) * c.groups + range.group) * c.length;
        Real *b = B_part + (at + chunk.start) * c.d_state, *r = C_part + (at + chunk.start) * c.d_state;
        for (int64_t i = 0; i < count; i += lanes) {
            int part = int(count - i < lanes ? count - i : lanes);
            store_part(b + i, lane_sums(B_sum + i), part);
            store_part(r + i, lane_sums(C_sum + i), part);
        }
    }

    void store_range(const Range<Real>& range) {
        constexpr int lanes = Lanes<Real>::count;
        for (int64_t i = 0; i < range.blocks; i++) {
            Block<Real> block(p, range.group, range.first + i);
            int64_t at = (range.row * c.groups + range.group) * p.blocks + range.first + i;
            for (int64_t n = 0; n < c.d_state; n++) {
                store(A_part + (at * c.d_state + n) * lanes, rate_sum[i * c.d_state + n]);
                if (!c.dinitial) continue;
                Real* to = (Real*)c.dinitial + range.row * c.channels * c.d_state;
                block.put_column(to, c.d_state, n, adjoint[i * c.d_state + n]);
            }
            store(D_part + at * lanes, skip_sum[i]);
            store(bias_part + at * lanes, bias_sum[i]);
        }
    }
};

template <class Storage>
int run_forward(const Call& c) {
    using Real = typename Compute<Storage>::real;
    Partition<Real> p(c);
    int failed = 0;
#pragma omp parallel num_threads(int(c.threads < p.tasks ? c.threads : p.tasks))
    {
        Forward<Storage> forward(c, p);
        if (!forward.arena) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.tasks; task++) {
            if (forward.arena) forward.run(Range<Real>(p, c, task));
        }
    }
    return failed;
}

template <class Storage>
int run_backward(const Call& c) {
    using Real = typename Compute<Storage>::real;
    using V = Vector<Real>;
    constexpr int lanes = Lanes<Real>::count;
    Partition<Real> p(c);
    int64_t positions = c.batch * c.groups * c.length * c.d_state;
    int64_t all_lanes = c.batch * c.groups * p.blocks * lanes;
    Real* parts = memory<Real>(2 * positions * p.ranges + all_lanes * (c.d_state + 2));
    if (!parts) return 1;
    int failed = 0;
#pragma omp parallel num_threads(int(c.threads < p.tasks ? c.threads : p.tasks))
    {
        Backward<Storage> backward(c, p);
        if (!backward.arena) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        Real* B_part = backward.B_part = parts;
        Real* C_part = backward.C_part = B_part + positions * p.ranges;
        Real* A_part = backward.A_part = C_part + positions * p.ranges;
        Real* D_part = backward.D_part = A_part + all_lanes * c.d_state;
        Real* bias_part = backward.bias_part = D_part + all_lanes;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.tasks; task++) {
            if (backward.arena) backward.run(Range<Real>(p, c, task));
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < c.batch * c.length; at++) {
            int64_t row = at / c.length, t = at % c.length;
            for (int64_t group = 0; group < c.groups; group++) {
                int64_t stride = c.groups * c.length * c.d_state;
                int64_t from = row * p.ranges * stride + (group * c.length + t) * c.d_state;
                for (int64_t n = 0; n < c.d_state; n++) {
                    Real b = 0, r = 0;
                    for (int64_t i = 0; i < p.ranges; i++) {
                        b += B_part[from + i * stride + n];
                        r += C_part[from + i * stride + n];
                    }
                    int64_t to = (at * c.groups + group) * c.d_state + n;
                    from_real(b, (Storage*)c.dB + to);
                    from_real(r, (Storage*)c.dC + to);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < c.groups * p.blocks; at++) {
            Block<Real> block(p, at / p.blocks, at % p.blocks);
            int64_t stride = c.groups * p.blocks;
            auto sum = [&](const Real* part, int64_t width, int64_t n) {
                V total{};
                for (int64_t row = 0; row < c.batch; row++) {
                    total += load(part + ((row * stride + at) * width + n) * lanes);
                }
                return total;
            };
            for (int64_t n = 0; n < c.d_state; n++) {
                block.put_column((Real*)c.dA, c.d_state, n, sum(A_part, c.d_state, n));
            }
            if (c.dD) block.put((Real*)c.dD, sum(D_part, 1, 0));
            if (c.ddelta_bias) block.put((Real*)c.ddelta_bias, sum(bias_part, 1, 0));
        }
    }
    free(parts);
    return failed;
}

// ---- single step

// One position without a gradient. The vectors run over n, as the state's memory does, so nothing
// is transposed.
template <class Storage>
void step_block(const Call& c, int64_t row, const Block<typename Compute<Storage>::real>& block) {
    using Real = typename Compute<Storage>::real;
    using V = Vector<Real>;
    constexpr int lanes = Lanes<Real>::count;
    const int64_t d_state = c.d_state;
    V x = block.get((const Storage*)c.u + row * c.u_batch);
    V d = block.get((const Storage*)c.delta + row * c.delta_batch);
    if (c.delta_bias) d += block.get((const Real*)c.delta_bias);
    if (c.delta_softplus) d = softplus_v(d);
    V exponent = d * Real(LOG2_E), inflow = d * x, out[lanes];
    for (int i = 0; i < lanes; i++) out[i] = V{};
    int64_t group = block.channel / (c.channels / c.groups);
    const Storage* B = (const Storage*)c.B + row * c.B_batch + group * c.B_group;
    const Storage* C = (const Storage*)c.C + row * c.C_batch + group * c.C_group;
    for (int64_t n = 0; n < d_state; n += lanes) {
        int part = int(d_state - n < lanes ? d_state - n : lanes);
        V b = load_part(B + n, part), r = load_part(C + n, part);
        for (int i = 0; i < block.count; i += 4) {
            V decay[4];
            int width = block.count - i < 4 ? block.count - i : 4;
            int64_t at = (block.channel + i) * d_state + n;
            int64_t state = row * c.channels * d_state + at;
            for (int j = 0; j < 4; j++) {
                decay[j] = j < width ? exponent[i + j] * load_part((const Real*)c.A + at + j * d_state, part) : V{};
            }
            exp2_each(decay);
            for (int j = 0; j < width; j++) {
                V h = inflow[i + j] * b;
                if (c.initial_state) {
                    h += decay[j] * load_part((const Real*)c.initial_state + state + j * d_state, part);
                }
                store_part((Real*)c.final_state + state + j * d_state, h, part);
                out[i + j] += h * r;
            }
        }
    }
    V y = lane_sums(out);
    if (c.D) y += block.get((const Real*)c.D) * x;
    if (c.z) {
        V gate = block.get((const Storage*)c.z + row * c.z_batch);
        y *= gate * sigmoid_v(gate);
    }
    block.put((Storage*)c.y + row * c.channels, y);
}

// Below so many elements of the state a second thread costs more than it saves.
constexpr int64_t STEP_PARALLEL = 1 << 16;

template <class Storage>
int run_step(const Call& c) {
    using Real = typename Compute<Storage>::real;
    Partition<Real> p(c);
    int64_t work = c.batch * c.channels * c.d_state, blocks = c.groups * p.blocks;
    int threads = int(work < STEP_PARALLEL ? 1 : c.threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < c.batch * blocks; at++) {
        Block<Real> block(p, at % blocks / p.blocks, at % p.blocks);
        step_block<Storage>(c, at / blocks, block);
    }
    return 0;
}

}  // namespace

// Each gives 0, or 1 when there was not enough memory. `storage` is 0 for fp32, 1 bf16, 2 fp64.
#define EXPORT(NAME)                                        \
    extern "C" int selective_scan_##NAME(const Call* c) {   \
        if (c->storage == 1) return run_##NAME<bf16>(*c);   \
        if (c->storage == 2) return run_##NAME<double>(*c); \
        return run_##NAME<float>(*c);                       \
    }
EXPORT(forward)
EXPORT(backward)
EXPORT(step)

extern "C" int64_t selective_scan_call_bytes() { return sizeof(Call); }
extern "C" int64_t selective_scan_chunk_steps() { return CHUNK; }
