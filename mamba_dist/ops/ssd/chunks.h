// SSD scan of the `cpu` backend: chunks, memory, the forward (arXiv 2405.21060, section 6) and the
// single step. cpu.cpp adds the gradient.
//
// A row is cut into chunks at document starts, at multiples of the segment (segment_chunks chunks)
// and whenever a chunk is full, so a chunk never holds two documents and nothing can leak between
// them. The unit of work is a row's block of heads of one group: it walks the chunks with its
// states in cache, and the heads of the block share the packed B and C and the scores C B^T.
// The forward keeps the state at each segment's start; the backward redoes a segment's states from
// it, goes through the segment in reverse, and adds up dB and dC over the blocks in order.
//
// With cum_t the sum of dt A from the chunk's start to t, and u = dt x:
//     y_i = sum_(j <= i) exp(cum_i - cum_j) (C_i . B_j) u_j + exp(cum_i) h C_i
//     h' = exp(cum_end) h + sum_j exp(cum_end - cum_j) u_j B_j^T
//
// B batch, L length, H heads, P headdim, N d_state, G groups, Q chunk. Inside a chunk j is the step
// that gives and i the one that receives; matrices of both lie as [j][i], states as [N][P].
#pragma once

#include <algorithm>
#include <atomic>

#include "gemm.h"

namespace ssd {

// Forward and backward with 2 heads took 10 % longer; with 6 or 8 no less, and they leave fewer
// units to the threads.
constexpr int64_t block_heads = 4;
// States are kept at each 256 steps: at each 64 they would be twice as large as x (N = 128).
constexpr int64_t segment_chunks = 4;
// 32 and 48 were within 3 %.
constexpr int64_t longest_chunk = 64;
constexpr int64_t longest_segment = longest_chunk * segment_chunks;

enum Storage : int64_t { fp32 = 0, low = 1, fp64 = 2 };

// Mirrored by mamba_dist/ops/ssd/cpu.py. Strides count elements; what has none is contiguous.
struct Call {
    int64_t batch, length, heads, headdim, groups, d_state, chunk, storage;
    int64_t dt_storage, seq_idx_bytes, softplus, threads;
    int64_t x_batch, x_row, dt_batch, dt_row, B_batch, B_row, C_batch, C_row, z_batch, z_row;
    const void *x, *dt, *A, *B, *C, *D, *z, *dt_bias;
    const void *seq_idx, *initial_state;
    void *y, *final_state;
    void *states, *scratch;  // states: (B, segments - 1, H, N, P), before all segments but one
    const void *grad_y, *grad_final;
    void *grad_x, *grad_dt, *grad_A, *grad_B, *grad_C, *grad_D, *grad_z, *grad_dt_bias;
    void* grad_initial;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out pieces of one allocation; without one, it measures.
struct Arena {
    uintptr_t base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        const uintptr_t piece = base + uintptr_t(used);
        used += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
        return reinterpret_cast<T*>(piece);
    }
    template <class Real>
    View<Real> matrix(int64_t rows, int64_t columns) {
        return {take<Real>(rows * columns), columns};
    }
};

struct Chunk {
    int64_t start;
    int steps;
    bool fresh;  // no state comes in
};

template <class T>
struct Ssd {
    using Real = typename Compute<T>::real;
    using V = Vector<Real>;
    using M = View<Real>;
    static constexpr int W = lanes<Real>;

    const Call& c;
    const int64_t L = c.length, H = c.heads, P = c.headdim, N = c.d_state, G = c.groups;
    const int64_t Q = std::min(c.chunk, longest_chunk), segment = Q * segment_chunks;
    const int64_t segments = ceil_div(L, segment);
    const int64_t per_group = H / G, blocks = ceil_div(per_group, block_heads);
    const int64_t units = c.batch * G * blocks, slots = std::min(c.threads, units);
    const int vp = vectors_of<Real>(P), vn = vectors_of<Real>(N), vq = vectors_of<Real>(Q);
    const int64_t Pp = vp * W, Np = vn * W, Qp = vq * W;

    explicit Ssd(const Call& call) : c(call) {}

    // ---- memory

    struct Decay {  // of one head and chunk, by step
        Real *step, *slope;              // dt after softplus, and softplus' derivative
        Real *cum, *cum_rest;            // their sum is cum in twice the precision
        Real *from_start, *to_end;       // exp(cum_i), exp(cum_end - cum_j)
        Real total;                      // exp(cum_end)
    };

