// Causal convolution, backward; see gpu_column.cuh for who does what and the macros.
//
// What the activation was given is computed again from x. Outputs' gradients walk by and each adds
// to the K inputs that it saw; the oldest of these is then done. Gradients of weight and bias are
// summed over a lane's steps in registers, over the block in shared memory, and over blocks by the
// caller: always in the same order.
//
// STATES: there are gradients of the final or the initial state.
#include "gpu_column.cuh"

struct Call {
    const void *x, *grad_y;
    const float *weight, *bias, *initial_state, *grad_final_state;
    const int* seq_idx;
    void* grad_x;
    // `shares` is (B, parts of a row, K + 1, E): each block's gradient of the taps and the bias.
    float *grad_initial_state, *shares;
    int64 x_batch, x_row, grad_y_batch, grad_y_row, grad_x_batch, grad_x_row;
    int64 seq_idx_batch, length, channels, block_steps;
    // Steps that a warp has before it is another one's turn, a multiple of TILE.
    int64 run_steps;
};

// Steps that a lane's loads are ahead of what it computes.
constexpr int TILE = 4;

struct Sums {
    Values tap[WIDTH];
    Values bias;
};

// x and grad_y from one step on. A step's registers take the one TILE steps later as soon as they
// were read, so that loads are always under way. Addresses move along, as computing them costs
// more.
struct Inputs {
    const Element *x, *grad_y;
    Raw raw_x[TILE], raw_grad_y[TILE];

    // Step i of the tile at the addresses, zeros unless it is `within` the row.
    DEVICE void fetch(const Call& call, int i, bool within) {
        raw_x[i] = load(x + i * call.x_row, within);
        raw_grad_y[i] = load(grad_y + i * call.grad_y_row, within);
    }
    DEVICE void move(const Call& call) {
        x += TILE * call.x_row;
        grad_y += TILE * call.grad_y_row;
    }
};

// The gradient before the activation, which was given `value`.
DEVICE Values before_activation(const Values& grad, const Values& value) {
    Values result;
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        float slope = 1.f;
#if SILU
        const float gate = sigmoid(value.at[c]);
        slope = gate + value.at[c] * gate * (1.f - gate);
#endif
        result.at[c] = grad.at[c] * slope;
    }
    return result;
}

// Writes the finished gradient of position t, below 0 of the initial state, to the lane's `at`.
DEVICE void write(const Call& call, const Place& place, const int* ids, Element* at, int t,
                  Values grad) {
#if STATES
    const int64 state = state_offset(call, place) + HISTORY + t;
    if (call.grad_final_state && t >= place.length - HISTORY && reaches_end(ids, t, place.length))
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
            grad.at[c] += call.grad_final_state[state + c * HISTORY - place.length];
    if (t < 0) {
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) call.grad_initial_state[state + c * HISTORY] = grad.at[c];
        return;
    }
#endif
    store(at, grad);
}

// Adds what step i of a tile sends back: to the taps and the bias if the step is the run's `own`,
// to the inputs it saw, oldest first in `sent`, always. Returns the gradient of the oldest.
DEVICE Values send_back(const Taps& taps, Sums& sums, Values (&sent)[HISTORY], const Values& grad,
                        const Values (&before)[HISTORY], const Values& x, uint32 starts, int i,
                        bool own) {
#pragma unroll
    for (int tap = 1; tap < WIDTH; ++tap) {
        if (!is_joined(starts, i, tap)) continue;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            sent[HISTORY - tap].at[c] += taps.tap[tap].at[c] * grad.at[c];
            if (own) sums.tap[tap].at[c] += grad.at[c] * before[HISTORY - tap].at[c];
        }
    }
    Values newest;
    const Values oldest = sent[0];
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        if (own) sums.tap[0].at[c] += grad.at[c] * x.at[c];
        if (own) sums.bias.at[c] += grad.at[c];
        newest.at[c] = taps.tap[0].at[c] * grad.at[c];
    }
    shift_in(sent, newest);
    return oldest;
}

