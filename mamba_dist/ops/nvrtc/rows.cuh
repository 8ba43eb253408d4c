// Rows of tensors for kernels that reduce each row: who has which elements, and reductions.
//
// A team of TEAM threads has a row, a block has TEAMS rows at a time. A thread's elements of a tile
// are HELD fours, TEAM fours apart, so that neighbouring threads read neighbouring memory.
//
// Macros: TEAM, HELD, and that of fours.cuh.
#pragma once
#include "fours.cuh"

constexpr int TEAMS = THREADS / TEAM;
constexpr int WARPS = THREADS / 32;
constexpr int TEAM_WARPS = TEAM / 32;
constexpr int STEP = 4 * TEAM;
constexpr int TILE = HELD * STEP;
static_assert(TEAM % 32 == 0 && THREADS % TEAM == 0, "teams are made of whole warps");

DEVICE int team_in_block() { return thread_in_block() / TEAM; }
DEVICE int thread_in_team() { return thread_in_block() % TEAM; }

struct Sum {
    DEVICE static float of(float x, float y) { return x + y; }
};
struct Largest {
    DEVICE static float of(float x, float y) { return fmaxf(x, y); }
};

// The same for all threads of a team, in an order that depends on TEAM alone. All threads of the
// block take part. `slots` are WARPS floats of shared memory, which nobody may still be reading:
// two sets that take turns need no other barrier than the one in here.
template <class Operation>
DEVICE float over_team(float value, float* slots) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
        value = Operation::of(value, from_lane_xor(value, mask));
    if (TEAM_WARPS == 1) return value;
    if (lane_in_warp() == 0) slots[warp_in_block()] = value;
    sync_block();
    const float* const own = slots + team_in_block() * TEAM_WARPS;
    value = own[0];
#pragma unroll
    for (int warp = 1; warp < TEAM_WARPS; ++warp) value = Operation::of(value, own[warp]);
    return value;
}