    struct Buffers {  // of one thread
        M B, C, CT, scores, mixing, u, y;
        Decay decay;
        M state[block_heads];
        Ahead ahead;

        void take(const Ssd& s, Arena& arena) {
            B = arena.matrix<Real>(s.Q, s.Np), C = arena.matrix<Real>(s.Q, s.Np);
            CT = arena.matrix<Real>(s.Np, s.Qp);
            scores = arena.matrix<Real>(s.Q, s.Qp), mixing = arena.matrix<Real>(s.Q, s.Qp);
            u = arena.matrix<Real>(s.Q, s.Pp), y = arena.matrix<Real>(s.Q, s.Pp);
            for (Real** p : {&decay.step, &decay.slope, &decay.cum, &decay.cum_rest,
                             &decay.from_start, &decay.to_end})
                *p = arena.take<Real>(s.Qp);
            for (M& of_head : state) of_head = arena.matrix<Real>(s.N, s.Pp);
        }
    };

    template <class B>
    int64_t buffer_bytes() const {
        B buffers;
        Arena arena{0};
        buffers.take(*this, arena);
        return arena.used;
    }
    int64_t scratch_bytes() const { return slots * buffer_bytes<Buffers>(); }

    // Runs work(unit, buffers) for all units; which thread takes which one changes no result.
    template <class B, class Work>
    void for_units(int64_t count, uintptr_t scratch, Work work) const {
        std::atomic<int64_t> next{0};
#pragma omp parallel for num_threads(slots) schedule(static, 1)
        for (int64_t slot = 0; slot < slots; slot++) {
            B buffers;
            Arena arena{scratch + uintptr_t(slot * buffer_bytes<B>())};
            buffers.take(*this, arena);
            for (int64_t unit; (unit = next++) < count;) work(unit, buffers);
        }
    }

    struct Unit {
        int64_t b, g, first_head, heads;
    };
    Unit unit_of(int64_t unit) const {
        const int64_t block = unit % blocks, g = unit / blocks % G;
        return {unit / (blocks * G), g, g * per_group + block * block_heads,
                std::min(block_heads, per_group - block * block_heads)};
    }

    template <class Finish>
    static Fetching<Finish> fetching(const Finish& finish, Buffers& w) {
        return {finish, w.ahead};
    }

    // The head's outputs, and the inputs of the head that comes after it.
    void foresee(const Unit& at, int64_t h, const Chunk& k, const Chunk& after, bool backward,
                 Ahead& ahead) const {
        const int64_t b = at.b, now = at.first_head + h, row_bytes = P * sizeof(T);
        const auto outputs = [&](const void* tensor) {
            ahead.add(tensor ? at_out(tensor, b, k.start, now) : nullptr, H * row_bytes, k.steps,
                      row_bytes);
        };
        const bool last = h + 1 == at.heads;
        const int64_t t = last ? after.start : k.start, head = last ? at.first_head : now + 1;
        const int64_t rows = last ? after.steps : k.steps;
        ahead.clear();
        outputs(backward ? c.grad_x : c.y), outputs(backward ? c.grad_z : nullptr);
        ahead.add(at_x(b, t, head), c.x_row * sizeof(T), rows, row_bytes);
        if (c.z) ahead.add(at_z(b, t, head), c.z_row * sizeof(T), rows, row_bytes);
        if (backward) ahead.add(at_out(c.grad_y, b, t, head), H * row_bytes, rows, row_bytes);
        if (!last) return;
        ahead.add(at_group(c.B, c.B_batch, c.B_row, b, at.g, t), c.B_row * sizeof(T), rows,
                  N * sizeof(T));
        ahead.add(at_group(c.C, c.C_batch, c.C_row, b, at.g, t), c.C_row * sizeof(T), rows,
                  N * sizeof(T));
    }

    // ---- where things lie

    const T* at_group(const void* tensor, int64_t batch, int64_t row, int64_t b, int64_t g,
                      int64_t t) const {
        return static_cast<const T*>(tensor) + b * batch + t * row + g * N;
    }

