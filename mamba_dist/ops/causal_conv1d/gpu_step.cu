// One step of the causal convolution with its state, as decoding takes it, channels last.
//
// A lane has VECTOR neighbouring channels of a row: their state is read and written once, and
// `final_state` may be `initial_state`, since a lane reads all of its own before it writes.
//
// Macros: STORAGE_BF16, CHANNELS (E), VECTOR (4 where all lies in aligned fours, or 1), WIDTH (2 to
// 4), SILU, that of fours.cuh.
#include "fours.cuh"

struct Call {
    const void* x;
    // Of these bias and initial_state may be null.
    const float *weight, *bias, *initial_state;
    void* y;
    // May be null.
    float* final_state;
    int64 x_row, batch;
};

#if STORAGE_BF16
typedef Bf16 Storage;
#else
typedef Fp32 Storage;
#endif
typedef Storage::Element Element;

constexpr int HISTORY = WIDTH - 1;
constexpr int RUNS = CHANNELS / VECTOR;
// Blocks of a row.
constexpr int COLUMNS = (RUNS + THREADS - 1) / THREADS;

template <int COUNT>
struct alignas(16) Numbers {
    float at[COUNT];

    DEVICE void load(const float* from) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            if (COUNT % 4 == 0) {
                const Four four = *reinterpret_cast<const Four*>(from + i);
#pragma unroll
                for (int j = 0; j < 4; ++j) at[i + j] = four.at[j];
            } else {
#pragma unroll
                for (int j = i; j < COUNT && j < i + 4; ++j) at[j] = from[j];
            }
        }
    }
    DEVICE void store(float* to) const {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            if (COUNT % 4 == 0) {
                store_at_once(to + i, {{at[i], at[i + 1], at[i + 2], at[i + 3]}});
            } else {
#pragma unroll
                for (int j = i; j < COUNT && j < i + 4; ++j) to[j] = at[j];
            }
        }
    }
};

DEVICE Numbers<VECTOR> load_inputs(const Element* from) {
    Numbers<VECTOR> x;
#if VECTOR == 4
    const Four four = Storage::widen(*reinterpret_cast<const Storage::Raw4*>(from));
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) x.at[c] = four.at[c];
#else
    x.at[0] = number(*from);
#endif
    return x;
}
DEVICE void store_outputs(Element* to, const Numbers<VECTOR>& y) {
#if VECTOR == 4
    *reinterpret_cast<Storage::Raw4*>(to) =
        Storage::narrow(Four{{y.at[0], y.at[1], y.at[2], y.at[3]}});
#else
    put(to, y.at[0]);
#endif
}

KERNEL(causal_conv1d_step) {
    const int run = block_index() % COLUMNS * THREADS + thread_in_block();
    if (run >= RUNS) return;
    const int channel = run * VECTOR;
    const int64 row = block_index() / COLUMNS;
    const int64 state_at = (row * CHANNELS + channel) * HISTORY;

    Numbers<VECTOR * HISTORY> past{};
    if (call.initial_state) past.load(call.initial_state + state_at);
    const Numbers<VECTOR> x = load_inputs(row_of<Storage>(call.x, row, call.x_row) + channel);
    Numbers<VECTOR * WIDTH> weight;
    weight.load(call.weight + int64(channel) * WIDTH);
    Numbers<VECTOR> y{};
    if (call.bias) y.load(call.bias + channel);

#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        float* const state = past.at + c * HISTORY;
        const float* const taps = weight.at + c * WIDTH;
        float sum = y.at[c] + taps[HISTORY] * x.at[c];
#pragma unroll
        for (int k = 0; k < HISTORY; ++k) sum += taps[k] * state[k];
#pragma unroll
        for (int k = 0; k < HISTORY; ++k) state[k] = k + 1 < HISTORY ? state[k + 1] : x.at[c];
#if SILU
        sum *= sigmoid(sum);
#endif
        y.at[c] = sum;
    }
    store_outputs(static_cast<Element*>(call.y) + row * CHANNELS + channel, y);
    if (call.final_state) past.store(call.final_state + state_at);
}
