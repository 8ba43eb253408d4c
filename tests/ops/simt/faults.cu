// Each thread takes what another one copied to shared memory, in two rounds; right unless FAULT
// says what is wrong.
#include "device.cuh"

struct Call {
    const float* given;  // (2, THREADS, 2)
    float* taken;        // the same, each round's threads in reverse
};

constexpr int NONE = 0, NO_WAIT = 1, NO_BARRIER = 2, NO_BARRIER_AFTER = 3;
constexpr int MISALIGNED = 4, MISALIGNED_COPY = 5, ASTRAY = 6, NOT_ALL_AT_BARRIER = 7;

KERNEL(faults) {
    float* const shared = reinterpret_cast<float*>(shared_memory());
    const int own = 2 * thread_in_block(), other = 2 * (THREADS - 1) - own;
    for (int round = 0; round < 2; ++round) {
        const int first = round * 2 * THREADS;
        copy_async<8>(shared + own + (FAULT == MISALIGNED_COPY), call.given + first + own, true);
        if (FAULT != NO_WAIT) wait_for_copies();
        if (FAULT == NOT_ALL_AT_BARRIER ? own > 0 : FAULT != NO_BARRIER) sync_block();
        const Pair* const from =
            reinterpret_cast<const Pair*>(shared + other + (FAULT == MISALIGNED));
        *reinterpret_cast<Pair*>(call.taken + first + own) = *from;
        if (FAULT == ASTRAY) shared[2 * THREADS + own] = 0.f;
        if (FAULT != NO_BARRIER_AFTER) sync_block();
    }
}
