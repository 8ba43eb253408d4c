// SSD scan of the `cpu` backend: the gradient of chunks.h, and the entry points.
//
// With g the gradient of y before gate and skip, G that of the state after the chunk, u = dt x, and
// M_ij = exp(cum_i - cum_j) (C_i . B_j) for j <= i:
//     du_j = sum_(i >= j) M_ij g_i + exp(cum_end - cum_j) G B_j
//     dC_i = sum_(j <= i) exp(cum_i - cum_j) (g_i . u_j) B_j + exp(cum_i) h^T g_i
//     dB_j = sum_(i >= j) exp(cum_i - cum_j) (g_i . u_j) C_i + exp(cum_end - cum_j) G^T u_j
//     dh = exp(cum_end) G + sum_i exp(cum_i) g_i C_i^T
// The log decay dt A of a step stands in each term whose path leads over it, from before the step
// to its end or after; its gradient is the sum of those terms' gradients.
#include "chunks.h"

namespace ssd {

template <class T>
struct Backward : Ssd<T> {
    using Base = Ssd<T>;
    using typename Base::Buffers, typename Base::Decay, typename Base::M, typename Base::Real;
    using typename Base::Unit, typename Base::V;
    using Base::W, Base::c, Base::L, Base::H, Base::P, Base::N, Base::G, Base::Q, Base::segment;
    using Base::segments, Base::blocks, Base::units, Base::slots, Base::vp, Base::vn, Base::Pp;
    using Base::Np, Base::Qp, Base::advance, Base::at_out, Base::at_x, Base::at_z, Base::columns;
    using Base::cut, Base::decay_of, Base::fetching, Base::foresee;
    using Base::outputs, Base::pack_B, Base::pack_B_and_C, Base::pack_decay, Base::pack_u;
    using Base::parameter, Base::reached, Base::saved_state, Base::scale_rows, Base::start_state;
    using Base::starts_document, Base::state_in, Base::state_out, Base::triangle, Base::unit_of;
    using Base::Base;

    // ---- memory

    struct BackwardBuffers : Buffers {
        M BT, gT, uT, g, grad_u, product, grad_scores, grad_BT, grad_CT, out;
        Real *row_sums, *spans, *B_dots, *C_dots, *dot;
        M states[block_heads][segment_chunks];

        void take(const Base& s, Arena& arena) {
            Buffers::take(s, arena);
            BT = arena.matrix<Real>(s.Np, s.Qp);
            gT = arena.matrix<Real>(s.Pp, s.Qp), uT = arena.matrix<Real>(s.Pp, s.Qp);
            g = arena.matrix<Real>(s.Q, s.Pp), grad_u = arena.matrix<Real>(s.Q, s.Pp);
            product = arena.matrix<Real>(s.Qp, s.Qp), grad_scores = arena.matrix<Real>(s.Q, s.Qp);
            grad_BT = arena.matrix<Real>(s.Np, s.Qp), grad_CT = arena.matrix<Real>(s.Np, s.Qp);
            out = arena.matrix<Real>(s.Qp, s.Np);
            for (Real** p : {&row_sums, &spans, &B_dots, &C_dots}) *p = arena.take<Real>(s.Qp);
            dot = arena.take<Real>(W);
            for (auto& of_head : states)
                for (M& state : of_head) state = arena.matrix<Real>(s.N, s.Pp);
        }
    };

    struct Sums {  // of one row and head, over its steps
        double A, D, bias;
    };

    struct Shared {  // of one backward
        Real* grad_state;        // (B, H, N, Pp), after the step that the backward has reached
        Real *part_B, *part_C;   // (B, G, blocks, segment, N)
        Sums* sums;              // (B, H)
    };

    Shared take_shared(Arena& arena) const {
        const int64_t part = blocks > 1 ? units * std::min(segment, L) * N : 0;
        return {arena.take<Real>(c.batch * H * N * Pp), arena.take<Real>(part),
                arena.take<Real>(part), arena.take<Sums>(c.batch * H)};
    }

