// Backward of the selective scan over one range; see layout.h for the words.
//
// Each chunk is taken once, from the last to the first. For a pack and a few n at a time `rebuild`
// runs forward from the saved state and keeps decays and states, `reverse` runs back over them.
#pragma once

#include "layout.h"

namespace {

// n handled together; PACK times as many states, or adjoints and their sums, are in registers.
constexpr int BACKWARD_N = 4;

// Sums that other ranges or rows add to.
template <class Real>
struct Partials {
    // (B, ranges, G, chunks, of each the groups of n, steps, n of the group)
    Real *B, *C;
    // (B, G, blocks, N, lanes), and without N
    Real *A, *D, *bias;
};

template <class Storage>
struct Backward {
    using Real = typename Compute<Storage>::real;
    using V = Vector<Real>;
    const Call& c;
    const Partition<Real>& p;
    const Partials<Real>& partials;
    Chunk<Storage> chunk;
    Ahead ahead;
    V *rate, *adjoint, *rate_sum;  // (range blocks, N): A log2(e), the state's adjoint, dA
    V *skip_sum, *bias_sum;        // (range blocks)
    V* start;                      // (PACK, N): states before the chunk
    // (CHUNK, PACK): inputs, the slope of softplus, the gradient of y before the gate, and what
    // turns y before the gate into dz
    V *u, *delta, *slope, *inflow, *dy, *y, *dz;
    V *d_inflow, *d_exponent;  // (CHUNK, PACK): gradients by delta u, by delta through the decay
    V* kept;                   // (CHUNK, PACK, n of the group, 2): decay and state before the step
    V *B_sum, *C_sum;          // (groups of n, CHUNK, n of the group)
    void* arena;               // null if there was not enough memory

    Backward(const Call& call, const Partition<Real>& partition, const Partials<Real>& sums)
        : c(call), p(partition), partials(sums) {
        const int64_t blocks = p.range_blocks + PACK, of_range = blocks * c.d_state;
        const int64_t of_chunk = CHUNK * PACK, rows = CHUNK * c.d_state;
        const int64_t of_kept = 2 * of_chunk * BACKWARD_N;
        V* next = memory<V>(3 * of_range + 2 * blocks + PACK * c.d_state + 9 * of_chunk + of_kept +
                            2 * rows + p.lanes + (2 * rows + p.lanes) / p.lanes);
        arena = next;
        auto take = [&next](int64_t count) { return (next += count) - count; };
        rate = take(of_range), adjoint = take(of_range), rate_sum = take(of_range);
        skip_sum = take(blocks), bias_sum = take(blocks), start = take(PACK * c.d_state);
        u = take(of_chunk), delta = take(of_chunk), slope = take(of_chunk);
        inflow = take(of_chunk), dy = take(of_chunk), y = take(of_chunk), dz = take(of_chunk);
        d_inflow = take(of_chunk), d_exponent = take(of_chunk), kept = take(of_kept);
        // Sums of lanes read whole vectors of vectors, past the last one of a short chunk.
        B_sum = take(rows), C_sum = take(rows + p.lanes);
        chunk.B = reinterpret_cast<Real*>(next), chunk.C = chunk.B + rows;
    }
    Backward(const Backward&) = delete;
    ~Backward() { free(arena); }

    void run(const Range<Real>& range) {
        load_range(range);
        for (int64_t index = p.chunks - 1; index >= 0; index--) {
            chunk.load(c, range.row, range.group, index);
            memset(B_sum, 0, size_t(2 * CHUNK * c.d_state + p.lanes) * sizeof(V));
            for (int64_t i = 0; i < range.blocks; i += PACK) {
                load_start(range, index, i);
                const bool bounded = stage(range, i);
                look_ahead(range, index, i);
                if (c.z) {
                    bounded ? sweep<true, true>(i) : sweep<true, false>(i);
                } else {
                    bounded ? sweep<false, true>(i) : sweep<false, false>(i);
                }
                finish(range, i);
            }
            store_sums(range, index);
        }
        store_range(range);
    }

