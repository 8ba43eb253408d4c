// Runs the CUDA kernels' sources on a CPU, so that their arithmetic, indices and barriers are
// tested where there is no GPU. Each thread of a block is a fibre, which goes on until it has to
// wait for others at a barrier or in an exchange between lanes.
//
// What a GPU leaves open is as bad as it can be here: which block, warp and lane comes first is
// random, and a warp often runs alone as far as it gets; a copy to shared memory destroys what is
// there at once and arrives when its thread waits for it; memory that nobody wrote is NaN. Writes
// behind shared memory, vectors at addresses that a GPU refuses and barriers that not everybody
// reaches are errors.
//
// What it cannot show: timing and registers; races that need two threads to take turns between two
// barriers; that exchanges between lanes are no barriers for memory, as they are here; blocks that
// depend on each other, which run one by one; and global memory out of bounds.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#define EMULATED
#define DEVICE inline
#define __restrict__

namespace simt {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 * 1024;
// Before and behind shared memory: what a block writes there went astray.
constexpr size_t GUARD_BYTES = 64 * 1024;
constexpr unsigned char UNWRITTEN = 0xff;
// Turns of threads for which a warp runs alone at most, about what the largest kernel has between
// two barriers of the block.
constexpr unsigned LONGEST_BURST_LOG2 = 15;
// What a lane gives to a matrix instruction.
constexpr int FRAGMENT = 6;

struct Random {
    uint64_t state;
    unsigned below(size_t n) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return unsigned((state >> 33) % n);
    }
};

struct Copy {
    void* to;
    const void* from;  // null for zeros
    size_t bytes;
};

struct Fibre {
    ucontext_t start;
    jmp_buf resume;
    bool started;
    std::vector<Copy> copies;
};

struct Warp {
    int ready[WARP];  // threads that nothing keeps from going on
    int ready_count;
    std::vector<int> waiting;
    float exchanged[WARP];
    float fragments[WARP][FRAGMENT];
};

struct alignas(16) Line {
    unsigned char bytes[16];
};

// One block at a time, whose threads' stacks and shared memory the next one takes over.
struct Block {
    void (*body)(const void*);
    const void* call;
    Random random;
    int index, current, running;
    int warp;        // the one that runs
    int turns_left;  // until it is another one's turn
    size_t shared_bytes;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    std::vector<int> waiting;
    std::vector<Line> memory;
    std::unique_ptr<char[]> stacks;
    jmp_buf leave;

    unsigned char* shared() { return memory.data()->bytes + GUARD_BYTES; }
    Warp& own_warp() { return warps[size_t(current / WARP)]; }
};

inline Block* block = nullptr;
inline char failure[256];

// Leaves the kernel with a message for the test.
template <class... Values>
[[noreturn]] inline void fail(const char* format, Values... values) {
    snprintf(failure, sizeof failure, format, values...);
    _longjmp(block->leave, 1);
}

inline void make_ready(int thread) {
    Warp& warp = block->warps[size_t(thread / WARP)];
    warp.ready[warp.ready_count++] = thread;
}

inline void choose_warp() {
    const int count = int(block->warps.size());
    // Short bursts are as likely as long ones.
    block->turns_left = 1 << block->random.below(LONGEST_BURST_LOG2 + 1);
    block->warp = int(block->random.below(size_t(count)));
    for (int i = 0; i < count; ++i, block->warp = (block->warp + 1) % count)
        if (block->warps[size_t(block->warp)].ready_count) return;
    if (block->running == 0) _longjmp(block->leave, 1);
    fail("%d of %d threads wait for others that never come", block->running,
         int(block->fibres.size()));
}

[[noreturn]] inline void run_another() {
    if (block->turns_left-- == 0 || block->warps[size_t(block->warp)].ready_count == 0)
        choose_warp();
    Warp& warp = block->warps[size_t(block->warp)];
    const unsigned chosen = block->random.below(size_t(warp.ready_count));
    block->current = warp.ready[chosen];
    warp.ready[chosen] = warp.ready[--warp.ready_count];
    Fibre& fibre = block->fibres[size_t(block->current)];
    if (fibre.started) _longjmp(fibre.resume, 1);
    fibre.started = true;
    setcontext(&fibre.start);
    __builtin_unreachable();
}

inline void enter() {
    block->body(block->call);
    --block->running;
    run_another();
}

// Until `members` threads wait there.
inline void wait(std::vector<int>& waiting, int members) {
    waiting.push_back(block->current);
    if (int(waiting.size()) == members) {
        for (int thread : waiting) make_ready(thread);
        waiting.clear();
    }
    if (_setjmp(block->fibres[size_t(block->current)].resume) == 0) run_another();
}

inline void wait_for_warp() { wait(block->own_warp().waiting, WARP); }

inline float exchange(float value, int lane) {
    Warp& warp = block->own_warp();
    warp.exchanged[block->current % WARP] = value;
    wait_for_warp();
    const float received = warp.exchanged[lane];
    wait_for_warp();
    return received;
}

inline void check_guards() {
    const unsigned char* const shared = block->shared();
    for (size_t i = 0; i < GUARD_BYTES; ++i) {
        if (shared[block->shared_bytes + i] != UNWRITTEN)
            fail("a write %zu bytes behind the %zu of shared memory", i, block->shared_bytes);
        if (shared[int64_t(i) - int64_t(GUARD_BYTES)] != UNWRITTEN)
            fail("a write %zu bytes before shared memory", GUARD_BYTES - i);
    }
}