    const T* at_x(int64_t b, int64_t t, int64_t h) const {
        return static_cast<const T*>(c.x) + b * c.x_batch + t * c.x_row + h * P;
    }
    const T* at_z(int64_t b, int64_t t, int64_t h) const {
        return static_cast<const T*>(c.z) + b * c.z_batch + t * c.z_row + h * P;
    }
    template <class Pointer>
    auto at_out(Pointer* tensor, int64_t b, int64_t t, int64_t h) const {
        using Element = typename std::conditional<std::is_const<Pointer>::value, const T, T>::type;
        return static_cast<Element*>(tensor) + ((b * L + t) * H + h) * P;
    }
    Real* saved_state(int64_t b, int64_t k, int64_t h) const {
        return static_cast<Real*>(c.states) + ((b * (segments - 1) + k - 1) * H + h) * N * P;
    }
    static Real parameter(const void* tensor, int64_t h, Real otherwise) {
        return tensor ? static_cast<const Real*>(tensor)[h] : otherwise;
    }
    int columns(int v) const { return int(std::min<int64_t>(W, P - v * W)); }

    bool starts_document(int64_t b, int64_t t) const {
        const auto differs = [&](auto* ids) { return ids[b * L + t] != ids[b * L + t - 1]; };
        if (!c.seq_idx || t == 0) return false;
        return c.seq_idx_bytes == 4 ? differs(static_cast<const int32_t*>(c.seq_idx))
                                    : differs(static_cast<const int64_t*>(c.seq_idx));
    }

    // Chunks of segment k of row b; returns how many.
    int cut(int64_t b, int64_t k, Chunk* chunks) const {
        const int64_t end = std::min(L, (k + 1) * segment);
        int count = 0;
        for (int64_t t = k * segment; t < end;) {
            int64_t stop = t + 1;
            while (stop < std::min(end, t + Q) && !starts_document(b, stop)) stop++;
            const bool fresh = t == 0 ? !c.initial_state : starts_document(b, t);
            chunks[count++] = {t, int(stop - t), fresh};
            t = stop;
        }
        return count;
    }

    // ---- packing

    // State (P, N) of the public layout to ours, and back.
    void state_in(const Real* from, M to) const {
        for (int64_t n = 0; n < N; n++)
            for (int64_t p = 0; p < Pp; p++) to.row(n)[p] = p < P ? from[p * N + n] : 0;
    }
    void state_out(M from, Real* to) const {
        for (int64_t p = 0; p < P; p++)
            for (int64_t n = 0; n < N; n++) to[p * N + n] = from.row(n)[p];
    }

    void pack_group(const void* tensor, int64_t batch, int64_t row, int64_t b, int64_t g,
                    const Chunk& k, M to) const {
        for (int i = 0; i < k.steps; i++) {
            const T* from = at_group(tensor, batch, row, b, g, k.start + i);
            for (int v = 0; v < vn; v++)
                store(to.vector(i, v),
                      load_part(from + v * W, int(std::min<int64_t>(W, N - v * W))));
        }
    }

    void pack_B(int64_t b, int64_t g, const Chunk& k, Buffers& w) const {
        pack_group(c.B, c.B_batch, c.B_row, b, g, k, w.B);
    }

    void pack_B_and_C(int64_t b, int64_t g, const Chunk& k, Buffers& w) const {
        const int vs = vectors_of<Real>(k.steps);
        pack_B(b, g, k, w);
        pack_group(c.C, c.C_batch, c.C_row, b, g, k, w.C);
        transpose<Real>(k.steps, vn, {w.C.at, Np}, w.CT);
        triangle(k.steps, vs, int(N), w.B, w.CT, w.scores);
    }

    // out[j][i] of A B for i >= j, and a few more.
    static void triangle(int steps, int vs, int terms, M a, M b, M out) {
        for (int v = 0; v < vs; v += tile_vectors)
            product<false>(std::min(steps, (v + tile_vectors) * W), std::min(tile_vectors, vs - v),
                           terms, a, M{b.at + v * W, b.stride}, Terms::all,
                           Accumulate<Real>{{out.at + v * W, out.stride}});
    }

