// Which channels, states and steps a lane of the selective scan's kernels works on, and how inputs
// get into shared memory.
//
// A warp has 16 channels x 16 states, sequential in time. Lane q + 8 g has channels 2q, 2q + 1 and
// the four states of group g: the 8 lanes of a group read the same B and C, and the 4 lanes that
// share channels sum over states by two exchanges. Values that there is one of per channel and step
// (step size, input, gate ...) are computed by the lane q + 8 (t mod 4), once, for all states.
//
// The warps of a block have neighbouring channels of one group of B and C, which they share.
#pragma once
#include "device.cuh"

constexpr int STATES = 16;
constexpr int WARP_CHANNELS = 16;
// Steps between two states that are kept for the backward; a lane each, for the documents' bits.
constexpr int CHUNK = 32;
constexpr int WARPS = THREADS / 32;
constexpr int BLOCK_CHANNELS = WARPS * WARP_CHANNELS;
// Where a gate is 0 it is taken for this: the output, next to 0 itself, then still tells what the
// gate multiplied, which the backward wants to know.
constexpr float SMALLEST_GATE = 7.8886090522101181e-31f;  // 2^-100

#if STORAGE_BF16
typedef Bf16 Storage;
#else
typedef Fp32 Storage;
#endif
typedef Storage::Element Element;
typedef Storage::Raw2 Raw2;
typedef Storage::Raw4 Raw4;

// Where a block and this lane stand: batch row, part of the length, channels.
struct Place {
    int64 row;
    int split, first_chunk, end_chunk;
    int channel;  // this warp's first one
    int group;    // of B and C
    int pair;     // q: channels channel + 2 pair and the next
    int quarter;  // g: states 4 quarter to 4 quarter + 3, and steps quarter mod 4

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
        pair = lane_in_warp() & 7;
        quarter = lane_in_warp() >> 3;
    }
    // The lane's first channel.
    DEVICE int own() const { return channel + 2 * pair; }
};

// A lane's elements of one batch row of a (B, L, ...) tensor, at a step that moves with the tiles:
// an address that is added to costs a third of one computed from the step.
struct Rows {
    const Element* at;
    int64 stride;

    DEVICE Rows(const void* tensor, int64 offset, int64 row_stride, int step)
        : at(static_cast<const Element*>(tensor) + offset + step * row_stride), stride(row_stride) {}
    // Two or four neighbours `ahead` steps from here, zeros unless that is `within` the row.
    DEVICE Raw2 two(int ahead, bool within) const {
        Raw2 raw{};
        if (within) raw = *reinterpret_cast<const Raw2*>(at + ahead * stride);
        return raw;
    }
    DEVICE Raw4 four(int ahead, bool within) const {
        Raw4 raw{};
        if (within) raw = *reinterpret_cast<const Raw4*>(at + ahead * stride);
        return raw;
    }
    DEVICE void move(int steps) { at += steps * stride; }
};

// B and C of a chunk on their way into shared memory: a thread has 4 states of some steps.
struct ChunkInputs {
    static constexpr int FOURS = CHUNK * 8;
    static constexpr int EACH = (FOURS + THREADS - 1) / THREADS;
    static_assert(THREADS % 8 == 0, "a thread keeps to B or to C");
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

DEVICE void store_two(Element* at, float x, float y) {
    *reinterpret_cast<Raw2*>(at) = Storage::narrow(x, y);
}

DEVICE Four load_four(const float* at) { return *reinterpret_cast<const Four*>(at); }
DEVICE void store_four(float* at, const float* values) {
    *reinterpret_cast<Four*>(at) = {{values[0], values[1], values[2], values[3]}};
}
DEVICE Pair load_pair(const float* at) { return *reinterpret_cast<const Pair*>(at); }
DEVICE void store_pair(float* at, float x, float y) { *reinterpret_cast<Pair*>(at) = {x, y}; }

// Bit i: a document starts at step `first` + i of the row, other than at the row's start.
DEVICE uint32 document_starts(const int* ids, int64 length, int first) {
    const int t = first + lane_in_warp();
    return ballot(t > 0 && t < length && ids[t] != ids[t - 1]);
}

// A lane's share of A, times log2(e), so that exp(dt A) is one multiplication and one 2^x.
DEVICE void load_decays(float (&A)[2][4], const float* table, const Place& place) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const Four row = load_four(table + (place.own() + c) * STATES + 4 * place.quarter);
#pragma unroll
        for (int j = 0; j < 4; ++j) A[c][j] = LOG2_E * row.at[j];
    }
}

// Offset of a lane's states in a (..., E, 16) tensor, whose first index is `outer`.
DEVICE int64 state_offset(const Place& place, int64 outer, int64 channels) {
    return (outer * channels + place.own()) * STATES + 4 * place.quarter;
}
DEVICE void load_states(float (&h)[2][4], const float* from) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const Four row = load_four(from + c * STATES);
#pragma unroll
        for (int j = 0; j < 4; ++j) h[c][j] = row.at[j];
    }
}
DEVICE void store_states(float* to, const float (&h)[2][4]) {
    store_four(to, h[0]);
    store_four(to + STATES, h[1]);
}
DEVICE void clear(float (&h)[2][4]) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) h[c][j] = 0.f;
}

// The step that the recurrence takes.
DEVICE float step_size(float delta, float bias) {
#if SOFTPLUS
    return softplus(delta + bias);
#else
    return delta + bias;
#endif
}
DEVICE Pair step_sizes(Raw2 raw, Pair bias, bool within) {
    const Pair delta = Storage::widen(raw);
    return {within ? step_size(delta.x, bias.x) : 0.f, within ? step_size(delta.y, bias.y) : 0.f};
}

DEVICE float nonzero_gate(float z) {
    const float magnitude = z < 0.f ? -z : z;
    return magnitude < SMALLEST_GATE ? SMALLEST_GATE : z;
}
