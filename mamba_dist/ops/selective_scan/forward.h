// Forward of the selective scan over one range; see layout.h for the words.
#pragma once

#include "layout.h"

namespace {

// n handled together, with their states in registers.
constexpr int FORWARD_N = VECTOR_BYTES == 64 ? 8 : 4;

template <class Storage>
struct Forward {
    using Real = typename Compute<Storage>::real;
    using V = Vector<Real>;
    const Call& c;
    const Partition<Real>& p;
    Chunk<Storage> chunk;
    Ahead ahead;
    V *rate, *state;        // (range blocks, N): A log2(e), and the running state
    V *delta, *inflow, *y;  // (CHUNK, PACK)
    void* arena;            // null if there was not enough memory

    Forward(const Call& call, const Partition<Real>& partition) : c(call), p(partition) {
        const int64_t of_range = (p.range_blocks + PACK) * c.d_state;
        const int64_t of_chunk = CHUNK * PACK, rows = CHUNK * c.d_state;
        V* next = memory<V>(2 * of_range + 3 * of_chunk + (2 * rows + p.lanes) / p.lanes);
        arena = next;
        auto take = [&next](int64_t count) { return (next += count) - count; };
        rate = take(of_range), state = take(of_range);
        delta = take(of_chunk), inflow = take(of_chunk), y = take(of_chunk);
        chunk.B = reinterpret_cast<Real*>(next), chunk.C = chunk.B + rows;
    }
    Forward(const Forward&) = delete;
    ~Forward() { free(arena); }

    void run(const Range<Real>& range) {
        const int64_t matrix = range.row * c.channels * c.d_state;
        const Real* initial = static_cast<const Real*>(c.initial_state);
        for (int64_t i = 0; i < range.blocks + PACK - 1; i++) {
            const Block<Real> block(p, range.group, range.first + i);
            for (int64_t n = 0; n < c.d_state; n++) {
                V a = block.column(static_cast<const Real*>(c.A), c.d_state, n);
                rate[i * c.d_state + n] = a * Real(LOG2_E);
                V h = block.column(initial ? initial + matrix : nullptr, c.d_state, n);
                state[i * c.d_state + n] = h;
            }
        }
        for (int64_t index = 0; index < p.chunks; index++) {
            chunk.load(c, range.row, range.group, index);
            for (int64_t i = 0; i < range.blocks; i += PACK) {
                if (c.chunk_states) keep(range, index, i);
                const bool bounded = stage(range, i);
                look_ahead(range, index, i);
                for (int k = 0; k < PACK; k++) {
                    bounded ? sweep<true>(i, k) : sweep<false>(i, k);
                }
                finish(range, i);
            }
        }
        for (int64_t i = 0; i < range.blocks; i++) {
            const Block<Real> block(p, range.group, range.first + i);
            for (int64_t n = 0; n < c.d_state; n++) {
                Real* to = static_cast<Real*>(c.final_state) + matrix;
                block.put_column(to, c.d_state, n, state[i * c.d_state + n]);
            }
        }
    }

    void keep(const Range<Real>& range, int64_t index, int64_t i) {
        Real* to = static_cast<Real*>(c.chunk_states);
        to += (range.row * p.chunks + index) * c.d_state * c.channels;
        for (int k = 0; k < PACK; k++) {
            const Block<Real> block(p, range.group, range.first + i + k);
            for (int64_t n = 0; n < c.d_state; n++) {
                block.put(to + n * c.channels, state[(i + k) * c.d_state + n]);
            }
        }
    }

    // Fills delta, inflow and y for a pack; whether its exponents may do without bounds.
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
        const Rows<const Storage> u(c.u, row, c.u_batch, from, c.u_row, channel);
        const Rows<const Storage> raw(c.delta, row, c.delta_batch, from, c.delta_row, channel);
        const V bias = block.parameter(c.delta_bias), skip = block.parameter(c.D);
        const bool softplus = c.delta_softplus;
        const int last = chunk.steps - 1, count = block.count;
        V *ds = delta + k, *xs = inflow + k, *ys = y + k;
        Bound<Real> bound(rates, c.d_state);
        for (int tile = 0; tile <= last; tile += TILE) {
            V d[TILE];
#pragma GCC unroll 16
            for (int j = 0; j < TILE; j++) {
                d[j] = raw.template get<WHOLE>(tile + j < last ? tile + j : last, count) + bias;
            }
            if (softplus) softplus_each(d);
#pragma GCC unroll 16
            for (int j = 0; j < TILE; j++) {
                const int at = (tile + j) * PACK;
                const V x = u.template get<WHOLE>(tile + j < last ? tile + j : last, count);
                bound.see(d[j]);
                ds[at] = d[j], xs[at] = d[j] * x, ys[at] = skip * x;
            }
        }
        return bound.holds();
    }

