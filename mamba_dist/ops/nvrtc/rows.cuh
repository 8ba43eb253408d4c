// Rows of tensors for kernels that reduce each row: who has which elements, loads and stores of
// four elements at a time, and reductions.
//
// A team of TEAM threads has a row, a block has TEAMS rows at a time. A thread's elements of a tile
// are HELD fours, TEAM fours apart, so that neighbouring threads read neighbouring memory.
//
// Macros: TEAM, HELD; WHOLE says that rows consist of whole fours, all at aligned addresses.
#pragma once
#include "device.cuh"

constexpr int TEAMS = THREADS / TEAM;
constexpr int WARPS = THREADS / 32;
constexpr int TEAM_WARPS = TEAM / 32;
constexpr int STEP = 4 * TEAM;
constexpr int TILE = HELD * STEP;
static_assert(TEAM % 32 == 0 && THREADS % TEAM == 0, "teams are made of whole warps");

DEVICE int team_in_block() { return thread_in_block() / TEAM; }
DEVICE int thread_in_team() { return thread_in_block() % TEAM; }

DEVICE Bits2 gathered(const uint16* at, int count) {
    uint32 bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) bits[j] = j < count ? at[j] : 0;
    return {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
}
DEVICE Four gathered(const float* at, int count) {
    Four values;
#pragma unroll
    for (int j = 0; j < 4; ++j) values.at[j] = j < count ? at[j] : 0.f;
    return values;
}
DEVICE void scatter(uint16* at, Bits2 raw, int count) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint32 word = j < 2 ? raw.low : raw.high;
        if (j < count) at[j] = uint16(j % 2 ? word >> 16 : word);
    }
}
DEVICE void scatter(float* at, Four values, int count) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (j < count) at[j] = values.at[j];
}

// Elements `at` to `at` + 3 of a row, as they lie in memory; zeros from `limit` on.
template <class Storage>
DEVICE typename Storage::Raw4 read_four(const typename Storage::Element* row, int at, int limit) {
    typename Storage::Raw4 raw{};
#if WHOLE
    if (at < limit) raw = *reinterpret_cast<const typename Storage::Raw4*>(row + at);
#else
    if (at < limit) raw = gathered(row + at, limit - at);
#endif
    return raw;
}
template <class Storage>
DEVICE void write_four(typename Storage::Element* row, int at, int limit, Four values) {
    const typename Storage::Raw4 raw = Storage::narrow(values);
#if WHOLE
    if (at < limit) *reinterpret_cast<typename Storage::Raw4*>(row + at) = raw;
#else
    if (at < limit) scatter(row + at, raw, limit - at);
#endif
}

// Row `index` of a tensor whose rows lie `stride` elements apart.
template <class Storage>
DEVICE const typename Storage::Element* row_of(const void* tensor, int64 index, int64 stride) {
    return static_cast<const typename Storage::Element*>(tensor) + index * stride;
}
template <class Storage>
DEVICE typename Storage::Element* row_of(void* tensor, int64 index, int64 stride) {
    return static_cast<typename Storage::Element*>(tensor) + index * stride;
}

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
