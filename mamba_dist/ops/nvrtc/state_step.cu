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
// A channel of a batch row is an item. What has no states is one lane's, item i that of lane i.
constexpr int ITEMS = ROWS * RUN;
static_assert(ITEMS <= LANES && ITEMS <= 4 && (ITEMS & (ITEMS - 1)) == 0, "each item needs a lane");
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
    Storage::Raw4 B[HELD], C[HELD];

    DEVICE void load(const Call& call, int row, int group, int own) {
        const Element* const b = row_of<Storage>(call.B, row, call.B_row) + group * call.B_group;
        const Element* const c = row_of<Storage>(call.C, row, call.C_row) + group * call.C_group;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            B[i] = read_four<Storage>(b, own + i * STEP, STATES);
            C[i] = read_four<Storage>(c, own + i * STEP, STATES);
        }
    }
};

// A lane's states of one item, before the step and then after it.
struct States {
    Four h[HELD];

    DEVICE void load(const float* from, int own) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            h[i] = Four{};
            if (from) h[i] = read_four<Fp32>(from, own + i * STEP, STATES);
        }
    }
    DEVICE void store(float* to, int own) const {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int at = own + i * STEP;
#if WHOLE
            if (is_state(i, 0, own)) store_at_once(to + at, h[i]);
#else
            write_four<Fp32>(to, at, STATES, h[i]);
#endif
        }
    }
    // Gives the lane's part of C h.
    DEVICE float take_step(const Row& row, float dt, float inflow, const Four (&rate)[HELD],
                           int own) {
#if PER_HEAD
        const float decay = exp2_approx(dt * rate[0].at[0]);
#endif
        float y = 0.f;
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
        return y;
    }
};

// The sum over a channel's lanes of the item that is this lane's. Lanes are paired in the same order
// for any ITEMS, so that an item's bits do not depend on how many there are.
DEVICE float summed(float (&y)[ITEMS], int lane) {
#pragma unroll
    for (int mask = 2; mask > 0; mask /= 2) {
        if (mask >= LANES) continue;
        if (mask >= ITEMS) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) y[i] += from_lane_xor(y[i], mask);
            continue;
        }
        // Each lane of a pair hands over the half of its items that the other one goes on with.
        const bool upper = lane & mask;
#pragma unroll
        for (int i = 0; i < mask; ++i) {
            const float other = from_lane_xor(upper ? y[i] : y[i + mask], mask);
            y[i] = (upper ? y[i + mask] : y[i]) + other;
        }
    }
#pragma unroll
    for (int mask = 4; mask < LANES; mask *= 2) y[0] += from_lane_xor(y[0], mask);
    return y[0];
}

KERNEL(state_step) {
    const int last_row = int(call.batch) - 1;
    const int lane = thread_in_block() % LANES, own = 4 * lane;
    int run = block_index() % COLUMNS * SLOTS + thread_in_block() / LANES;
    // Lanes and rows beyond the last do as the last does, and write nothing.
    const bool inside = run < RUNS;
    if (!inside) run = RUNS - 1;
    const int channel = run * RUN;
    const int head = channel / HEADDIM;
    const int group = channel / (CHANNELS / GROUPS);
    const int first = block_index() / COLUMNS * ROWS;
    const int mine = lane % ITEMS;
    const int my_row = first + mine / RUN, my_channel = channel + mine % RUN;

    int row[ROWS];
    States states[ITEMS];
    Row rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        row[r] = first + r < last_row ? first + r : last_row;
#pragma unroll
        for (int c = 0; c < RUN; ++c) {
            const int64 at = (int64(row[r]) * CHANNELS + channel + c) * STATES;
            states[r * RUN + c].load(call.before ? call.before + at : nullptr, own);
        }
        rows[r].load(call, row[r], group, own);
    }
    const int read_row = my_row < last_row ? my_row : last_row;
    const float x = number(row_of<Storage>(call.x, read_row, call.x_row)[my_channel]);
    float dt = number(row_of<Storage>(call.dt, read_row, call.dt_row)[head]);
#if GATE
    const float z = number(row_of<Storage>(call.z, read_row, call.z_row)[my_channel]);
#endif
    if (call.bias) dt += call.bias[head];
    const float skip = call.D ? call.D[head] : 0.f;
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
#if SOFTPLUS
    dt = softplus(dt);
#endif
    const float inflow = dt * x;

    float y[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int owner = lane_in_warp() - lane + i;
        y[i] = states[i].take_step(rows[i / RUN], ROWS == 1 ? dt : from_lane(dt, owner),
                                   ITEMS == 1 ? inflow : from_lane(inflow, owner), rate, own);
        const int64 at = (int64(first + i / RUN) * CHANNELS + channel + i % RUN) * STATES;
        if (inside && first + i / RUN <= last_row) states[i].store(call.after + at, own);
    }
    float out = summed(y, lane);
    // Not by a D of zero, which times an infinite input is no number.
    if (call.D) out += skip * x;
#if GATE
    out *= z * sigmoid(z);
#endif
    if (inside && my_row <= last_row && lane == mine)
        put(static_cast<Element*>(call.y) + int64(my_row) * CHANNELS + my_channel, out);
}
