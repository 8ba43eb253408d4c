// What a thread of the causal convolution does with one unit of work, forward and backward.
//
// A unit is a tile of time steps of one row and one block of channels. Inside it a few steps are
// computed at once, channel vector by channel vector: memory is walked along its rows, and the taps
// and most inputs are loaded once for all these steps. The backward walks back in time and keeps
// what the last K - 1 steps send to earlier inputs; at a tile's end it computes that anew, so that
// tiles need nothing of each other. Each unit writes its share of the parameters' gradients to a
// place of its own, and the shares are added in a fixed order, whatever the threads.
//
// B batch, L length, E channels, K kernel width; tap j meets the input j steps back.
#pragma once

#include <memory>
#include <new>

#include "simd.h"

// Contiguous but for x and grad_y, whose channels have unit stride; a missing tensor is null.
struct Arguments {
    const void *x, *grad_y;                        // (B, L, E) of the storage type
    const void *weight, *bias;                     // (E, K), (E,) of what it is computed in
    const void *initial_state, *grad_final_state;  // (B, E, K - 1)
    const void* seq_idx;                           // (B, L), seq_idx_bytes each
    void *y, *final_state;
    void *grad_x, *grad_weight, *grad_bias, *grad_initial_state;
    void* shares;  // (B * tiles, K + 1, share_channels): gradients of each tap and of the bias
    int64_t batch, length, channels, width;
    int64_t x_batch_stride, x_row_stride, grad_y_batch_stride, grad_y_row_stride;
    int64_t seq_idx_bytes, tile_steps, share_channels, silu, storage, threads;
};

namespace {

// Most channels of a unit. Whole rows matter when x comes from memory: with blocks of 256 channels
// (1, 2048, 1536) took 1.7 times as long.
constexpr int64_t BLOCK = 2048;
// Steps computed at once; more of them do not fit into the registers.
constexpr int STEPS = VECTOR_BYTES == 64 ? 4 : 2;

int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Off the hot path, where copies in every kernel would only cost compile time.
#define SELDOM __attribute__((noinline))
#define HOT __attribute__((always_inline))

// How channels lie in vectors. Two vectors of bf16 are one vector of memory, whose lanes hold two
// channels each: taking even channels for the one and odd ones for the other costs an instruction
// a vector, where widening neighbours costs two and narrowing them three more.
template <class Storage>
struct Group {
    using vector = typename Lanes<Storage>::type;
    static constexpr int VECTORS = 1, CHANNELS = Lanes<Storage>::count;

    static int64_t place(int64_t channel) { return channel; }
    static HOT vector load(const Storage* p, int) { return ::load(p); }
    static HOT void store(Storage* p, const vector* v) { ::store(p, v[0]); }
};

template <>
struct Group<bf16> {
    using vector = float_v;
    static constexpr int LANES = Lanes<float>::count, VECTORS = 2, CHANNELS = 2 * LANES;

    static int64_t place(int64_t channel) {
        return channel - channel % CHANNELS + channel % 2 * LANES + channel % CHANNELS / 2;
    }
    static HOT vector load(const bf16* p, int odd) {
        uint_v both;
        memcpy(&both, p, sizeof both);
        return (vector)(odd ? both & 0xffff0000u : both << 16);
    }
    static HOT void store(bf16* p, const vector* v) {
        uint_v both = rounded(v[0]) >> 16 | (rounded(v[1]) & 0xffff0000u);
        memcpy(p, &both, sizeof both);
    }
    // To nearest even. A NaN with all of its low bits set would become 0, but none of them arises:
    // stored inputs have no low bits, and `without_payload` takes them from the others.
    static HOT uint_v rounded(vector v) {
        uint_v bits = (uint_v)v;
        return bits + 0x7fffu + ((bits >> 16) & 1u);
    }
};

template <class Real>
Real without_payload(Real x) {
    return x == x ? x : Real(NAN);
}

template <class Vector>
MAMBA_INLINE Vector silu_v(Vector p) {
    return p / (1 + exp_v(-p));
}

template <class Vector>
MAMBA_INLINE Vector silu_slope_v(Vector p) {
    Vector gate = sigmoid_v(p);
    return gate * (1 + p * (1 - gate));
}

// One thread's place of work, for one unit after the other. Width is K, or 0 for a K without
// kernels of its own.
template <class Storage, int Width>
class Unit {
    using real = typename Compute<Storage>::real;
    using vector = typename Lanes<real>::type;
    using group = Group<Storage>;
    static constexpr int LANES = Lanes<real>::count, VECTORS = group::VECTORS;
    static constexpr int CHANNELS = group::CHANNELS;
    // Inputs that STEPS outputs see.
    static constexpr int WINDOW = STEPS + (Width ? Width : 1) - 1;

