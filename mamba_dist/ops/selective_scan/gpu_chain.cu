// The states (or gradients of states) at the borders between parts of the length, from what each
// part made of a zero: with s the sum of the steps in a part,
//     state after it = exp(s A) (state before it) + (its end state from zero).
#include "device.cuh"

struct Call {
    const float *A, *initial, *split_steps;
    float* split_states;  // in: each part's own; out: what comes in at each part's beginning
    int64 batch, channels, splits, backwards;
};

constexpr int STATES = 16;

KERNEL(selective_scan_chain) {
    const int64 item = int64(block_index()) * THREADS + thread_in_block();
    const int64 per_row = call.channels * STATES;
    if (item >= call.batch * per_row) return;
    const int64 row = item / per_row, state = item % per_row, channel = state / STATES;
    const float A = per_log2(call.A[state]);
    float running = call.initial ? call.initial[item] : 0.f;
    for (int64 i = 0; i < call.splits; ++i) {
        const int64 part = row * call.splits + (call.backwards ? call.splits - 1 - i : i);
        float* const at = call.split_states + part * per_row + state;
        const float sum = call.split_steps[part * call.channels + channel];
        const float own = *at;
        *at = running;
        // An infinite sum says that a document starts in the part: nothing gets through.
        running = own + (sum > 3e38f ? 0.f : exp2_approx(sum * A) * running);
    }
}
