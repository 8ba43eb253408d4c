// Runs the CUDA kernels' sources on a CPU, so that their arithmetic, indices and barriers are
// tested where there is no GPU. Each thread of a block is a fibre; a barrier or an exchange between
// lanes hands over to the next one. Slow, and the same at every run.
//
// What it cannot show: timing, registers, races between warps that a real schedule would expose.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EMULATED
#define DEVICE inline
#define __restrict__

namespace simt {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 * 1024;

struct Barrier {
    int waiting = 0;
    long generation = 0;
};

struct Fibre {
    ucontext_t start;
    jmp_buf resume;
    std::vector<char> stack;
    bool started = false;
    bool done = false;
};

struct Block {
    std::function<void()> body;
    std::vector<Fibre> fibres;
    std::vector<char> shared;
    std::vector<Barrier> warp_barriers;
    std::vector<float> exchanged;
    std::vector<float> fragments;
    Barrier barrier;
    int current = 0;
    int index = 0;
    ucontext_t scheduler;
    jmp_buf scheduler_resume;
};

inline Block* block = nullptr;

inline void enter() {
    block->body();
    block->fibres[block->current].done = true;
    _longjmp(block->scheduler_resume, 1);
}

inline void yield() {
    if (_setjmp(block->fibres[block->current].resume) == 0) _longjmp(block->scheduler_resume, 1);
}

inline void wait(Barrier& barrier, int members) {
    const long generation = barrier.generation;
    if (++barrier.waiting == members) {
        barrier.waiting = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline int warp_members() {
    const int threads = int(block->fibres.size());
    const int first = block->current / WARP * WARP;
    return threads - first < WARP ? threads - first : WARP;
}

inline float exchange(float value, int lane) {
    const int first = block->current / WARP * WARP;
    Barrier& barrier = block->warp_barriers[size_t(first / WARP)];
    block->exchanged[size_t(block->current)] = value;
    wait(barrier, warp_members());
    const float received = block->exchanged[size_t(first + lane)];
    wait(barrier, warp_members());
    return received;
}

// Gives up, as a hang on a GPU would be found by a person, when no fibre gets any further.
inline void run_block(Block& current) {
    block = &current;
    long turns_left = 400L * 1000 * 1000;
    for (size_t remaining = current.fibres.size(); remaining;) {
        for (size_t i = 0; i < current.fibres.size(); ++i) {
            Fibre& fibre = current.fibres[i];
            if (fibre.done) continue;
            current.current = int(i);
            if (--turns_left == 0) {
                fprintf(stderr, "emulated kernel: threads wait at different barriers\n");
                abort();
            }
            if (_setjmp(current.scheduler_resume) == 0) {
                if (fibre.started) _longjmp(fibre.resume, 1);
                fibre.started = true;
                setcontext(&fibre.start);
            }
            if (fibre.done) --remaining;
        }
    }
}

inline void run_grid(int blocks, int threads, size_t shared_bytes, std::function<void()> body) {
    for (int index = 0; index < blocks; ++index) {
        Block current;
        current.body = body;
        current.index = index;
        // Whatever a kernel reads without having written it is NaN.
        current.shared.assign(shared_bytes + 16, char(0xff));
        current.warp_barriers.resize(size_t((threads + WARP - 1) / WARP));
        current.exchanged.assign(size_t(threads), 0.f);
        current.fragments.assign(size_t(threads) * 6, 0.f);
        current.fibres = std::vector<Fibre>(size_t(threads));
        for (Fibre& fibre : current.fibres) {
            fibre.stack.resize(STACK_BYTES);
            getcontext(&fibre.start);
            fibre.start.uc_stack.ss_sp = fibre.stack.data();
            fibre.start.uc_stack.ss_size = STACK_BYTES;
            fibre.start.uc_link = nullptr;
            makecontext(&fibre.start, enter, 0);
        }
        run_block(current);
    }
}

}  // namespace simt

#define KERNEL(name)                                                                        \
    static void name##_body(const Call& call);                                              \
    extern "C" void name(const Call* call, int blocks, int threads, int64_t shared_bytes) { \
        simt::run_grid(blocks, threads, size_t(shared_bytes), [=] { name##_body(*call); }); \
    }                                                                                       \
    static void name##_body(const Call& call)

inline char* shared_memory() {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(simt::block->shared.data()) + 15) &
                                   ~uintptr_t(15));
}
inline int thread_in_block() { return simt::block->current; }
inline int block_index() { return simt::block->index; }
inline void sync_block() { simt::wait(simt::block->barrier, int(simt::block->fibres.size())); }
inline void sync_warp() {
    simt::wait(simt::block->warp_barriers[size_t(simt::block->current / simt::WARP)],
               simt::warp_members());
}
inline float from_lane(float value, int lane) { return simt::exchange(value, lane); }
inline float from_lane_xor(float value, int mask) {
    return simt::exchange(value, (simt::block->current % simt::WARP) ^ mask);
}
inline unsigned ballot(bool condition) {
    unsigned bits = 0;
    for (int lane = 0; lane < simt::WARP; ++lane)
        bits |= unsigned(simt::exchange(condition ? 1.f : 0.f, lane) != 0.f) << lane;
    return bits;
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float reciprocal_sqrt(float x) { return 1.f / std::sqrt(x); }
inline float bits_to_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned round_to_bf16(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline unsigned pack_bf16(float low, float high) {
    return round_to_bf16(low) | (round_to_bf16(high) << 16);
}
template <int BYTES>
inline void copy_async(void* shared, const void* global, bool within) {
    if (within)
        memcpy(shared, global, BYTES);
    else
        memset(shared, 0, BYTES);
}
inline void wait_for_copies() {}
inline unsigned float_to_bits(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline void multiply_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
    constexpr int EACH = 6;
    const int first = simt::block->current / simt::WARP * simt::WARP;
    const int lane = simt::block->current - first;
    simt::Barrier& barrier = simt::block->warp_barriers[size_t(first / simt::WARP)];
    float* all = simt::block->fragments.data() + first * EACH;
    const float own[EACH] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int i = 0; i < EACH; ++i)
        all[lane * EACH + i] = bits_to_float(float_to_bits(own[i]) & 0xffffe000u);
    simt::wait(barrier, simt::WARP);
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 8; ++k)
            d[i] += all[(4 * row + k % 4) * EACH + i / 2 + 2 * (k / 4)] *
                    all[(4 * column + k % 4) * EACH + 4 + k / 4];
    }
    simt::wait(barrier, simt::WARP);
}
inline void add_to_global(float* target, float value) { *target += value; }