    const Arguments& a;
    const int64_t width, ring_steps, rows_and_tiles;
    // For each vector of channels side by side: K taps and the bias; the sums of their gradients
    // and the ring of what the last steps send; gradient of the final state, initial state.
    std::unique_ptr<real[]> fixed, moving, states;
    std::unique_ptr<int64_t[]> reaches;
    int64_t row, start, stop, share, channels, first_channel = -1;

  public:
    explicit Unit(const Arguments& arguments)
        : a(arguments),
          width(Width ? Width : a.width),
          ring_steps(power_of_two(width)),
          rows_and_tiles(a.batch * pieces(a.length, a.tile_steps)),
          fixed(memory<real>(block_channels(a) * (width + 1))),
          moving(memory<real>(a.grad_y ? block_channels(a) * moving_rows() : 0)),
          states(memory<real>(block_channels(a) * state_rows())),
          reaches(memory<int64_t>(a.tile_steps + width)) {}

    // Whether there was enough memory.
    bool is_ready() const { return fixed && moving && states && reaches; }

    static int64_t count(const Arguments& a) {
        return a.batch * pieces(a.length, a.tile_steps) * pieces(a.channels, BLOCK);
    }

    // Neighbouring units have the same channels, so that a thread seldom loads the taps.
    void enter(int64_t unit) {
        const int64_t tiles = pieces(a.length, a.tile_steps);
        share = unit % rows_and_tiles;
        row = share / tiles;
        start = share % tiles * a.tile_steps;
        stop = smaller(start + a.tile_steps, a.length);
        take_channels(unit / rows_and_tiles);
        if (a.initial_state && start < width)
            spread(state_of(a.initial_state), width - 1, history(0, 1 - width), state_rows());
        for (int64_t t = start; t < halo_stop(); t++) reaches[t - start] = reach_of(t);
    }

    void forward() {
        for (int64_t t = start; t < stop;) {
            if (t + STEPS <= stop && sees_plain_inputs(t)) {
                forward_steps(t);
                t += STEPS;
            } else {
                for (int64_t c = 0; c < channels; c += CHANNELS) forward_step(t, c);
                t++;
            }
        }
        if (a.final_state && stop == a.length) write_final_state();
    }

    void backward() {
        for (int64_t c = 0; c < padded(); c += LANES)
            memset(sum(c, 0), 0, size_t((width + 1) * LANES) * sizeof(real));
        if (a.grad_final_state && halo_stop() == a.length)
            spread(state_of(a.grad_final_state), width - 1, grad_final(0, 0), state_rows());
        for (int64_t t = halo_stop() - 1; t >= stop; t--)
            for (int64_t c = 0; c < padded(); c += LANES) store(sent(c, t), sends(t, c));
        for (int64_t t = stop; t > start;) {
            if (t - STEPS >= start && sees_plain_inputs(t - STEPS) && is_seen_plainly(t - STEPS)) {
                t -= STEPS;
                backward_steps(t);
            } else {
                t--;
                for (int64_t c = 0; c < channels; c += CHANNELS) backward_step(t, c);
            }
        }
        if (a.grad_initial_state && start == 0) write_grad_initial_state();
        write_shares();
    }

  private:
    template <class T>
    static T* memory(int64_t count) {
        return new (std::nothrow) T[size_t(count)];
    }
    static const real* reals(const void* p) { return static_cast<const real*>(p); }
    static int64_t power_of_two(int64_t at_least) {
        int64_t power = 1;
        while (power < at_least) power *= 2;
        return power;
    }