    void load_range(const Range<Real>& range) {
        const Real* final = static_cast<const Real*>(c.grad_final);
        if (final) final += range.row * c.channels * c.d_state;
        for (int64_t i = 0; i < range.blocks + PACK - 1; i++) {
            const Block<Real> block(p, range.group, range.first + i);
            for (int64_t n = 0; n < c.d_state; n++) {
                V a = block.column(static_cast<const Real*>(c.A), c.d_state, n);
                rate[i * c.d_state + n] = a * Real(LOG2_E);
                adjoint[i * c.d_state + n] = block.column(final, c.d_state, n);
                rate_sum[i * c.d_state + n] = V{};
            }
            skip_sum[i] = bias_sum[i] = V{};
        }
    }

    void load_start(const Range<Real>& range, int64_t index, int64_t i) {
        const Real* from = static_cast<const Real*>(c.chunk_states);
        from += (range.row * p.chunks + index) * c.d_state * c.channels;
        for (int k = 0; k < PACK; k++) {
            const Block<Real> block(p, range.group, range.first + i + k);
            for (int64_t n = 0; n < c.d_state; n++) {
                start[k * c.d_state + n] = block.get(from + n * c.channels);
            }
        }
    }

    // Fills the pack's (CHUNK, PACK) arrays; whether its exponents may do without bounds.
    bool stage(const Range<Real>& range, int64_t i) {
        bool bounded = true;
        for (int k = 0; k < PACK; k++) {
            const Block<Real> block(p, range.group, range.first + i + k);
            const V* rates = rate + (i + k) * c.d_state;
            const bool whole = block.count == p.lanes;
            bounded &= whole ? stage_block<true>(range, block, rates, k)
                             : stage_block<false>(range, block, rates, k);
        }
        return bounded;
    }

    template <bool WHOLE>
    __attribute__((noinline)) bool stage_block(const Range<Real>& range, const Block<Real>& block,
                                               const V* rates, int k) {
        const int64_t row = range.row, from = chunk.start, channel = block.channel;
        const Rows<const Storage> us(c.u, row, c.u_batch, from, c.u_row, channel);
        const Rows<const Storage> raw(c.delta, row, c.delta_batch, from, c.delta_row, channel);
        const Rows<const Storage> grad(c.grad_y, row, c.grad_y_batch, from, c.grad_y_row, channel);
        const V bias = block.parameter(c.delta_bias);
        const bool softplus = c.delta_softplus;
        const int last = chunk.steps - 1, count = block.count;
        Bound<Real> bound(rates, c.d_state);
        for (int tile = 0; tile <= last; tile += TILE) {
            V d[TILE], s[TILE];
#pragma GCC unroll 16
            for (int j = 0; j < TILE; j++) {
                d[j] = raw.template get<WHOLE>(tile + j < last ? tile + j : last, count) + bias;
                s[j] = V{} + 1;
            }
            if (softplus) softplus_and_slope_each(d, s);
#pragma GCC unroll 16
            for (int j = 0; j < TILE; j++) {
                const int t = tile + j < last ? tile + j : last, at = (tile + j) * PACK + k;
                const V x = us.template get<WHOLE>(t, count);
                bound.see(d[j]);
                u[at] = x, delta[at] = d[j], slope[at] = s[j], inflow[at] = d[j] * x;
                dy[at] = grad.template get<WHOLE>(t, count);
            }
        }
        if (c.z) stage_gate<WHOLE>(range, block, k);
        return bound.holds();
    }

    template <bool WHOLE>
    void stage_gate(const Range<Real>& range, const Block<Real>& block, int k) {
        const int64_t row = range.row, from = chunk.start, channel = block.channel;
        const Rows<const Storage> z(c.z, row, c.z_batch, from, c.z_row, channel);
        const V skip = block.parameter(c.D);
        const int last = chunk.steps - 1, count = block.count;
        for (int tile = 0; tile <= last; tile += TILE) {
            V gate[TILE], open[TILE];
#pragma GCC unroll 16
            for (int j = 0; j < TILE; j++) {
                gate[j] = z.template get<WHOLE>(tile + j < last ? tile + j : last, count);
                open[j] = gate[j];
            }
            sigmoid_each(open);
#pragma GCC unroll 16
            for (int j = 0; j < TILE; j++) {
                const int at = (tile + j) * PACK + k;
                dz[at] = dy[at] * open[j] * (1 + gate[j] * (1 - open[j]));  // silu'(z)
                dy[at] *= gate[j] * open[j];
                y[at] = skip * u[at];
            }
        }
    }