    // The next pack of this chunk, else the first one of the next.
    void look_ahead(const Range<Real>& range, int64_t index, int64_t i) {
        ahead.count = 0;
        i += PACK;
        if (i >= range.blocks) i = 0, index++;
        if (index == p.chunks) return;
        const int64_t row = range.row, at = index * CHUNK;
        const int64_t channel = Block<Real>(p, range.group, range.first + i).channel;
        ahead.add(Rows<const Storage>(c.u, row, c.u_batch, at, c.u_row, channel));
        ahead.add(Rows<const Storage>(c.delta, row, c.delta_batch, at, c.delta_row, channel));
        ahead.add(Rows<const Storage>(c.z, row, c.z_batch, at, c.z_row, channel));
        ahead.add(Rows<const Storage>(c.y, row, c.length * c.channels, at, c.channels, channel));
    }

    template <bool BOUNDED>
    void sweep(int64_t i, int k) {
        int64_t n = 0;
        for (; n + FORWARD_N <= c.d_state; n += FORWARD_N) sweep_n<BOUNDED, FORWARD_N>(i, k, n);
        for (; n + 4 <= c.d_state; n += 4) sweep_n<BOUNDED, 4>(i, k, n);
        for (; n < c.d_state; n++) sweep_n<BOUNDED, 1>(i, k, n);
    }

    // Equation 2 for one block and COUNT n over the chunk.
    template <bool BOUNDED, int COUNT>
    __attribute__((noinline)) void sweep_n(int64_t i, int k, int64_t first) {
        constexpr int STEP = COUNT < 4 ? COUNT : 4;
        const int64_t d_state = c.d_state, at = (i + k) * d_state + first;
        const Ahead::Lines next = ahead.turn(first / COUNT * PACK + k, y);
        const int steps = chunk.steps;
        const V *a = rate + at, *ds = delta + k, *xs = inflow + k;
        const Real *B = chunk.B + first, *C = chunk.C + first;
        V *end = state + at, *ys = y + k;
        V h[COUNT];
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; j++) h[j] = end[j];
        for (int t = 0; t < steps; t++, B += d_state, C += d_state) {
            if (__builtin_expect(chunk.reset[t], 0)) {
#pragma GCC unroll 16
                for (int j = 0; j < COUNT; j++) h[j] = V{};
            }
            next.fetch(t);
            const V d = ds[t * PACK], x = xs[t * PACK];
            V sum = ys[t * PACK];
#pragma GCC unroll 16
            for (int q = 0; q < COUNT; q += STEP) {
                V decay[STEP];
#pragma GCC unroll 16
                for (int j = 0; j < STEP; j++) decay[j] = d * a[q + j];
                decay_each<BOUNDED>(decay);
#pragma GCC unroll 16
                for (int j = 0; j < STEP; j++) h[q + j] = decay[j] * h[q + j] + x * B[q + j];
#pragma GCC unroll 16
                for (int j = 0; j < STEP; j++) sum += h[q + j] * C[q + j];
            }
            ys[t * PACK] = sum;
        }
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; j++) end[j] = h[j];
    }

    // Gates and stores the output of a pack.
    void finish(const Range<Real>& range, int64_t i) {
        for (int k = 0; k < PACK; k++) {
            const Block<Real> block(p, range.group, range.first + i + k);
            if (block.count == p.lanes) {
                finish_block<true>(range, block, k);
            } else {
                finish_block<false>(range, block, k);
            }
        }
    }

    template <bool WHOLE>
    __attribute__((noinline)) void finish_block(const Range<Real>& range, const Block<Real>& block,
                                                int k) {
        const int64_t row = range.row, from = chunk.start, channel = block.channel;
        const Rows<Storage> out(c.y, row, c.length * c.channels, from, c.channels, channel);
        const Rows<const Storage> z(c.z, row, c.z_batch, from, c.z_row, channel);
        const int last = chunk.steps - 1, count = block.count;
        const V* ys = y + k;
        for (int tile = 0; tile <= last; tile += TILE) {
            V gate[TILE], open[TILE];
            if (z.at) {
#pragma GCC unroll 16
                for (int j = 0; j < TILE; j++) {
                    gate[j] = z.template get<WHOLE>(tile + j < last ? tile + j : last, count);
                    open[j] = gate[j];
                }
                sigmoid_each(open);
            }
#pragma GCC unroll 16
            for (int j = 0; j < TILE; j++) {
                if (tile + j > last) break;
                V value = ys[(tile + j) * PACK];
                if (z.at) value *= gate[j] * open[j];
                out.template put<WHOLE>(tile + j, count, value);
            }
        }
    }
};

}  // namespace