    const Storage* x_at(int64_t t) const {
        return static_cast<const Storage*>(a.x) + row * a.x_batch_stride + t * a.x_row_stride +
               first_channel;
    }
    const Storage* grad_y_at(int64_t t) const {
        return static_cast<const Storage*>(a.grad_y) + row * a.grad_y_batch_stride +
               t * a.grad_y_row_stride + first_channel;
    }
    Storage* at(void* output, int64_t t) const {
        return static_cast<Storage*>(output) + (row * a.length + t) * a.channels + first_channel;
    }
    const real* state_of(const void* state) const {
        return reals(state) + (row * a.channels + first_channel) * (width - 1);
    }
    // c is a multiple of LANES.
    real* tap(int64_t c, int64_t j) const { return fixed.get() + c * (width + 1) + j * LANES; }
    real* bias(int64_t c) const { return tap(c, width); }
    int64_t moving_rows() const { return width + 1 + ring_steps; }
    real* sum(int64_t c, int64_t j) const { return moving.get() + c * moving_rows() + j * LANES; }
    // What step t sends to the inputs it sees; that of the last K steps is kept.
    real* sent(int64_t c, int64_t t) const { return sum(c, width + 1 + (t & (ring_steps - 1))); }
    int64_t state_rows() const { return 2 * (width - 1); }
    real* states_of(int64_t c) const { return states.get() + c * state_rows(); }
    real* grad_final(int64_t c, int64_t i) const { return states_of(c) + i * LANES; }
    real* history(int64_t c, int64_t t) const { return grad_final(c, state_rows() + t); }
    int64_t reach(int64_t t) const { return reaches[t - start]; }
    // The first step that sends nothing to the tile.
    int64_t halo_stop() const { return smaller(stop + width - 1, a.length); }
    int64_t padded() const { return pieces(channels, CHANNELS) * CHANNELS; }
    // The first channel outside of whole groups.
    int64_t whole() const { return channels / CHANNELS * CHANNELS; }

    static int64_t block_channels(const Arguments& a) {
        return pieces(pieces(a.channels, pieces(a.channels, BLOCK)), 32) * 32;
    }

    void take_channels(int64_t block) {
        if (first_channel == block * block_channels(a)) return;
        first_channel = block * block_channels(a);
        channels = smaller(block_channels(a), a.channels - first_channel);
        spread(reals(a.weight) + first_channel * width, width, tap(0, 0), width + 1, true);
        if (a.bias)
            spread(reals(a.bias) + first_channel, 1, bias(0), width + 1);
        else
            for (int64_t c = 0; c < padded(); c += LANES) store(bias(c), vector{});
    }

    // From `count` values of each channel to rows of channels, zero past the last channel.
    SELDOM void spread(const real* from, int64_t count, real* to, int64_t rows,
                       bool reversed = false) const {
        for (int64_t c = 0; c < padded(); c++) {
            const int64_t place = group::place(c), lane = place % LANES;
            real* column = to + (place - lane) * rows + lane;
            for (int64_t j = 0; j < count; j++) {
                const int64_t k = reversed ? count - 1 - j : j;
                column[j * LANES] = c < channels ? without_payload(from[c * count + k]) : 0;
            }
        }
    }

    // How many steps back the inputs are of t's document, up to K - 1; an initial state belongs to
    // the row's first document and has K - 1 of them.
    SELDOM int64_t reach_of(int64_t t) const {
        const int64_t most = smaller(width - 1, t), size = a.seq_idx_bytes;
        int64_t steps = most;
        if (a.seq_idx) {
            const char* id = static_cast<const char*>(a.seq_idx) + (row * a.length + t) * size;
            for (steps = 0; steps < most && !memcmp(id, id - size, size_t(size)); steps++)
                id -= size;
        }
        return a.initial_state && steps == t ? width - 1 : steps;
    }

    bool reach_all_taps(int64_t first, int64_t last) const {
        bool all = true;
        for (int64_t t = first; t < last; t++) all &= reach(t) == width - 1;
        return all;
    }
    // Whether STEPS steps from t on see inputs of x only, each at every tap.
    bool sees_plain_inputs(int64_t t) const {
        return Width && t >= width - 1 && reach_all_taps(t, t + STEPS);
    }
    // Whether these inputs are seen by K steps of x each, and are no part of the final state.
    bool is_seen_plainly(int64_t t) const {
        return t + WINDOW <= a.length && reach_all_taps(t + STEPS, t + WINDOW);
    }
    // For t among the last K - 1 inputs.
    bool is_in_final_state(int64_t t) const { return reach(a.length - 1) >= a.length - 1 - t; }

    // The vector at place `c` of a row; a missing channel is 0.
    vector stored(const Storage* p, int64_t c) const {
        const int64_t first = c - c % CHANNELS;
        const int half = int(c % CHANNELS / LANES);
        if (first + CHANNELS <= channels) return group::load(p + first, half);
        Storage part[CHANNELS];
        memset(part, 0, sizeof part);
        memcpy(part, p + first, size_t(channels - first) * sizeof(Storage));
        return group::load(part, half);
    }

