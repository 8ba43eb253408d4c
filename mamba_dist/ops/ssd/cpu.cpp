// SSD scan of the `cpu` backend: the chunked form of arXiv 2405.21060, section 6, and its gradient.
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
#include <algorithm>
#include <atomic>

#include "gemm.h"

namespace {

constexpr int64_t block_heads = 4;
constexpr int64_t segment_chunks = 4;
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    };

    struct BackwardBuffers : Buffers {
        M BT, gT, uT, g, grad_u, product, grad_scores, grad_BT, grad_CT, out;
        Real *row_sums, *spans, *B_dots, *C_dots, *dot;
        M states[block_heads][segment_chunks];
    };

    struct Sums {  // of one row and head, over its steps
        double A, D, bias;
    };

    struct Shared {  // of one backward
        Real* grad_state;        // (B, H, N, Pp), after the step that the backward has reached
        Real *part_B, *part_C;   // (B, G, blocks, segment, N)
        Sums* sums;              // (B, H)
    };

    void take(Arena& arena, Buffers& b) const {
        b.B = arena.matrix<Real>(Q, Np), b.C = arena.matrix<Real>(Q, Np);
        b.CT = arena.matrix<Real>(Np, Qp);
        b.scores = arena.matrix<Real>(Q, Qp), b.mixing = arena.matrix<Real>(Q, Qp);
        b.u = arena.matrix<Real>(Q, Pp), b.y = arena.matrix<Real>(Q, Pp);
        for (Real** p : {&b.decay.step, &b.decay.slope, &b.decay.cum, &b.decay.cum_rest,
                         &b.decay.from_start, &b.decay.to_end})
            *p = arena.take<Real>(Qp);
        for (M& state : b.state) state = arena.matrix<Real>(N, Pp);
    }

    void take(Arena& arena, BackwardBuffers& b) const {
        take(arena, static_cast<Buffers&>(b));
        b.BT = arena.matrix<Real>(Np, Qp);
        b.gT = arena.matrix<Real>(Pp, Qp), b.uT = arena.matrix<Real>(Pp, Qp);
        b.g = arena.matrix<Real>(Q, Pp), b.grad_u = arena.matrix<Real>(Q, Pp);
        b.product = arena.matrix<Real>(Qp, Qp), b.grad_scores = arena.matrix<Real>(Q, Qp);
        b.grad_BT = arena.matrix<Real>(Np, Qp), b.grad_CT = arena.matrix<Real>(Np, Qp);
        b.out = arena.matrix<Real>(Qp, Np);
        for (Real** p : {&b.row_sums, &b.spans, &b.B_dots, &b.C_dots})
            *p = arena.take<Real>(Qp);
        b.dot = arena.take<Real>(W);
        for (auto& of_head : b.states)
            for (M& state : of_head) state = arena.matrix<Real>(N, Pp);
    }

    Shared take_shared(Arena& arena) const {
        const int64_t part = blocks > 1 ? units * std::min(segment, L) * N : 0;
        return {arena.take<Real>(c.batch * H * N * Pp), arena.take<Real>(part),
                arena.take<Real>(part), arena.take<Sums>(c.batch * H)};
    }

    int64_t scratch_bytes(bool backward) const {
        Arena slot{0}, shared{0};
        if (backward) {
            BackwardBuffers b;
            take(slot, b), take_shared(shared);
        } else {
            Buffers b;
            take(slot, b);
        }
        return slot.used * slots + shared.used;
    }

    // Runs work(unit, buffers) for all units; which thread takes which one changes no result.
    template <class B, class Work>
    void for_units(int64_t count, uintptr_t scratch, Work work) const {
        std::atomic<int64_t> next{0};
#pragma omp parallel for num_threads(slots) schedule(static, 1)
        for (int64_t slot = 0; slot < slots; slot++) {
            B buffers;
            Arena sizes{0};
            take(sizes, buffers);
            Arena arena{scratch + uintptr_t(slot * sizes.used)};
            take(arena, buffers);
            for (int64_t unit; (unit = next++) < count;) work(unit, buffers);
        }
    }

    // ---- where things lie

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
            const T* from =
                static_cast<const T*>(tensor) + b * batch + (k.start + i) * row + g * N;
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
        // Differences of cum carry fp32's relative error only if cum has twice its precision.
        double sum = 0;
        for (int t = 0; t < vs * W; t++) {
            if (t < k.steps) sum += double(d.step[t]) * double(rate);
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
    void outputs(const Chunk& k, const Buffers& w, M state) const {
        if (!k.fresh)
            product<false>(k.steps, vp, int(N), w.C, state, Terms::all,
                           ScaleRows<Real>{w.y, w.decay.from_start});
        product<true>(k.steps, vp, k.steps, w.mixing, w.u, Terms::to_row,
                      Accumulate<Real>{w.y, !k.fresh});
    }

    // The state after the chunk, section 6.3; u is scaled by what is left of it at the end.
    void advance(const Chunk& k, const Buffers& w, M state, M after) const {
        scale_rows(k.steps, w.decay.to_end, w.u);
        if (after.at != state.at && !k.fresh)
            std::copy(state.at, state.at + N * Pp, after.at);
        product<true>(int(N), vp, k.steps, w.B, w.u, Terms::all,
                      Accumulate<Real>{after, !k.fresh, w.decay.total});
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

    struct Unit {
        int64_t b, g, first_head, heads;
    };
    Unit unit_of(int64_t unit) const {
        const int64_t block = unit % blocks, g = unit / blocks % G;
        return {unit / (blocks * G), g, g * per_group + block * block_heads,
                std::min(block_heads, per_group - block * block_heads)};
    }

    void start_state(int64_t b, int64_t h, M state) const {
        if (c.initial_state)
            state_in(static_cast<const Real*>(c.initial_state) + (b * H + h) * P * N, state);
        else
            std::fill(state.at, state.at + N * Pp, Real(0));
    }

    void forward_unit(int64_t unit, Buffers& w) const {
        const auto [b, g, first, heads] = unit_of(unit);
        Chunk chunks[longest_segment];
        for (int64_t h = 0; h < heads; h++) start_state(b, first + h, w.state[h]);
        for (int64_t k = 0; k < segments; k++) {
            if (k > 0 && c.states)
                for (int64_t h = 0; h < heads; h++)
                    for (int64_t n = 0; n < N; n++)
                        std::copy_n(w.state[h].row(n), P, saved_state(b, k, first + h) + n * P);
            const int count = cut(b, k, chunks);
            for (int i = 0; i < count; i++) {
                pack_B_and_C(b, g, chunks[i], w);
                for (int64_t h = 0; h < heads; h++)
                    forward_head(b, first + h, chunks[i], w, w.state[h]);
            }
        }
        for (int64_t h = 0; h < heads; h++)
            state_out(w.state[h], static_cast<Real*>(c.final_state) + (b * H + first + h) * P * N);
    }

    void forward() const {
        for_units<Buffers>(units, uintptr_t(c.scratch),
                           [&](int64_t unit, Buffers& w) { forward_unit(unit, w); });
    }

    // ---- backward

    // States before the chunks that have one, in order; returns each chunk's place among them.
    void redo_states(const Unit& at, int64_t k, const Chunk* chunks, int count, int* places,
                     BackwardBuffers& w) const {
        int place = -1;
        for (int i = 0; i < count; i++) {
            const Chunk& chunk = chunks[i];
            if (!chunk.fresh) place++;
            places[i] = place;
            const bool first = i == 0 && !chunk.fresh;
            const bool next = i + 1 < count && !chunks[i + 1].fresh;
            if (next) pack_B(at.b, at.g, chunk, w);
            for (int64_t h = 0; h < at.heads; h++) {
                const int64_t head = at.first_head + h;
                if (first) load_state(at.b, k, head, w.states[h][0]);
                if (!next) continue;
                pack_decay(at.b, head, chunk, false, w.decay);
                pack_u(at.b, head, chunk, w.decay, w.u);
                advance(chunk, w, w.states[h][std::max(place, 0)], w.states[h][place + 1]);
            }
        }
    }

    void load_state(int64_t b, int64_t k, int64_t h, M state) const {
        if (k == 0) return start_state(b, h, state);
        const Real* from = saved_state(b, k, h);
        for (int64_t n = 0; n < N; n++) {
            std::copy_n(from + n * P, P, state.row(n));
            std::fill(state.row(n) + P, state.row(n) + Pp, Real(0));
        }
    }

    // g, the gradient of y before gate and skip, and u; adds up the gradient of D.
    void pack_gradients(int64_t b, int64_t h, const Chunk& k, BackwardBuffers& w, Sums& sums) const {
        V sum_D{};
        for (int i = 0; i < k.steps; i++) {
            const T* x = at_x(b, k.start + i, h);
            const T* z = c.z ? at_z(b, k.start + i, h) : nullptr;
            const T* grad = at_out(c.grad_y, b, k.start + i, h);
            for (int v = 0; v < vp; v++) {
                V g = load_part(grad + v * W, columns(v));
                if (z) {
                    const V gate = load_part(z + v * W, columns(v));
                    g *= gate * sigmoid_v(gate);
                }
                const V value = load_part(x + v * W, columns(v));
                sum_D += g * value;
                store(w.g.vector(i, v), g);
                store(w.u.vector(i, v), value * w.decay.step[i]);
            }
        }
        sums.D += double(total(sum_D));
    }

    // From the product u g^T in w.product: the mixing matrix again, what the head adds to the
    // gradient of the scores, and for each step the gradient of its log decay from pairs around it.
    void mix_backward(const Chunk& k, BackwardBuffers& w) const {
        const int vs = vectors_of<Real>(k.steps);
        std::fill(w.row_sums, w.row_sums + Qp, Real(0));
        w.spans[0] = 0;
        for (int j = 0; j < k.steps; j++) {
            const int diagonal = j / W;
            for (int v = 0; v < diagonal; v++) store(w.mixing.vector(j, v), V{});
            V spanning{};
            for (int v = diagonal; v < vs; v++) {
                V decay = decay_of(w.decay, j, v), grad = load(w.product.vector(j, v));
                if (v == diagonal) {
                    decay = reached(j, v) ? decay : V{};
                    grad = reached(j, v) ? grad : V{};
                }
                const V grad_scores = grad * decay, mixing = load(w.scores.vector(j, v)) * decay;
                store(w.mixing.vector(j, v), mixing);
                store(w.grad_scores.vector(j, v), load(w.grad_scores.vector(j, v)) + grad_scores);
                const V grad_log = grad * mixing;
                V sum = load(w.row_sums + v * W) + grad_log;
                if (v == diagonal) sum = reached(j + 1, v) ? sum : V{};
                store(w.row_sums + v * W, sum);
                spanning += sum;
            }
            // Pairs on both sides of step j + 1. Row sums less column sums would be the same, but
            // cancel: 3e-6 in dA.
            if (j + 1 < k.steps) w.spans[j + 1] = total(spanning);
        }
    }

    void gate_backward(int64_t b, int64_t h, const Chunk& k, BackwardBuffers& w, M state) const {
        outputs(k, w, state);
        const Real skip = parameter(c.D, h, 0);
        for (int i = 0; i < k.steps; i++) {
            const T *x = at_x(b, k.start + i, h), *z = at_z(b, k.start + i, h);
            const T* grad = at_out(c.grad_y, b, k.start + i, h);
            T* out = at_out(c.grad_z, b, k.start + i, h);
            for (int v = 0; v < vp; v++) {
                V y = load(w.y.vector(i, v));
                if (c.D) y += skip * load_part(x + v * W, columns(v));
                const V gate = load_part(z + v * W, columns(v)), open = sigmoid_v(gate);
                const V slope = open * (1 + gate * (1 - open));
                store_part(out + v * W, load_part(grad + v * W, columns(v)) * y * slope,
                           columns(v));
            }
        }
    }

    // One head of one chunk. `later`: a gradient of the state after the chunk exists.
    void backward_head(int64_t b, int64_t h, const Chunk& k, bool later, BackwardBuffers& w,
                       M state, M grad_state, Sums& sums) const {
        const int q = k.steps, vs = vectors_of<Real>(q);
        pack_decay(b, h, k, true, w.decay);
        pack_gradients(b, h, k, w, sums);
        transpose<Real>(q, vp, {w.g.at, Pp}, w.gT);
        triangle(q, vs, int(P), w.u, w.gT, w.product);
        mix_backward(k, w);
        if (c.z) gate_backward(b, h, k, w, state);

        if (later)
            product<false>(q, vp, int(N), w.B, grad_state, Terms::all,
                           ScaleRows<Real>{w.grad_u, w.decay.to_end});
        product<false>(q, vp, q, w.mixing, w.g, Terms::from_row, Accumulate<Real>{w.grad_u, later});
        std::fill(w.B_dots, w.B_dots + Qp, Real(0)), std::fill(w.C_dots, w.C_dots + Qp, Real(0));
        if (later) {
            transpose<Real>(q, vp, {w.u.at, Pp}, w.uT);
            scale_columns(w.uT, w.decay.to_end, vs);
            product<false>(int(N), vs, int(P), grad_state, w.uT, Terms::all,
                           AddAndDot<Real>{w.grad_BT, w.BT, w.B_dots});
        }
        Real carried = 0;
        if (!k.fresh) {
            scale_columns(w.gT, w.decay.from_start, vs);
            product<false>(int(N), vs, int(P), state, w.gT, Terms::all,
                           AddAndDot<Real>{w.grad_CT, w.CT, w.C_dots});
            scale_rows(q, w.decay.from_start, w.g);
            store(w.dot, V{});
            if (later)
                product<true>(int(N), vp, q, w.C, w.g, Terms::all,
                              DecayAndDot<Real>{grad_state, state, w.decay.total, w.dot});
            else
                product<true>(int(N), vp, q, w.C, w.g, Terms::all, Accumulate<Real>{grad_state});
            carried = w.decay.total * total(load(w.dot));
        }
        write_x_and_dt(b, h, k, carried, w, sums);
    }

    void scale_columns(M m, const Real* factors, int vs) const {
        for (int64_t p = 0; p < P; p++)
            for (int v = 0; v < vs; v++)
                store(m.vector(p, v), load(m.vector(p, v)) * load(factors + v * W));
    }

    // `carried` is the gradient of the logarithm of the decay over the whole chunk, as far as it
    // comes from the state before it.
    void write_x_and_dt(int64_t b, int64_t h, const Chunk& k, Real carried, BackwardBuffers& w,
                        Sums& sums) const {
        const Decay& d = w.decay;
        const Real skip = parameter(c.D, h, 0), rate = parameter(c.A, h, 0);
        double kept = 0;  // what comes from the steps before, on its way to the state after
        for (int i = 0; i < k.steps; i++) kept += double(w.B_dots[i]);
        double received = 0;
        for (int i = k.steps - 1; i >= 0; i--) {
            const T* x = at_x(b, k.start + i, h);
            const T* grad = at_out(c.grad_y, b, k.start + i, h);
            const T* z = c.z ? at_z(b, k.start + i, h) : nullptr;
            T* out = at_out(c.grad_x, b, k.start + i, h);
            V direct{};
            for (int v = 0; v < vp; v++) {
                const V grad_u = load(w.grad_u.vector(i, v));
                direct += grad_u * load_part(x + v * W, columns(v));
                V grad_x = grad_u * d.step[i];
                if (c.D) {
                    V g = load_part(grad + v * W, columns(v));
                    if (z) {
                        const V gate = load_part(z + v * W, columns(v));
                        g *= gate * sigmoid_v(gate);
                    }
                    grad_x += skip * g;
                }
                store_part(out + v * W, grad_x, columns(v));
            }
            kept -= double(w.B_dots[i]);
            received += double(w.C_dots[i]);
            const double log_decay = double(w.spans[i]) + received + kept + double(carried);
            double grad_dt = double(rate) * log_decay + double(total(direct));
            sums.A += double(d.step[i]) * log_decay;
            if (c.softplus) grad_dt *= double(d.slope[i]);
            sums.bias += grad_dt;
            write_dt((b * L + k.start + i) * H + h, Real(grad_dt));
        }
    }

    void write_dt(int64_t i, Real value) const {
        if (c.dt_storage == low)
            from_real(float(value), static_cast<bf16*>(c.grad_dt) + i);
        else
            static_cast<Real*>(c.grad_dt)[i] = value;
    }

    // What the scores give to dB and dC, once for the block's heads, and both to memory.
    void write_B_and_C(const Unit& at, int64_t k, int64_t block, const Chunk& chunk,
                       BackwardBuffers& w, const Shared& shared) const {
        const int q = chunk.steps, vs = vectors_of<Real>(q);
        product<true>(int(N), vs, q, w.B, w.grad_scores, Terms::all,
                      Accumulate<Real>{w.grad_CT, true});
        transpose<Real>(q, vs, {w.grad_scores.at, Qp}, w.product);
        product<true>(int(N), vs, q, w.C, w.product, Terms::all, Accumulate<Real>{w.grad_BT, true});
        const int64_t in_segment = chunk.start - k * segment;
        const int64_t part =
            ((at.b * G + at.g) * blocks + block) * std::min(segment, L) * N + in_segment * N;
        const int64_t whole = ((at.b * L + chunk.start) * G + at.g) * N;
        const auto write = [&](M from, void* grad, Real* parts) {
            transpose<Real>(int(N), vs, {from.at, Qp}, w.out);
            for (int i = 0; i < q; i++)
                if (blocks > 1)
                    std::copy_n(w.out.row(i), N, parts + part + i * N);
                else
                    write_row(w.out.row(i), static_cast<T*>(grad) + whole + i * G * N);
        };
        write(w.grad_BT, c.grad_B, shared.part_B);
        write(w.grad_CT, c.grad_C, shared.part_C);
    }

    void write_row(const Real* from, T* to) const {
        for (int v = 0; v < vn; v++)
            store_part(to + v * W, load(from + v * W), int(std::min<int64_t>(W, N - v * W)));
    }

    void backward_unit(int64_t unit, int64_t k, BackwardBuffers& w, const Shared& shared) const {
        const Unit at = unit_of(unit);
        Chunk chunks[longest_segment];
        int places[longest_segment];
        const int count = cut(at.b, k, chunks);
        redo_states(at, k, chunks, count, places, w);
        for (int i = count - 1; i >= 0; i--) {
            const Chunk& chunk = chunks[i];
            const int64_t stop = chunk.start + chunk.steps;
            const bool later = stop == L ? c.grad_final != nullptr : !starts_document(at.b, stop);
            const int64_t width = vectors_of<Real>(chunk.steps) * W;
            pack_B_and_C(at.b, at.g, chunk, w);
            transpose<Real>(chunk.steps, vn, {w.B.at, Np}, w.BT);
            for (M m : {w.grad_BT, w.grad_CT})
                for (int64_t n = 0; n < Np; n++) std::fill_n(m.row(n), width, Real(0));
            for (int j = 0; j < chunk.steps; j++)
                std::fill_n(w.grad_scores.row(j), width, Real(0));
            for (int64_t h = 0; h < at.heads; h++) {
                const int64_t head = at.b * H + at.first_head + h;
                const M grad_state{shared.grad_state + head * N * Pp, Pp};
                if (stop == L && later)
                    state_in(static_cast<const Real*>(c.grad_final) + head * P * N, grad_state);
                backward_head(at.b, at.first_head + h, chunk, later, w,
                              w.states[h][std::max(places[i], 0)], grad_state, shared.sums[head]);
                if (chunk.start == 0 && c.grad_initial)
                    state_out(grad_state, static_cast<Real*>(c.grad_initial) + head * P * N);
            }
            write_B_and_C(at, k, unit % blocks, chunk, w, shared);
        }
    }

    // dB and dC of a segment, summed over the blocks of heads in order.
    void sum_blocks(int64_t row, int64_t k, const Shared& shared) const {
        const int64_t b = row / G, g = row % G, rows = std::min(segment, L);
        const int64_t steps = std::min(L, (k + 1) * segment) - k * segment;
        for (int64_t i = 0; i < steps; i++)
            for (const auto& [parts, grad] :
                 {std::pair{shared.part_B, c.grad_B}, std::pair{shared.part_C, c.grad_C}}) {
                T* out = static_cast<T*>(grad) + ((b * L + k * segment + i) * G + g) * N;
                const Real* from = parts + (row * blocks * rows + i) * N;
                for (int v = 0; v < vn; v++) {
                    const int count = int(std::min<int64_t>(W, N - v * W));
                    V sum{};
                    for (int64_t block = 0; block < blocks; block++)
                        sum += load_part(from + block * rows * N + v * W, count);
                    store_part(out + v * W, sum, count);
                }
            }
    }

    void backward() const {
        Arena arena{uintptr_t(c.scratch)};
        const Shared shared = take_shared(arena);
        std::fill_n(shared.sums, c.batch * H, Sums{});
        const uintptr_t scratch = arena.base + uintptr_t(arena.used);
        for (int64_t k = segments - 1; k >= 0; k--) {
            for_units<BackwardBuffers>(units, scratch, [&](int64_t unit, BackwardBuffers& w) {
                backward_unit(unit, k, w, shared);
            });
            if (blocks == 1) continue;
#pragma omp parallel for num_threads(c.threads) schedule(static)
            for (int64_t row = 0; row < c.batch * G; row++) sum_blocks(row, k, shared);
        }
        for (int64_t h = 0; h < H; h++) {
            Sums sum{};
            for (int64_t b = 0; b < c.batch; b++) {
                const Sums& part = shared.sums[b * H + h];
                sum.A += part.A, sum.D += part.D, sum.bias += part.bias;
            }
            static_cast<Real*>(c.grad_A)[h] = Real(sum.A);
            if (c.D) static_cast<Real*>(c.grad_D)[h] = Real(sum.D);
            if (c.dt_bias) static_cast<Real*>(c.grad_dt_bias)[h] = Real(sum.bias);
        }
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

template <class Work>
void with_storage(const Call& call, Work work) {
    if (call.storage == fp32)
        work(Ssd<float>(call));
    else if (call.storage == low)
        work(Ssd<bf16>(call));
    else
        work(Ssd<double>(call));
}

}  // namespace

extern "C" {
int64_t ssd_call_bytes() { return sizeof(Call); }
int64_t ssd_scratch_bytes(const Call* call, int64_t backward) {
    int64_t bytes = 0;
    with_storage(*call, [&](const auto& ssd) { bytes = ssd.scratch_bytes(backward); });
    return bytes;
}
void ssd_forward(const Call* call) {
    with_storage(*call, [](const auto& ssd) { ssd.forward(); });
}
void ssd_backward(const Call* call) {
    with_storage(*call, [](const auto& ssd) { ssd.backward(); });
}
void ssd_step(const Call* call) {
    with_storage(*call, [](const auto& ssd) { ssd.single_step(); });
}
}
