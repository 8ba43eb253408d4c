// What both kernels of the causal convolution are made of: how elements are loaded, which part of a
// row a block works on, and where its documents start.
//
// A lane has VECTOR neighbouring channels, a warp a column of 32 VECTOR, and walks along time. The
// warps of a block have the same column and take its steps in turns of neighbouring runs, so that
// the inputs which two runs share come out of a cache.
//
// Macros: STORAGE_BF16, VECTOR (channels of a lane, as many as one access reads), WIDTH (2 to 4),
// SILU, DOCUMENTS.
#pragma once
#include "device.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int COLUMN = 32 * VECTOR;
// Inputs before its own that an output sees.
constexpr int HISTORY = WIDTH - 1;

#if STORAGE_BF16
typedef uint16 Element;
#else
typedef float Element;
#endif

// A lane's channels at one step: as they lie in memory, and to compute with.
#if STORAGE_BF16 && VECTOR == 1
struct Raw {
    uint16 bits;
};
#elif STORAGE_BF16
struct alignas(2 * VECTOR) Raw {
    uint32 pairs[VECTOR / 2];
};
#else
struct alignas(4 * VECTOR) Raw {
    float at[VECTOR];
};
#endif
struct Values {
    float at[VECTOR];
};

DEVICE Values widen(const Raw& raw) {
    Values v;
#if STORAGE_BF16 && VECTOR == 1
    v.at[0] = bf16_low(raw.bits);
#else
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
#if STORAGE_BF16
        v.at[c] = c % 2 ? bf16_high(raw.pairs[c / 2]) : bf16_low(raw.pairs[c / 2]);
#else
        v.at[c] = raw.at[c];
#endif
    }
#endif
    return v;
}

DEVICE Raw narrow(const Values& v) {
    Raw raw;
#if STORAGE_BF16 && VECTOR == 1
    raw.bits = uint16(pack_bf16(v.at[0], 0.f));
#elif STORAGE_BF16
#pragma unroll
    for (int p = 0; p < VECTOR / 2; ++p) raw.pairs[p] = pack_bf16(v.at[2 * p], v.at[2 * p + 1]);
#else
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) raw.at[c] = v.at[c];
#endif
    return raw;
}

// Zeros unless the step is `within` the row.
DEVICE Raw load(const Element* at, bool within) {
    Raw raw{};
    if (within) raw = *reinterpret_cast<const Raw*>(at);
    return raw;
}
DEVICE void store(Element* at, const Values& v) {
    const Raw raw = narrow(v);
#ifndef EMULATED
    // The compiler makes several stores of most assignments.
    const uint32* const words = reinterpret_cast<const uint32*>(&raw);
    if constexpr (sizeof(Raw) == 16) {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     :
                     : "l"(at), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
        return;
    } else if constexpr (sizeof(Raw) == 8) {
        asm volatile("st.global.v2.b32 [%0], {%1, %2};"
                     :
                     : "l"(at), "r"(words[0]), "r"(words[1])
                     : "memory");
        return;
    }
#endif
    *reinterpret_cast<Raw*>(at) = raw;
}

// Where a block and this lane stand: batch row, steps [first, end), channels from `channel` on.
struct Place {
    int64 row;
    int first, end, length;
    int column;   // the block's first channel
    int channel;  // the lane's
    // Lanes beyond the last channel do as the last one does, and write nothing.
    bool writes;

    template <class Call>
    DEVICE Place(const Call& call) {
        const int channels = int(call.channels), steps = int(call.block_steps);
        const int columns = (channels + COLUMN - 1) / COLUMN;
        length = int(call.length);
        const int parts = (length + steps - 1) / steps;
        const int rest = block_index() / columns;
        row = rest / parts;
        first = rest % parts * steps;
        end = first + steps < length ? first + steps : length;
        column = block_index() % columns * COLUMN;
        channel = column + lane_in_warp() * VECTOR;
        writes = channel < channels;
        if (!writes) channel = channels - VECTOR;
    }
};

// The weight by tap: tap j meets the input j steps back.
struct Taps {
    Values tap[WIDTH];
    Values bias;

    template <class Call>
    DEVICE Taps(const Call& call, int channel) {
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            const float* row = call.weight + int64(channel + c) * WIDTH;
#if WIDTH == 4
            const Four four = *reinterpret_cast<const Four*>(row);
            row = four.at;
#endif
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) tap[WIDTH - 1 - k].at[c] = row[k];
            bias.at[c] = call.bias ? call.bias[channel + c] : 0.f;
        }
    }
};

// Offset of a lane's first entry in a (B, E, K - 1) state.
template <class Call>
DEVICE int64 state_offset(const Call& call, const Place& place) {
    return (place.row * call.channels + place.channel) * HISTORY;
}

// Which steps from t - HISTORY on, one a lane, are the first of a document. Position 0 is none:
// what comes before it is the initial state.
struct Starts {
    int id, id_before;
    bool inside;

    DEVICE void fetch(const int* ids, int t, int length) {
        t += lane_in_warp() - HISTORY;
        inside = t > 0 && t < length;
        id = inside ? ids[t] : 0;
        id_before = inside ? ids[t - 1] : 0;
    }
    // Bit HISTORY + i is step t + i.
    DEVICE uint32 bits() const { return ballot(inside && id != id_before); }
};

// Whether step i of a tile sees the input `tap` steps back: no document starts after that input.
DEVICE bool is_joined(uint32 starts, int i, int tap) {
#if DOCUMENTS
    return !(starts & (((1u << tap) - 1) << (HISTORY + i - tap + 1)));
#else
    return true;
#endif
}

// Whether position t, which may be one of the initial state, is in the document of the row's end.
DEVICE bool reaches_end(const int* ids, int t, int length) {
#if DOCUMENTS
    for (t = t < 0 ? 0 : t; t + 1 < length; ++t)
        if (ids[t] != ids[t + 1]) return false;
#endif
    return true;
}

// The HISTORY inputs before step t, oldest first: of the row, or at its start the initial state.
template <class Call>
DEVICE void load_history(Values (&inputs)[HISTORY], const Call& call, const Place& place,
                         const Element* x, int t) {
    Raw raw[HISTORY];
#pragma unroll
    for (int i = 0; i < HISTORY; ++i) raw[i] = load(x + (i - HISTORY) * call.x_row, t > 0);
#pragma unroll
    for (int i = 0; i < HISTORY; ++i) inputs[i] = widen(raw[i]);
    if (t == 0 && call.initial_state) {
        const float* state = call.initial_state + state_offset(call, place);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
#pragma unroll
            for (int i = 0; i < HISTORY; ++i) inputs[i].at[c] = state[c * HISTORY + i];
    }
}

// `inputs` one step later.
DEVICE void shift_in(Values (&inputs)[HISTORY], const Values& newest) {
#pragma unroll
    for (int i = 0; i + 1 < HISTORY; ++i) inputs[i] = inputs[i + 1];
    inputs[HISTORY - 1] = newest;
}

// The output of step i of a tile before its activation.
DEVICE Values convolve(const Taps& taps, const Values (&before)[HISTORY], const Values& x,
                       uint32 starts, int i) {
    Values sum;
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) sum.at[c] = taps.bias.at[c] + taps.tap[0].at[c] * x.at[c];
#pragma unroll
    for (int tap = 1; tap < WIDTH; ++tap) {
        if (!is_joined(starts, i, tap)) continue;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
            sum.at[c] += taps.tap[tap].at[c] * before[HISTORY - tap].at[c];
    }
    return sum;
}
