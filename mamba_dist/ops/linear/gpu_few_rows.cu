// Products of a bf16 matrix with a few vectors, y = W x: what a projection is while one text grows.
//
// Time goes into reading W (O, I), once: TEAM threads have an output, read eight neighbouring
// weights each at a time, and ask for PIECES_AHEAD of these before they need the first.
//
// Macros: INPUTS (I, a multiple of 8), OUTPUTS (O), ROWS of x, TEAM (a power of two), BIAS.
#include "device.cuh"

struct Call {
    const void *x, *weight, *bias;
    void* y;
    int64 x_row;
};

struct alignas(16) Eight {
    uint32 pairs[4];
};

constexpr int WARPS = THREADS / 32;
constexpr int TEAMS = THREADS / TEAM;
constexpr int TEAM_WARPS = (TEAM + 31) / 32;
constexpr int PIECES = INPUTS / 8;
constexpr int ROUNDS = (PIECES + TEAM - 1) / TEAM;
// With many rows their inputs need the registers.
constexpr int MOST_AHEAD = ROWS > 2 ? 4 : 8;
constexpr int PIECES_AHEAD = ROUNDS < MOST_AHEAD ? ROUNDS : MOST_AHEAD;

DEVICE float dot(const Eight& a, const Eight& b, float sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum += bf16_low(a.pairs[i]) * bf16_low(b.pairs[i]);
        sum += bf16_high(a.pairs[i]) * bf16_high(b.pairs[i]);
    }
    return sum;
}

// The same for all threads of a team. All threads of the block take part.
DEVICE float over_team(float value, float* slots) {
#pragma unroll
    for (int mask = (TEAM < 32 ? TEAM : 32) / 2; mask > 0; mask /= 2)
        value += from_lane_xor(value, mask);
    if (TEAM_WARPS == 1) return value;
    if (lane_in_warp() == 0) slots[warp_in_block()] = value;
    sync_block();
    const float* const own = slots + thread_in_block() / TEAM * TEAM_WARPS;
    value = own[0];
#pragma unroll
    for (int warp = 1; warp < TEAM_WARPS; ++warp) value += own[warp];
    return value;
}

KERNEL(linear_few_rows) {
    const int thread = thread_in_block() % TEAM;
    const int output = block_index() * TEAMS + thread_in_block() / TEAM;
    // Teams beyond the last output do as the last does, and write nothing.
    const int read = output < OUTPUTS ? output : OUTPUTS - 1;
    const Eight* const weight = static_cast<const Eight*>(call.weight) + int64(read) * PIECES;
    float sums[ROWS]{};

#pragma unroll 1
    for (int round = 0; round < ROUNDS; round += PIECES_AHEAD) {
        Eight pieces[PIECES_AHEAD];
#pragma unroll
        for (int i = 0; i < PIECES_AHEAD; ++i) {
            const int at = (round + i) * TEAM + thread;
            pieces[i] = Eight{};
            if (at < PIECES) pieces[i] = weight[at];
        }
#pragma unroll
        for (int i = 0; i < PIECES_AHEAD; ++i) {
            const int at = (round + i) * TEAM + thread;
            if (at >= PIECES) continue;
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const Eight* const x = reinterpret_cast<const Eight*>(
                    static_cast<const uint16*>(call.x) + row * call.x_row);
                // Copied, for of a reference the compiler reads each word by itself.
                const Eight piece = x[at];
                sums[row] = dot(pieces[i], piece, sums[row]);
            }
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        float* const slots = reinterpret_cast<float*>(shared_memory()) + row * WARPS;
        float y = over_team(sums[row], slots);
#if BIAS
        y += bf16_low(static_cast<const uint16*>(call.bias)[read]);
#endif
        if (output < OUTPUTS && thread == 0)
            static_cast<uint16*>(call.y)[row * OUTPUTS + output] = uint16(pack_bf16(y, 0.f));
    }
}