    // The next pack of this chunk, else the first one of the chunk before.
    void look_ahead(const Range<Real>& range, int64_t index, int64_t i) {
        ahead.count = 0;
        i += PACK;
        if (i >= range.blocks) i = 0, index--;
        if (index < 0) return;
        const int64_t row = range.row, at = index * CHUNK, e = c.channels, batch = c.length * e;
        const int64_t first = Block<Real>(p, range.group, range.first + i).channel;
        ahead.add(Rows<const Storage>(c.u, row, c.u_batch, at, c.u_row, first));
        ahead.add(Rows<const Storage>(c.delta, row, c.delta_batch, at, c.delta_row, first));
        ahead.add(Rows<const Storage>(c.z, row, c.z_batch, at, c.z_row, first));
        ahead.add(Rows<const Storage>(c.grad_y, row, c.grad_y_batch, at, c.grad_y_row, first));
        ahead.add(Rows<const Storage>(c.du, row, batch, at, e, first));
        ahead.add(Rows<const Storage>(c.ddelta, row, batch, at, e, first));
        ahead.add(Rows<const Storage>(c.dz, row, batch, at, e, first));
    }

    template <bool GATED, bool BOUNDED>
    void sweep(int64_t i) {
        int64_t n = 0;
        for (; n + BACKWARD_N <= c.d_state; n += BACKWARD_N) {
            rebuild<GATED, BOUNDED, BACKWARD_N>(i, n);
            reverse<BACKWARD_N>(i, n);
        }
        for (; n < c.d_state; n++) {
            rebuild<GATED, BOUNDED, 1>(i, n);
            reverse<1>(i, n);
        }
    }

    // Decays and states of the chunk, the output before the gate, and C's gradient.
    template <bool GATED, bool BOUNDED, int COUNT>
    __attribute__((noinline)) void rebuild(int64_t i, int64_t first) {
        const int64_t d_state = c.d_state;
        const int steps = chunk.steps;
        const V* a = rate + i * d_state + first;
        const Real *B = chunk.B + first, *C = chunk.C + first;
        const Ahead::Lines next = ahead.turn(first / COUNT * 2, y);
        V *to = kept, *sum = C_sum + first * CHUNK;
        V h[PACK][COUNT];
#pragma GCC unroll 16
        for (int j = 0; j < PACK * COUNT; j++) {
            h[j / COUNT][j % COUNT] = start[j / COUNT * d_state + first + j % COUNT];
        }
        for (int t = 0; t < steps; t++, B += d_state, C += d_state, sum += COUNT) {
            if (__builtin_expect(chunk.reset[t], 0)) {
#pragma GCC unroll 16
                for (int j = 0; j < PACK * COUNT; j++) h[j / COUNT][j % COUNT] = V{};
            }
            next.fetch(t);
            V sums[COUNT];
#pragma GCC unroll 16
            for (int k = 0; k < PACK; k++, to += 2 * COUNT) {
                const int at = t * PACK + k;
                const V d = delta[at], x = inflow[at], g = dy[at];
                V decay[COUNT], out{};
                if (GATED) out = y[at];
#pragma GCC unroll 16
                for (int j = 0; j < COUNT; j++) decay[j] = d * a[k * d_state + j];
                decay_each<BOUNDED>(decay);
#pragma GCC unroll 16
                for (int j = 0; j < COUNT; j++) {
                    to[2 * j] = decay[j];
                    to[2 * j + 1] = h[k][j];
                    h[k][j] = decay[j] * h[k][j] + x * B[j];
                    sums[j] = (k ? sums[j] : sum[j]) + g * h[k][j];
                    if (GATED) out += h[k][j] * C[j];
                }
                if (GATED) y[at] = out;
            }
#pragma GCC unroll 16
            for (int j = 0; j < COUNT; j++) sum[j] = sums[j];
        }
    }