    int64_t scratch_bytes() const {
        Arena shared{0};
        take_shared(shared);
        return shared.used + slots * this->template buffer_bytes<BackwardBuffers>();
    }

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
                foresee(at, h, chunk, chunks[i + 1], false, w.ahead);
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
    void pack_gradients(int64_t b, int64_t h, const Chunk& k, BackwardBuffers& w,
                        Sums& sums) const {
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
                           fetching(ScaleRows<Real>{w.grad_u, w.decay.to_end}, w));
        product<false>(q, vp, q, w.mixing, w.g, Terms::from_row, Accumulate<Real>{w.grad_u, later});
        std::fill(w.B_dots, w.B_dots + Qp, Real(0)), std::fill(w.C_dots, w.C_dots + Qp, Real(0));
        if (later) {
            transpose<Real>(q, vp, {w.u.at, Pp}, w.uT);
            scale_columns(w.uT, w.decay.to_end, vs);
            product<false>(int(N), vs, int(P), grad_state, w.uT, Terms::all,
                           fetching(AddAndDot<Real>{w.grad_BT, w.BT, w.B_dots}, w));
        }
        Real carried = 0;
        if (!k.fresh) {
            scale_columns(w.gT, w.decay.from_start, vs);
            product<false>(int(N), vs, int(P), state, w.gT, Terms::all,
                           fetching(AddAndDot<Real>{w.grad_CT, w.CT, w.C_dots}, w));
            scale_rows(q, w.decay.from_start, w.g);
            store(w.dot, V{});
            if (later)
                product<true>(
                    int(N), vp, q, w.C, w.g, Terms::all,
                    fetching(DecayAndDot<Real>{grad_state, state, w.decay.total, w.dot}, w));
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
        transpose<Real>(q, vs, {w.grad_scores.at, Qp}, w.product);
        for (int v = 0; v < vs; v += tile_vectors) {
            const int panel = std::min(tile_vectors, vs - v), first = v * W;
            // Step i receives from the steps up to it, and step j gives to those from it on.
            product<true>(int(N), panel, std::min(q, first + panel * W), w.B,
                          M{w.grad_scores.at + first, Qp}, Terms::all,
                          Accumulate<Real>{{w.grad_CT.at + first, Qp}, true});
            product<true>(int(N), panel, q - first, M{w.C.row(first), Np},
                          M{w.product.row(first) + first, Qp}, Terms::all,
                          Accumulate<Real>{{w.grad_BT.at + first, Qp}, true});
        }
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
                foresee(at, h, chunk, chunks[i > 0 ? i - 1 : 0], true, w.ahead);
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
            const auto work = [&](int64_t unit, BackwardBuffers& w) {
                backward_unit(unit, k, w, shared);
            };
            this->template for_units<BackwardBuffers>(units, scratch, work);
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
};

// work(kernel) with the kernel of the call's storage type.
template <template <class> class Kernel, class Work>
static void with_storage(const Call& call, Work work) {
    if (call.storage == fp32)
        work(Kernel<float>(call));
    else if (call.storage == low)
        work(Kernel<bf16>(call));
    else
        work(Kernel<double>(call));
}

}  // namespace ssd

using ssd::Backward, ssd::Call, ssd::Ssd, ssd::with_storage;

extern "C" {
int64_t ssd_call_bytes() { return sizeof(Call); }
int64_t ssd_longest_chunk() { return ssd::longest_chunk; }
int64_t ssd_segment_chunks() { return ssd::segment_chunks; }
int64_t ssd_scratch_bytes(const Call* call, int64_t backward) {
    int64_t bytes = 0;
    const auto measure = [&](const auto& kernel) { bytes = kernel.scratch_bytes(); };
    backward ? with_storage<Backward>(*call, measure) : with_storage<Ssd>(*call, measure);
    return bytes;
}
void ssd_forward(const Call* call) {
    with_storage<Ssd>(*call, [](const auto& kernel) { kernel.forward(); });
}
void ssd_backward(const Call* call) {
    with_storage<Backward>(*call, [](const auto& kernel) { kernel.backward(); });
}
void ssd_step(const Call* call) {
    with_storage<Ssd>(*call, [](const auto& kernel) { kernel.single_step(); });
}
}