    void store_group(Storage* p, int64_t c, const vector* v) const {
        if (c + CHANNELS <= channels) return group::store(p + c, v);
        Storage part[CHANNELS];
        group::store(part, v);
        memcpy(p + c, part, size_t(channels - c) * sizeof(Storage));
    }

    vector input(int64_t t, int64_t c) const {
        return t < 0 ? load(history(c, t)) : stored(x_at(t), c);
    }

    vector preactivation(int64_t t, int64_t c) const {
        vector p = load(bias(c));
        for (int64_t j = 0; j <= reach(t); j++) p += load(tap(c, j)) * input(t - j, c);
        return p;
    }

    vector sends(int64_t t, int64_t c) const {
        const vector grad = stored(grad_y_at(t), c);
        return a.silu ? grad * silu_slope_v(preactivation(t, c)) : grad;
    }

    void forward_step(int64_t t, int64_t c) const {
        vector y[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            y[v] = preactivation(t, c + v * LANES);
            if (a.silu) y[v] = silu_v(y[v]);
        }
        store_group(at(a.y, t), c, y);
    }

    void backward_step(int64_t t, int64_t c) const {
        vector grad[VECTORS];
        for (int v = 0; v < VECTORS; v++) grad[v] = backward_step_of_vector(t, c + v * LANES);
        store_group(at(a.grad_x, t), c, grad);
    }

    vector backward_step_of_vector(int64_t t, int64_t c) const {
        const vector own = sends(t, c);
        store(sent(c, t), own);
        vector grad = load(tap(c, 0)) * own;
        for (int64_t j = 1; j < width && t + j < a.length; j++)
            if (reach(t + j) >= j) grad += load(tap(c, j)) * load(sent(c, t + j));
        const int64_t in_final_state = t + width - 1 - a.length;
        if (a.grad_final_state && in_final_state >= 0 && is_in_final_state(t))
            grad += load(grad_final(c, in_final_state));
        for (int64_t j = 0; j <= reach(t); j++)
            store(sum(c, j), load(sum(c, j)) + own * input(t - j, c));
        store(sum(c, width), load(sum(c, width)) + own);
        return grad;
    }

    // The same sums in the same order as `preactivation`, so which of them runs changes no bit.
    static HOT void preactivations(const real* taps, const vector* in, vector* p) {
#pragma GCC unroll 8
        for (int i = 0; i < STEPS; i++) p[i] = load(taps + Width * LANES);
#pragma GCC unroll 8
        for (int j = 0; j < Width; j++) {
            const vector tap = load(taps + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < STEPS; i++) p[i] += tap * in[i + Width - 1 - j];
        }
    }

    // The rows of the next call are fetched early: the machine does not foresee them.
    static HOT void prefetch(const Storage* p, int64_t stride) {
#pragma GCC unroll 8
        for (int i = 0; i < STEPS; i++) __builtin_prefetch(p + i * stride);
    }

    void forward_steps(int64_t t) const {
        const Storage* x = x_at(t - (Width - 1));
        Storage* y = at(a.y, t);
        const int64_t x_stride = a.x_row_stride, y_stride = a.channels;
        const int64_t silu = a.silu, end = whole();
        for (int64_t c = 0; c < end; c += CHANNELS) {
            vector out[STEPS][VECTORS];
            prefetch(x + WINDOW * x_stride + c, x_stride);
            prefetch(y + STEPS * y_stride + c, y_stride);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                vector in[WINDOW], p[STEPS];
#pragma GCC unroll 16
                for (int i = 0; i < WINDOW; i++) in[i] = group::load(x + i * x_stride + c, v);
                preactivations(tap(c + v * LANES, 0), in, p);
                if (silu) {
#pragma GCC unroll 8
                    for (int i = 0; i < STEPS; i++) p[i] = silu_v(p[i]);
                }
#pragma GCC unroll 8
                for (int i = 0; i < STEPS; i++) out[i][v] = p[i];
            }
#pragma GCC unroll 8
            for (int i = 0; i < STEPS; i++) group::store(y + i * y_stride + c, out[i]);
        }
        for (int i = 0; i < STEPS && end < channels; i++) forward_step(t + i, end);
    }