inline void run_block(int index) {
    const int threads = int(block->fibres.size());
    block->index = index;
    block->running = threads;
    block->turns_left = 0;
    block->waiting.clear();
    memset(block->memory.data(), UNWRITTEN, block->memory.size() * sizeof(Line));
    for (Warp& warp : block->warps) {
        warp.ready_count = 0;
        warp.waiting.clear();
    }
    for (int thread = 0; thread < threads; ++thread) {
        Fibre& fibre = block->fibres[size_t(thread)];
        fibre.started = false;
        fibre.copies.clear();
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = block->stacks.get() + size_t(thread) * STACK_BYTES;
        fibre.start.uc_stack.ss_size = STACK_BYTES;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, enter, 0);
        make_ready(thread);
    }
    if (_setjmp(block->leave) == 0) run_another();
    if (!failure[0] && _setjmp(block->leave) == 0) check_guards();
}

// Returns what went wrong, empty if nothing did.
inline const char* run_grid(void (*body)(const void*), const void* call, int blocks, int threads,
                            size_t shared_bytes, uint64_t seed) {
    Block own{};
    block = &own;
    failure[0] = 0;
    own.body = body;
    own.call = call;
    own.random.state = seed;
    own.shared_bytes = shared_bytes;
    own.fibres.resize(size_t(threads));
    own.warps.resize(size_t(threads / WARP));
    own.memory.resize((shared_bytes + 2 * GUARD_BYTES + sizeof(Line) - 1) / sizeof(Line));
    own.stacks.reset(new char[size_t(threads) * STACK_BYTES]);
    std::vector<int> order(static_cast<size_t>(blocks));
    for (size_t i = 0; i < order.size(); ++i) {
        const size_t other = own.random.below(i + 1);
        order[i] = order[other];
        order[other] = int(i);
    }
    for (int index : order)
        if (!failure[0]) run_block(index);
    return failure;
}

}  // namespace simt

#define KERNEL(name)                                                                           \
    static void name##_body(const Call& call);                                                 \
    extern "C" const char* name(const Call* call, int blocks, int threads, int64 shared_bytes, \
                                int64 seed) {                                                  \
        const auto body = [](const void* call) {                                               \
            name##_body(*static_cast<const Call*>(call));                                      \
        };                                                                                     \
        return simt::run_grid(body, call, blocks, threads, size_t(shared_bytes),               \
                              uint64_t(seed));                                                 \
    }                                                                                          \
    static void name##_body(const Call& call)

// What -fsanitize=alignment calls, in place of its own library, which would only print or abort.
struct Misalignment {
    struct {
        const char* file;
        uint32_t line, column;
    } place;
    const void* type;
    unsigned char alignment_log2, kind;
};
extern "C" __attribute__((used, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(
    const Misalignment* found, uintptr_t address) {
    simt::fail("line %u: an access of %d bytes at an address of %d modulo %d", found->place.line,
               1 << found->alignment_log2, int(address % (1u << found->alignment_log2)),
               1 << found->alignment_log2);
}

inline char* shared_memory() { return reinterpret_cast<char*>(simt::block->shared()); }
inline int thread_in_block() { return simt::block->current; }
inline int block_index() { return simt::block->index; }
inline void sync_block() { simt::wait(simt::block->waiting, int(simt::block->fibres.size())); }
inline void sync_warp() { simt::wait_for_warp(); }
inline float from_lane(float value, int lane) { return simt::exchange(value, lane); }
inline float from_lane_xor(float value, int mask) {
    return simt::exchange(value, (simt::block->current % simt::WARP) ^ mask);
}
inline unsigned ballot(bool condition) {
    simt::Warp& warp = simt::block->own_warp();
    warp.exchanged[simt::block->current % simt::WARP] = condition ? 1.f : 0.f;
    simt::wait_for_warp();
    unsigned bits = 0;
    for (int lane = 0; lane < simt::WARP; ++lane)
        bits |= unsigned(warp.exchanged[lane] != 0.f) << lane;
    simt::wait_for_warp();
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
    for (const void* at : {static_cast<const void*>(shared), within ? global : shared})
        if (reinterpret_cast<uintptr_t>(at) % BYTES)
            simt::fail("a copy of %d bytes to or from an address of %d modulo %d", BYTES,
                       int(reinterpret_cast<uintptr_t>(at) % BYTES), BYTES);
    memset(shared, simt::UNWRITTEN, BYTES);
    simt::block->fibres[size_t(simt::block->current)].copies.push_back(
        {shared, within ? global : nullptr, BYTES});
}
inline void wait_for_copies() {
    std::vector<simt::Copy>& copies = simt::block->fibres[size_t(simt::block->current)].copies;
    for (const simt::Copy& copy : copies) {
        if (copy.from)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            memset(copy.to, 0, copy.bytes);
    }
    copies.clear();
}
inline unsigned float_to_bits(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline void multiply_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
    const int lane = simt::block->current % simt::WARP;
    float(&all)[simt::WARP][simt::FRAGMENT] = simt::block->own_warp().fragments;
    const float own[simt::FRAGMENT] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int i = 0; i < simt::FRAGMENT; ++i)
        all[lane][i] = bits_to_float(float_to_bits(own[i]) & 0xffffe000u);
    simt::wait_for_warp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 8; ++k)
            d[i] += all[4 * row + k % 4][i / 2 + 2 * (k / 4)] * all[4 * column + k % 4][4 + k / 4];
    }
    simt::wait_for_warp();
}
inline void add_to_global(float* target, float value) { *target += value; }