    void pack_decay(int64_t b, int64_t h, const Chunk& k, bool slopes, Decay& d) const {
        const int vs = vectors_of<Real>(k.steps);
        const Real rate = parameter(c.A, h, 0), bias = parameter(c.dt_bias, h, 0);
        for (int t = 0; t < k.steps; t++) d.step[t] = bias + read_dt(b, k.start + t, h);
        for (int t = k.steps; t < vs * W; t++) d.step[t] = 0;
        if (c.softplus)
            for (int v = 0; v < vs; v++) {
                const V raw = load(d.step + v * W);
                store(d.step + v * W, softplus_v(raw));
                if (slopes) store(d.slope + v * W, sigmoid_v(raw));
            }
        // Differences of cum carry fp32's relative error only if cum has twice its precision, and no
        // step of it is so large that the others drown: a decay by exp(-1000) is none at all.
        double sum = 0;
        for (int t = 0; t < vs * W; t++) {
            const double log_decay = t < k.steps ? double(d.step[t]) * double(rate) : 0;
            sum += log_decay < -1000 ? -1000 : log_decay;
            d.cum[t] = Real(sum);
            d.cum_rest[t] = Real(sum - double(d.cum[t]));
        }
        const V end = splat(d.cum[k.steps - 1]), end_rest = splat(d.cum_rest[k.steps - 1]);
        for (int v = 0; v < vs; v++) {
            const V cum = load(d.cum + v * W), rest = load(d.cum_rest + v * W);
            store(d.from_start + v * W, exp_v(cum));
            store(d.to_end + v * W, exp_v((end - cum) + (end_rest - rest)));
        }
        d.total = d.from_start[k.steps - 1];
    }

    Real read_dt(int64_t b, int64_t t, int64_t h) const {
        const int64_t i = b * c.dt_batch + t * c.dt_row + h;
        return c.dt_storage == low ? Real(to_real(static_cast<const bf16*>(c.dt)[i]))
                                   : static_cast<const Real*>(c.dt)[i];
    }

    static V decay_of(const Decay& d, int j, int v) {
        return exp_v((load(d.cum + v * W) - d.cum[j]) + (load(d.cum_rest + v * W) - d.cum_rest[j]));
    }

    // Lanes of vector v whose step is j or later.
    static auto reached(int j, int v) {
        V lane;
        for (int l = 0; l < W; l++) lane[l] = Real(l);
        return lane >= splat(Real(j - v * W));
    }

    // ---- forward

    void pack_u(int64_t b, int64_t h, const Chunk& k, const Decay& d, M u) const {
        for (int i = 0; i < k.steps; i++) {
            const T* x = at_x(b, k.start + i, h);
            for (int v = 0; v < vp; v++)
                store(u.vector(i, v), load_part(x + v * W, columns(v)) * d.step[i]);
        }
    }

    void scale_rows(int rows, const Real* factors, M m) const {
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vp; v++) store(m.vector(i, v), load(m.vector(i, v)) * factors[i]);
    }

    void mix(const Chunk& k, const Decay& d, M scores, M mixing) const {
        const int vs = vectors_of<Real>(k.steps);
        for (int j = 0; j < k.steps; j++) {
            int v = j / W;
            for (int u = 0; u < v; u++) store(mixing.vector(j, u), V{});
            const V first = load(scores.vector(j, v)) * decay_of(d, j, v);
            store(mixing.vector(j, v), reached(j, v) ? first : V{});
            while (++v < vs)
                store(mixing.vector(j, v), load(scores.vector(j, v)) * decay_of(d, j, v));
        }
    }

    // y without D and gate, sections 6.2 and 6.4.
    void outputs(const Chunk& k, Buffers& w, M state) const {
        if (!k.fresh)
            product<false>(k.steps, vp, int(N), w.C, state, Terms::all,
                           fetching(ScaleRows<Real>{w.y, w.decay.from_start}, w));
        product<true>(k.steps, vp, k.steps, w.mixing, w.u, Terms::to_row,
                      Accumulate<Real>{w.y, !k.fresh});
    }

    // The state after the chunk, section 6.3; u is scaled by what is left of it at the end.
    void advance(const Chunk& k, Buffers& w, M state, M after) const {
        scale_rows(k.steps, w.decay.to_end, w.u);
        product<true>(int(N), vp, k.steps, w.B, w.u, Terms::all,
                      fetching(Accumulate<Real>{after, !k.fresh, w.decay.total, state}, w));
    }

