// One step of a recurrence, as decoding takes it: h = exp(dt A) h + dt x B, y = (C h + D x) silu(z).
// With PER_HEAD it is SSD's, which has a dt and a rate for each head (arXiv 2405.21060, section 3),
// otherwise the selective scan's, which has a rate for each state (arXiv 2312.00752, algorithm 2)
// and is a head of each channel here.
//
// Time goes into reading and writing states, each once. LANES neighbouring lanes share a channel and
// read four of its states at a time; a lane has RUN neighbouring channels of ROWS batch rows, asks for
// all of their states before it needs the first, and reads only once what they share.
//
// `after` may be `before`: each state is one lane's, which reads all of its own before it writes.
//
// Macros: STORAGE_BF16, PER_HEAD, CHANNELS (E), HEADDIM (P), GROUPS, STATES (N), LANES (a power of
// two), ROWS, RUN (a divisor of HEADDIM), SOFTPLUS, GATE, that of fours.cuh; A_LOG says that
// A = -exp(call.A). Sizes are macros because at batch 1 a division takes as long as the sums.
#include "fours.cuh"

struct Call {
    const void *x, *dt, *B, *C, *z;
    // Of these D, bias and before may be null.
    const float *A, *D, *bias, *before;
    void* y;
    float* after;
    int64 x_row, dt_row, B_row, B_group, C_row, C_group, z_row;
    int64 batch;
};

#if STORAGE_BF16
typedef Bf16 Storage;
#else
typedef Fp32 Storage;
#endif
typedef Storage::Element Element;

constexpr int SLOTS = THREADS / LANES;
constexpr int STEP = 4 * LANES;
constexpr int HELD = (STATES + STEP - 1) / STEP;
constexpr int RUNS = CHANNELS / RUN;
// Blocks side by side.
constexpr int COLUMNS = (RUNS + SLOTS - 1) / SLOTS;
static_assert(HEADDIM % RUN == 0 && CHANNELS % HEADDIM == 0, "a lane's channels have one head");

// Of exp(dt A) as a power of two.
DEVICE float rate_of(float A) {
#if A_LOG
    A = -exp2_approx(LOG2_E * A);
#endif
    return per_log2(A);
}

// Whether the j-th element of a lane's i-th four is one; known when compiled for most N.
DEVICE bool is_state(int i, int j, int own) {
    return STATES == HELD * STEP || own + i * STEP + j < STATES;
}

// What a batch row gives to all channels of a lane.
struct Row {
    float dt;
    Storage::Raw4 B[HELD], C[HELD];

    DEVICE void load(const Call& call, int row, int head, int group, int own) {
        dt = number(row_of<Storage>(call.dt, row, call.dt_row)[head]);
        const Element* const b = row_of<Storage>(call.B, row, call.B_row) + group * call.B_group;
        const Element* const c = row_of<Storage>(call.C, row, call.C_row) + group * call.C_group;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            B[i] = read_four<Storage>(b, own + i * STEP, STATES);
            C[i] = read_four<Storage>(c, own + i * STEP, STATES);
        }
    }
};

// A channel of a batch row: its states, before the step and then after it.
struct Channel {
    float x, z, y;
    Four h[HELD];

    DEVICE void load(const Call& call, int row, int channel, int own) {
        x = number(row_of<Storage>(call.x, row, call.x_row)[channel]);
#if GATE
        z = number(row_of<Storage>(call.z, row, call.z_row)[channel]);
#endif
        const int64 at = (int64(row) * CHANNELS + channel) * STATES;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            h[i] = Four{};
            if (call.before) h[i] = read_four<Fp32>(call.before + at, own + i * STEP, STATES);
        }
    }
    // `y` becomes the lane's part of C h.
    DEVICE void take_step(const Row& row, float dt, const Four (&rate)[HELD], int own) {
        const float inflow = dt * x;
#if PER_HEAD
        const float decay = exp2_approx(dt * rate[0].at[0]);
#endif
        y = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const Four B = Storage::widen(row.B[i]), C = Storage::widen(row.C[i]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (!is_state(i, j, own)) continue;
#if !PER_HEAD
                const float decay = exp2_approx(dt * rate[i].at[j]);
#endif
                h[i].at[j] = decay * h[i].at[j] + inflow * B.at[j];
                y += C.at[j] * h[i].at[j];
            }
        }
    }
    DEVICE void store(const Call& call, int row, int channel, int own, float skip, bool writes_y) {
        const int64 at = int64(row) * CHANNELS + channel;
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            write_four<Fp32>(call.after + at * STATES, own + i * STEP, STATES, h[i]);
        float out = y + skip * x;
#if GATE
        out *= z * sigmoid(z);
#endif
        if (writes_y) put(static_cast<Element*>(call.y) + at, out);
    }
};

KERNEL(state_step) {
    const int batch = int(call.batch);
    const int lane = thread_in_block() % LANES, own = 4 * lane;
    int run = block_index() % COLUMNS * SLOTS + thread_in_block() / LANES;
    // Lanes and rows beyond the last do as the last does, and write nothing.
    const bool inside = run < RUNS;
    if (!inside) run = RUNS - 1;
    const int channel = run * RUN;
    const int head = channel / HEADDIM;
    const int group = channel / (CHANNELS / GROUPS);
    const int first = block_index() / COLUMNS * ROWS;

    Channel at[ROWS][RUN];
    Row rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int row = first + r < batch ? first + r : batch - 1;
#pragma unroll
        for (int c = 0; c < RUN; ++c) at[r][c].load(call, row, channel + c, own);
        rows[r].load(call, row, head, group, own);
    }
    Four rate[HELD];
#if PER_HEAD
    rate[0].at[0] = rate_of(call.A[head]);
#else
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        rate[i] = read_four<Fp32>(call.A + int64(channel) * STATES, own + i * STEP, STATES);
#pragma unroll
        for (int j = 0; j < 4; ++j) rate[i].at[j] = rate_of(rate[i].at[j]);
    }
#endif
    const float bias = call.bias ? call.bias[head] : 0.f;
    const float skip = call.D ? call.D[head] : 0.f;

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float dt = rows[r].dt + bias;
#if SOFTPLUS
        dt = softplus(dt);
#endif
#pragma unroll
        for (int c = 0; c < RUN; ++c) at[r][c].take_step(rows[r], dt, rate, own);
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int c = 0; c < RUN; ++c) at[r][c].y += from_lane_xor(at[r][c].y, mask);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < RUN; ++c)
            if (inside && first + r < batch)
                at[r][c].store(call, first + r, channel + c, own, skip,
                               lane == (r * RUN + c) % LANES);
}