    // The adjoint recurrence, from the chunk's end to its start.
    template <int COUNT>
    __attribute__((noinline)) void reverse(int64_t i, int64_t first) {
        const int64_t d_state = c.d_state, at_rate = i * d_state + first;
        const Ahead::Lines next = ahead.turn(first / COUNT * 2 + 1, y);
        const int steps = chunk.steps;
        const V *a = rate + at_rate, *from = kept + steps * PACK * COUNT * 2;
        const Real *B = chunk.B + steps * d_state + first, *C = chunk.C + steps * d_state + first;
        V *end = adjoint + at_rate, *a_sum = rate_sum + at_rate;
        V* sum = B_sum + first * CHUNK + steps * COUNT;
        V g[PACK][COUNT], da[PACK][COUNT];
#pragma GCC unroll 16
        for (int j = 0; j < PACK * COUNT; j++) {
            g[j / COUNT][j % COUNT] = end[j / COUNT * d_state + j % COUNT];
            da[j / COUNT][j % COUNT] = V{};
        }
        for (int t = steps - 1; t >= 0; t--) {
            B -= d_state, C -= d_state, sum -= COUNT, from -= PACK * COUNT * 2;
            next.fetch(t);
            V sums[COUNT];
#pragma GCC unroll 16
            for (int k = 0; k < PACK; k++) {
                const int at = t * PACK + k;
                const V o = dy[at], d = delta[at], x = inflow[at];
                V by_inflow{}, by_exponent{};
                if (first) by_inflow = d_inflow[at], by_exponent = d_exponent[at];
#pragma GCC unroll 16
                for (int j = 0; j < COUNT; j++) {
                    const V whole = g[k][j] + o * C[j];
                    by_inflow += whole * B[j];
                    sums[j] = (k ? sums[j] : sum[j]) + whole * x;
                    g[k][j] = whole * from[(k * COUNT + j) * 2];
                    const V exponent = g[k][j] * from[(k * COUNT + j) * 2 + 1];
                    by_exponent += exponent * a[k * d_state + j];
                    da[k][j] += exponent * d;
                }
                d_inflow[at] = by_inflow, d_exponent[at] = by_exponent;
            }
#pragma GCC unroll 16
            for (int j = 0; j < COUNT; j++) sum[j] = sums[j];
            if (__builtin_expect(chunk.reset[t], 0)) {
#pragma GCC unroll 16
                for (int j = 0; j < PACK * COUNT; j++) g[j / COUNT][j % COUNT] = V{};
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < PACK * COUNT; j++) {
            end[j / COUNT * d_state + j % COUNT] = g[j / COUNT][j % COUNT];
            a_sum[j / COUNT * d_state + j % COUNT] += da[j / COUNT][j % COUNT];
        }
    }

    void finish(const Range<Real>& range, int64_t i) {
        for (int k = 0; k < PACK && i + k < range.blocks; k++) {
            const Block<Real> block(p, range.group, range.first + i + k);
            if (block.count == p.lanes) {
                finish_block<true>(range, block, i, k);
            } else {
                finish_block<false>(range, block, i, k);
            }
        }
    }

    template <bool WHOLE>
    __attribute__((noinline)) void finish_block(const Range<Real>& range, const Block<Real>& block,
                                                int64_t i, int k) {
        const int64_t row = range.row, from = chunk.start, e = c.channels, batch = c.length * e;
        const Rows<Storage> du(c.du, row, batch, from, e, block.channel);
        const Rows<Storage> ddelta(c.ddelta, row, batch, from, e, block.channel);
        const Rows<Storage> dzs(c.dz, row, batch, from, e, block.channel);
        const V skip = block.parameter(c.D);
        const int steps = chunk.steps, count = block.count;
        V of_skip{}, of_bias{};
        for (int t = 0; t < steps; t++) {
            const int at = t * PACK + k;
            // The exponents were taken with A log2(e).
            const V through_decay = d_exponent[at] * Real(1 / LOG2_E);
            const V d = (through_decay + d_inflow[at] * u[at]) * slope[at];
            of_bias += d;
            of_skip += dy[at] * u[at];
            ddelta.template put<WHOLE>(t, count, d);
            du.template put<WHOLE>(t, count, d_inflow[at] * delta[at] + dy[at] * skip);
            if (dzs.at) dzs.template put<WHOLE>(t, count, dz[at] * y[at]);
        }
        skip_sum[i + k] += of_skip;
        bias_sum[i + k] += of_bias;
    }

    void store_sums(const Range<Real>& range, int64_t index) {
        const int64_t task = (range.row * p.ranges + range.index) * c.groups + range.group;
        int64_t to = (task * c.length + index * CHUNK) * c.d_state;
        for (int64_t n = 0, width; n < c.d_state; n += width) {
            width = n + BACKWARD_N <= c.d_state ? BACKWARD_N : 1;
            const int64_t count = chunk.steps * width;
            for (int64_t i = 0; i < count; i += p.lanes) {
                const int part = int(count - i < p.lanes ? count - i : p.lanes);
                store_part(partials.B + to + i, lane_sums(B_sum + n * CHUNK + i), part);
                store_part(partials.C + to + i, lane_sums(C_sum + n * CHUNK + i), part);
            }
            to += count;
        }
    }

    void store_range(const Range<Real>& range) {
        for (int64_t i = 0; i < range.blocks; i++) {
            const Block<Real> block(p, range.group, range.first + i);
            const int64_t at = (range.row * c.groups + range.group) * p.blocks + range.first + i;
            for (int64_t n = 0; n < c.d_state; n++) {
                store(partials.A + (at * c.d_state + n) * p.lanes, rate_sum[i * c.d_state + n]);
                if (!c.dinitial) continue;
                Real* to = static_cast<Real*>(c.dinitial) + range.row * c.channels * c.d_state;
                block.put_column(to, c.d_state, n, adjoint[i * c.d_state + n]);
            }
            store(partials.D + at * p.lanes, skip_sum[i]);
            store(partials.bias + at * p.lanes, bias_sum[i]);
        }
    }
};

// Adds the ranges' parts of dB and dC of one chunk of a row, in order.
template <class Storage, class Real = typename Compute<Storage>::real>
void add_ranges(const Call& c, const Partition<Real>& p, const Partials<Real>& partials,
                int64_t row, int64_t index) {
    const int64_t start = index * CHUNK, all = c.groups * c.length * c.d_state;
    const int64_t steps = c.length - start < CHUNK ? c.length - start : CHUNK;
    for (int64_t group = 0; group < c.groups; group++) {
        int64_t from = row * p.ranges * all + (group * c.length + start) * c.d_state;
        for (int64_t n = 0, width; n < c.d_state; n += width) {
            width = n + BACKWARD_N <= c.d_state ? BACKWARD_N : 1;
            for (int64_t i = 0; i < steps * width; i++, from++) {
                const int64_t position = row * c.length + start + i / width;
                const int64_t to = (position * c.groups + group) * c.d_state + n + i % width;
                Real b = 0, r = 0;
                for (int64_t range = 0; range < p.ranges; range++) {
                    b += partials.B[from + range * all];
                    r += partials.C[from + range * all];
                }
                from_real(b, static_cast<Storage*>(c.dB) + to);
                from_real(r, static_cast<Storage*>(c.dC) + to);
            }
        }
    }
}

// Adds the rows' parts of the parameters' gradients of one block, in order.
template <class Real>
void add_rows(const Call& c, const Partition<Real>& p, const Partials<Real>& partials, int64_t at) {
    const Block<Real> block(p, at / p.blocks, at % p.blocks);
    auto sum = [&](const Real* part, int64_t width, int64_t n) {
        Vector<Real> total{};
        for (int64_t row = 0; row < c.batch; row++) {
            const int64_t from = ((row * c.groups * p.blocks + at) * width + n) * p.lanes;
            total += load(part + from);
        }
        return total;
    };
    for (int64_t n = 0; n < c.d_state; n++) {
        block.put_column(static_cast<Real*>(c.dA), c.d_state, n, sum(partials.A, c.d_state, n));
    }
    if (c.dD) block.put(static_cast<Real*>(c.dD), sum(partials.D, 1, 0));
    if (c.ddelta_bias) block.put(static_cast<Real*>(c.ddelta_bias), sum(partials.bias, 1, 0));
}

}  // namespace
