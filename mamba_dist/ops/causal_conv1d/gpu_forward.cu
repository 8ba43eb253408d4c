// Causal convolution, forward, channels last; see gpu_column.cuh for who does what and the macros.
#include "gpu_column.cuh"

struct Call {
    const void* x;
    const float *weight, *bias, *initial_state;
    const int* seq_idx;
    void* y;
    float* final_state;
    int64 x_batch, x_row, seq_idx_batch, length, channels, block_steps;
};

// Steps that are loaded together, and that a warp has before it is another one's turn.
constexpr int TILE = 8;

DEVICE void write_final_state(const Call& call, const Place& place, const Element* x_row,
                              const int* ids) {
    const int64 offset = state_offset(call, place);
#pragma unroll
    for (int i = 0; i < HISTORY; ++i) {
        const int t = place.length - HISTORY + i;
        Values v = widen(load(x_row + t * call.x_row, t >= 0));
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            if (t < 0 && call.initial_state)
                v.at[c] = call.initial_state[offset + c * HISTORY + HISTORY + t];
            if (!reaches_end(ids, t, place.length)) v.at[c] = 0.f;
            if (place.writes) call.final_state[offset + c * HISTORY + i] = v.at[c];
        }
    }
}

KERNEL(causal_conv1d_forward) {
    const Place place(call);
    const Taps taps(call, place.channel);
    const Element* const x_row =
        static_cast<const Element*>(call.x) + place.row * call.x_batch + place.channel;
    Element* const y_row =
        static_cast<Element*>(call.y) + place.row * call.length * call.channels + place.channel;
    const int* const ids = call.seq_idx + place.row * call.seq_idx_batch;

#pragma unroll 1
    for (int t = place.first + warp_in_block() * TILE; t < place.end; t += WARPS * TILE) {
        const Element* const x = x_row + t * call.x_row;
        Raw raw[TILE];
#pragma unroll
        for (int i = 0; i < TILE; ++i) raw[i] = load(x + i * call.x_row, t + i < place.end);
        uint32 starts = 0;
#if DOCUMENTS
        Starts at;
        at.fetch(ids, t, place.length);
        starts = at.bits();
#endif
        Values before[HISTORY];
        load_history(before, call, place, x, t);
        Element* const y = y_row + t * call.channels;
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            const Values now = widen(raw[i]);
            Values out = convolve(taps, before, now, starts, i);
            shift_in(before, now);
#if SILU
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) out.at[c] *= sigmoid(out.at[c]);
#endif
            if (place.writes && t + i < place.end) store(y + i * call.channels, out);
        }
    }
    if (call.final_state && place.end == place.length && warp_in_block() == 0)
        write_final_state(call, place, x_row, ids);
}