// The inputs' gradients of steps [begin, end), and their part of the sums.
DEVICE void walk(const Call& call, const Place& place, const Taps& taps, Sums& sums, int begin,
                 int end) {
    Inputs inputs;
    inputs.x = static_cast<const Element*>(call.x) + place.row * call.x_batch +
               begin * call.x_row + place.channel;
    inputs.grad_y = static_cast<const Element*>(call.grad_y) + place.row * call.grad_y_batch +
                    begin * call.grad_y_row + place.channel;
    const int* const ids = call.seq_idx + place.row * call.seq_idx_batch;
    Element* grad_x = static_cast<Element*>(call.grad_x) + place.row * call.grad_x_batch +
                      (begin - HISTORY) * call.grad_x_row + place.channel;
    const bool has_state = STATES && begin == 0 && call.grad_initial_state;
    const int lowest = !place.writes ? end : has_state ? -HISTORY : begin;
    const int last = end + HISTORY;
    // Beyond the row both inputs are zeros, and so is what those steps send back; unless one of the
    // inputs they see is NaN, whose own step has then sent NaN to all that they reach.
    const int readable = last < place.length ? last : place.length;
    Values before[HISTORY], sent[HISTORY] = {};
    load_history(before, call, place, inputs.x, begin);
#pragma unroll
    for (int i = 0; i < TILE; ++i) inputs.fetch(call, i, begin + i < readable);
    Starts next_starts;
    if (DOCUMENTS) next_starts.fetch(ids, begin, place.length);
#pragma unroll 1
    for (int t = begin; t < last; t += TILE) {
        inputs.move(call);
        uint32 starts = 0;
        if (DOCUMENTS) {
            starts = next_starts.bits();
            next_starts.fetch(ids, t + TILE, place.length);
        }
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            const Values x = widen(inputs.raw_x[i]), grad_y = widen(inputs.raw_grad_y[i]);
            inputs.fetch(call, i, t + TILE + i < readable);
            const Values grad = before_activation(grad_y, convolve(taps, before, x, starts, i));
            const Values done =
                send_back(taps, sums, sent, grad, before, x, starts, i, t + i < end);
            shift_in(before, x);
            const int position = t + i - HISTORY;
            if (position >= lowest && position < end)
                write(call, place, ids, grad_x + i * call.grad_x_row, position, done);
        }
        grad_x += TILE * call.grad_x_row;
    }
}

// Adds up the warps' sums, each (K + 1, COLUMN) in shared memory with the taps as in the weight.
DEVICE void write_shares(const Call& call, const Place& place, const Sums& sums) {
    constexpr int SUMS = (WIDTH + 1) * COLUMN;
    float* const shared = reinterpret_cast<float*>(shared_memory());
    float* const own = shared + warp_in_block() * SUMS + lane_in_warp() * VECTOR;
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) own[k * COLUMN + c] = sums.tap[WIDTH - 1 - k].at[c];
        own[WIDTH * COLUMN + c] = sums.bias.at[c];
    }
    sync_block();
    const int parts = int((call.length + call.block_steps - 1) / call.block_steps);
    const int64 part = place.row * parts + place.first / int(call.block_steps);
    for (int i = thread_in_block(); i < SUMS; i += THREADS) {
        float sum = shared[i];
#pragma unroll
        for (int warp = 1; warp < WARPS; ++warp) sum += shared[warp * SUMS + i];
        const int k = i / COLUMN, channel = place.column + i % COLUMN;
        if (channel < call.channels)
            call.shares[(part * (WIDTH + 1) + k) * call.channels + channel] = sum;
    }
}

KERNEL(causal_conv1d_backward) {
    const Place place(call);
    const Taps taps(call, place.channel);
    Sums sums = {};
    const int steps = int(call.run_steps);
#pragma unroll 1
    for (int begin = place.first + warp_in_block() * steps; begin < place.end;
         begin += WARPS * steps)
        walk(call, place, taps, sums, begin, begin + steps < place.end ? begin + steps : place.end);
    write_shares(call, place, sums);
}
