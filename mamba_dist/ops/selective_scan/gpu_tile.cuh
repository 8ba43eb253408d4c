// What the selective scan's kernels share: who works on which channels and steps, and how inputs
// get into shared memory.
//
// A warp has 16 channels x 16 states, sequential in time; each lane 8 of these. Sums over states or
// over channels are products with vectors, for which the tensor cores are idle: a lane's share is
// that of a 16 x 8 factor of their instruction (see multiply_tf32), so it needs no exchange.
// Values that there is one of per channel and step (step size, input, gate ...) are computed once,
// in tiles of 8 steps: lane r + 4 s has step s, channels 4r to 4r + 3.
//
// The warps of a block have neighbouring channels of one group of B and C, which they share.
#pragma once
#include "device.cuh"

constexpr int STATES = 16;
constexpr int WARP_CHANNELS = 16;
// Steps between two states that are kept for the backward; a lane each, for the documents' bits.
constexpr int CHUNK = 32;
constexpr int TILE = 8;
constexpr int TILES = CHUNK / TILE;
constexpr int TILE_FLOATS = TILE * WARP_CHANNELS;
constexpr int WARPS = THREADS / 32;
constexpr int BLOCK_CHANNELS = WARPS * WARP_CHANNELS;
// Where a gate is 0 it is taken for this: the output, next to 0 itself, then still tells what the
// gate multiplied, which the backward wants to know.
constexpr float SMALLEST_GATE = 7.8886090522101181e-31f;  // 2^-100

#if STORAGE_BF16
typedef Bf16 Storage;
// One product in tf32: a fifth of bf16's rounding. What is cut off has a mean, 3.4e-4 of the value
// for factors as they occur, which a constant makes good for each factor that is not bf16 itself.
constexpr float CUT_OFF = 1.00034f;
DEVICE void multiply(float (&d)[4], const float (&a)[4], float b0, float b1) {
    multiply_tf32(d, a, b0, b1);
}
#else
typedef Fp32 Storage;
constexpr float CUT_OFF = 1.f;
DEVICE void multiply(float (&d)[4], const float (&a)[4], float b0, float b1) {
    multiply_fp32(d, a, b0, b1);
}
#endif
typedef Storage::Element Element;
typedef Storage::Raw4 Raw4;

// Where a block and this lane stand: batch row, part of the length, channels.
struct Place {
    int64 row;
    int split, first_chunk, end_chunk;
    int channel;  // this warp's first one
    int group;    // of B and C
    int r, s;     // the lane is r + 4 s

    template <class Call>
    DEVICE Place(const Call& call) {
        const int tiles = int(call.channels) / BLOCK_CHANNELS;
        const int tile = block_index() % tiles;
        const int rest = block_index() / tiles;
        split = rest % int(call.splits);
        row = rest / int(call.splits);
        const int chunks = int((call.length + CHUNK - 1) / CHUNK);
        const int per_split = (chunks + int(call.splits) - 1) / int(call.splits);
        first_chunk = split * per_split < chunks ? split * per_split : chunks;
        end_chunk = first_chunk + per_split < chunks ? first_chunk + per_split : chunks;
        channel = tile * BLOCK_CHANNELS + warp_in_block() * WARP_CHANNELS;
        group = int(channel / (call.channels / call.groups));
        r = lane_in_warp() & 3;
        s = lane_in_warp() >> 2;
    }
    // The first of the four channels whose values this lane computes once.
    DEVICE int own() const { return channel + 4 * r; }
    // Of the warp's channels in a (..., E, 16) tensor, whose first index is `outer`.
    DEVICE int64 states_at(int64 outer, int64 channels) const {
        return (outer * channels + channel) * STATES;
    }
};

// A lane's elements of one batch row of a (B, L, ...) tensor, at a step that moves with the tiles:
// an address that is added to costs a third of one computed from the step.
struct Rows {
    const Element* at;
    int64 stride;