    void backward_steps(int64_t t) const {
        const Storage *x = x_at(t - (Width - 1)), *grad_y = grad_y_at(t);
        Storage* grad_x = at(a.grad_x, t);
        const int64_t x_stride = a.x_row_stride, grad_y_stride = a.grad_y_row_stride;
        const int64_t grad_x_stride = a.channels, silu = a.silu, end = whole();
        int64_t in_ring[WINDOW];
        for (int i = 0; i < WINDOW; i++) in_ring[i] = sent(0, t + i) - sum(0, 0);
        for (int64_t c = 0; c < end; c += CHANNELS) {
            vector out[STEPS][VECTORS];
            prefetch(x - STEPS * x_stride + c, x_stride);
            prefetch(grad_y - STEPS * grad_y_stride + c, grad_y_stride);
            prefetch(grad_x - STEPS * grad_x_stride + c, grad_x_stride);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                vector in[WINDOW], sent[WINDOW];
                const real* taps = tap(c + v * LANES, 0);
                real* sums = sum(c + v * LANES, 0);
#pragma GCC unroll 16
                for (int i = 0; i < WINDOW; i++) in[i] = group::load(x + i * x_stride + c, v);
#pragma GCC unroll 8
                for (int i = 0; i < STEPS; i++)
                    sent[i] = group::load(grad_y + i * grad_y_stride + c, v);
                if (silu) {
                    vector p[STEPS];
                    preactivations(taps, in, p);
#pragma GCC unroll 8
                    for (int i = 0; i < STEPS; i++) sent[i] *= silu_slope_v(p[i]);
                }
#pragma GCC unroll 8
                for (int i = STEPS; i < WINDOW; i++) sent[i] = load(sums + in_ring[i]);
#pragma GCC unroll 8
                for (int i = 0; i < STEPS; i++) out[i][v] = load(taps) * sent[i];
#pragma GCC unroll 8
                for (int j = 1; j < Width; j++) {
                    const vector tap = load(taps + j * LANES);
#pragma GCC unroll 8
                    for (int i = 0; i < STEPS; i++) out[i][v] += tap * sent[i + j];
                }
                add_to_sums(sums, in, sent);
#pragma GCC unroll 8
                for (int i = 0; i < Width - 1; i++) store(sums + in_ring[i], sent[i]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < STEPS; i++) group::store(grad_x + i * grad_x_stride + c, out[i]);
        }
        for (int i = STEPS - 1; i >= 0 && end < channels; i--) backward_step(t + i, end);
    }

    static HOT void add_to_sums(real* sums, const vector* in, const vector* sent) {
#pragma GCC unroll 8
        for (int j = 0; j <= Width; j++) {
            vector sum = load(sums + j * LANES);
#pragma GCC unroll 8
            for (int i = STEPS - 1; i >= 0; i--)
                sum += j < Width ? sent[i] * in[i + Width - 1 - j] : sent[i];
            store(sums + j * LANES, sum);
        }
    }

    SELDOM void write_shares() const {
        real* to = static_cast<real*>(a.shares) + share * (width + 1) * a.share_channels;
        for (int64_t c = 0; c < padded(); c += LANES)
            for (int64_t j = 0; j <= width; j++)
                store(to + j * a.share_channels + first_channel + c, load(sum(c, j)));
    }

    SELDOM void write_final_state() const {
        real* state = const_cast<real*>(state_of(a.final_state));
        for (int64_t i = 0; i < width - 1; i++) {
            const int64_t t = a.length - (width - 1) + i;
            const bool known = is_in_final_state(t);
            for (int64_t c = 0; c < channels; c++) {
                const int64_t place = group::place(c), lane = place % LANES;
                state[c * (width - 1) + i] = !known  ? 0
                                             : t < 0 ? history(place - lane, t)[lane]
                                                     : to_real(x_at(t)[c]);
            }
        }
    }

    SELDOM void write_grad_initial_state() const {
        real* grad_state = const_cast<real*>(state_of(a.grad_initial_state));
        for (int64_t i = 0; i < width - 1; i++) {
            const int64_t t = i - (width - 1), in_final_state = i - a.length;
            const bool is_final =
                a.grad_final_state && in_final_state >= 0 && is_in_final_state(t);
            for (int64_t c = 0; c < channels; c++) {
                const int64_t lane = group::place(c) % LANES, first = group::place(c) - lane;
                real grad = is_final ? grad_final(first, in_final_state)[lane] : 0;
                for (int64_t j = -t; j < width && t + j < a.length; j++)
                    if (reach(t + j) >= j) grad += tap(first, j)[lane] * sent(first, t + j)[lane];
                grad_state[c * (width - 1) + i] = grad;
            }
        }
    }
};

}  // namespace