    void forward_head(int64_t b, int64_t h, const Chunk& k, Buffers& w, M state) const {
        pack_decay(b, h, k, false, w.decay);
        pack_u(b, h, k, w.decay, w.u);
        mix(k, w.decay, w.scores, w.mixing);
        outputs(k, w, state);
        advance(k, w, state, state);
        const Real skip = parameter(c.D, h, 0);
        for (int i = 0; i < k.steps; i++) {
            const T* x = at_x(b, k.start + i, h);
            const T* z = c.z ? at_z(b, k.start + i, h) : nullptr;
            T* out = at_out(c.y, b, k.start + i, h);
            for (int v = 0; v < vp; v++) {
                V y = load(w.y.vector(i, v));
                if (c.D) y += skip * load_part(x + v * W, columns(v));
                if (z) {
                    const V gate = load_part(z + v * W, columns(v));
                    y *= gate * sigmoid_v(gate);
                }
                store_part(out + v * W, y, columns(v));
            }
        }
    }

    void start_state(int64_t b, int64_t h, M state) const {
        if (c.initial_state)
            state_in(static_cast<const Real*>(c.initial_state) + (b * H + h) * P * N, state);
        else
            std::fill(state.at, state.at + N * Pp, Real(0));
    }

    void forward_unit(int64_t unit, Buffers& w) const {
        const Unit at = unit_of(unit);
        const auto [b, g, first, heads] = at;
        Chunk chunks[longest_segment];
        for (int64_t h = 0; h < heads; h++) start_state(b, first + h, w.state[h]);
        for (int64_t k = 0; k < segments; k++) {
            if (k > 0 && c.states)
                for (int64_t h = 0; h < heads; h++)
                    for (int64_t n = 0; n < N; n++)
                        std::copy_n(w.state[h].row(n), P, saved_state(b, k, first + h) + n * P);
            const int count = cut(b, k, chunks);
            for (int i = 0; i < count; i++) {
                const int64_t stop = chunks[i].start + chunks[i].steps;
                const Chunk after{stop, int(std::min(Q, L - stop)), false};
                pack_B_and_C(b, g, chunks[i], w);
                for (int64_t h = 0; h < heads; h++) {
                    foresee(at, h, chunks[i], after, false, w.ahead);
                    forward_head(b, first + h, chunks[i], w, w.state[h]);
                }
            }
        }
        for (int64_t h = 0; h < heads; h++)
            state_out(w.state[h], static_cast<Real*>(c.final_state) + (b * H + first + h) * P * N);
    }

    void forward() const {
        for_units<Buffers>(units, uintptr_t(c.scratch),
                           [&](int64_t unit, Buffers& w) { forward_unit(unit, w); });
    }

    // ---- one step, for generation: the states are read and written once, in the public layout

    void step_head(int64_t b, int64_t h) const {
        const int64_t g = h / per_group;
        Real dt = read_dt(b, 0, h) + parameter(c.dt_bias, h, 0);
        if (c.softplus) dt = softplus_v(splat(dt))[0];
        const Real keep = exp_v(splat(dt * parameter(c.A, h, 0)))[0], skip = parameter(c.D, h, 0);
        const T* B = static_cast<const T*>(c.B) + b * c.B_batch + g * N;
        const T* C = static_cast<const T*>(c.C) + b * c.C_batch + g * N;
        const T* x = at_x(b, 0, h);
        T* out = at_out(c.y, b, 0, h);
        for (int64_t p = 0; p < P; p++) {
            const int64_t row = ((b * H + h) * P + p) * N;
            const Real* before =
                c.initial_state ? static_cast<const Real*>(c.initial_state) + row : nullptr;
            Real* after = static_cast<Real*>(c.final_state) + row;
            const Real value = to_real(x[p]), inflow = value * dt;
            V sum{};
            for (int v = 0; v < vn; v++) {
                const int count = int(std::min<int64_t>(W, N - v * W));
                V state = inflow * load_part(B + v * W, count);
                if (before) state += keep * load_part(before + v * W, count);
                store_part(after + v * W, state, count);
                sum += state * load_part(C + v * W, count);
            }
            Real y = total(sum) + skip * (c.D ? value : 0);
            if (c.z) {
                const Real gate = to_real(at_z(b, 0, h)[p]);
                y *= gate * sigmoid_v(splat(gate))[0];
            }
            from_real(y, out + p);
        }
    }

    void single_step() const {
        const int64_t count = c.batch * H;
        // Below about 10 us of work a second thread costs more than it does.
        const int64_t threads = count * P * N < 100000 ? 1 : c.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < count; i++) step_head(i / H, i % H);
    }
};

}  // namespace ssd