    DEVICE Rows(const void* tensor, int64 offset, int64 row_stride, int step)
        : at(static_cast<const Element*>(tensor) + offset + step * row_stride), stride(row_stride) {}
    // Four neighbours `ahead` steps from here, zeros unless that is `within` the row.
    DEVICE Raw4 four(int ahead, bool within) const {
        Raw4 raw{};
        if (within) raw = *reinterpret_cast<const Raw4*>(at + ahead * stride);
        return raw;
    }
    // The same on its way to the lane's own place in shared memory, see `fetched`.
    DEVICE void fetch(Raw4* to, int ahead, bool within) const {
        copy_async<sizeof(Raw4)>(to, at + ahead * stride, within);
    }
    DEVICE void move(int steps) { at += steps * stride; }
};

// B and C of a chunk on their way into shared memory: a thread has 4 states of some steps.
struct ChunkInputs {
    static constexpr int FOURS = CHUNK * 8;
    static constexpr int EACH = FOURS / THREADS;
    static_assert(FOURS % THREADS == 0 && THREADS % 8 == 0, "a thread keeps to B or to C");
    Rows rows;
    int first, length;
    Raw4 raw[EACH];

    template <class Call>
    DEVICE ChunkInputs(const Call& call, const Place& place)
        : rows(is_C() ? call.C : call.B,
               (is_C() ? place.row * call.C_batch + place.group * call.C_group
                       : place.row * call.B_batch + place.group * call.B_group) +
                   4 * part(),
               is_C() ? call.C_row : call.B_row, thread_in_block() >> 3),
          first(thread_in_block() >> 3),
          length(int(call.length)) {}
    DEVICE static bool is_C() { return thread_in_block() & 4; }
    // Which group of four states.
    DEVICE static int part() { return thread_in_block() & 3; }
    DEVICE void fetch(int chunk) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int step = chunk * CHUNK + i * (THREADS / 8);
            raw[i] = rows.four(step, first + step < length);
        }
    }
};

DEVICE Four load_four(const float* at) { return *reinterpret_cast<const Four*>(at); }
DEVICE void store_four(float* at, const Four& values) { *reinterpret_cast<Four*>(at) = values; }
DEVICE Pair load_pair(const float* at) { return *reinterpret_cast<const Pair*>(at); }
DEVICE void store_pair(float* at, float x, float y) { *reinterpret_cast<Pair*>(at) = {x, y}; }
DEVICE void store_rounded(Element* at, const Four& values) {
    *reinterpret_cast<Raw4*>(at) = Storage::narrow(values);
}

template <int M, int N>
DEVICE void clear(float (&h)[M][N]) {
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) h[i][j] = 0.f;
}

// Bit i: a document starts at step `first` + i of the row, other than at the row's start.
DEVICE uint32 document_starts(const int* ids, int64 length, int first) {
    const int t = first + lane_in_warp();
    return ballot(t > 0 && t < length && ids[t] != ids[t - 1]);
}

// The steps that the recurrence takes: none past the row's end, where nothing decays or enters.
DEVICE Four step_sizes(Raw4 raw, const Four& bias, bool within) {
    Four steps = Storage::widen(raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if SOFTPLUS
        steps.at[i] = softplus(steps.at[i] + bias.at[i]);
#else
        steps.at[i] = steps.at[i] + bias.at[i];
#endif
        steps.at[i] = within ? steps.at[i] : 0.f;
    }
    return steps;
}

DEVICE Four product(const Four& x, const Four& y) {
    return {{x.at[0] * y.at[0], x.at[1] * y.at[1], x.at[2] * y.at[2], x.at[3] * y.at[3]}};
}

// The sum over the lanes with the same r, of each of the four values.
DEVICE Four sum_over_steps(Four v) {
#pragma unroll
    for (int mask = 4; mask <= 16; mask *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) v.at[i] += from_lane_xor(v.at[i], mask);
    return v;
}

DEVICE float nonzero_gate(float z) {
    const float magnitude = z < 0.f ? -z : z;
    return magnitude < SMALLEST_GATE ? SMALLEST_GATE : z;
}
