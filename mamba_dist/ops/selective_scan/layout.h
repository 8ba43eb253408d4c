// What the selective scan's kernels share: one call's arguments, how its work is cut, and the
// access to rows, matrices and documents.
//
// B batch, L length, E channels, N d_state, G groups. A block is one vector of adjacent channels of
// a group, a range the blocks that one thread takes through a whole row, a chunk CHUNK positions of
// the row, a pack the blocks taken through a chunk together. All of it follows from the shapes, so
// the number of threads changes no bit. Indices are 64 bits wide.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

// One call's arguments: pointers, then strides and sizes in elements. Mirrored in cpu.py.
struct Call {
    const void *u, *delta, *z, *B, *C;
    const void *A, *D, *delta_bias, *initial_state, *seq_idx;
    void *y, *final_state, *chunk_states;
    const void *grad_y, *grad_final;
    void *du, *ddelta, *dz, *dB, *dC, *dA, *dD, *ddelta_bias, *dinitial;
    int64_t u_batch, u_row, delta_batch, delta_row, z_batch, z_row;
    int64_t B_batch, B_row, B_group, C_batch, C_row, C_group;
    int64_t grad_y_batch, grad_y_row, seq_idx_batch, seq_idx_row;
    int64_t batch, length, channels, d_state, groups;
    int64_t delta_softplus, seq_idx_bytes, storage, threads;
};

namespace {

// The states before each chunk are kept for the backward: a quarter of (B, L, E) at N = 16.
constexpr int CHUNK = 64;
// Blocks of a pack share the vectors that sum over channels, and the cache lines of bf16 rows.
constexpr int PACK = 2;
// Blocks of a range. Sums over channels leave the thread once for each range, 5 % of the backward
// where it has 4 blocks and 1 % where it has 16, so ranges are only as narrow as threads need them.
constexpr int MOST_BLOCKS = 256 * sizeof(float) / VECTOR_BYTES;
constexpr int ENOUGH_TASKS = 16;
// Positions whose softplus and gate are computed in lockstep; divides CHUNK.
constexpr int TILE = 4;
constexpr double LOG2_E = 1.4426950408889634;

template <class Real>
using Vector = typename Lanes<Real>::type;

// 64-byte aligned, null when there is not enough memory; `free` gives it back.
template <class T>
T* memory(int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return static_cast<T*>(aligned_alloc(64, bytes));
}

template <class Real>
struct Partition {
    static constexpr int64_t lanes = Lanes<Real>::count;
    int64_t per_group, blocks, range_blocks, ranges, tasks, chunks;

    explicit Partition(const Call& c)
        : per_group(c.channels / c.groups),
          blocks((per_group + lanes - 1) / lanes),
          range_blocks(blocks_of_range(c.batch * c.groups * blocks)),
          ranges((blocks + range_blocks - 1) / range_blocks),
          tasks(c.batch * c.groups * ranges),
          chunks((c.length + CHUNK - 1) / CHUNK) {}

    static int64_t blocks_of_range(int64_t all) {
        const int64_t packs = (all + ENOUGH_TASKS * PACK - 1) / (ENOUGH_TASKS * PACK);
        return packs * PACK < MOST_BLOCKS ? packs * PACK : MOST_BLOCKS;
    }
};

// One task: the range `index` of a group's blocks, in one row of the batch.
template <class Real>
struct Range {
    int64_t row, group, index, first, blocks;

    Range(const Partition<Real>& p, const Call& c, int64_t task)
        : row(task / p.ranges / c.groups),
          group(task / p.ranges % c.groups),
          index(task % p.ranges),
          first(index * p.range_blocks),
          blocks(p.blocks - first < p.range_blocks ? p.blocks - first : p.range_blocks) {}
};

// Adjacent channels: where they start in a row, and how many lanes are channels. None is, for a
// block after the group's last one, which fills up a pack: it reads zeros and stores nothing.
template <class Real>
struct Block {
    using V = Vector<Real>;
    int64_t channel;
    int count;

    Block(const Partition<Real>& p, int64_t group, int64_t block) {
        int64_t left = p.per_group - block * p.lanes;
        channel = group * p.per_group + block * p.lanes;
        count = int(left < 0 ? 0 : left < p.lanes ? left : p.lanes);
    }
    template <class Storage>
    V get(const Storage* row) const {
        return count ? load_part(row + channel, count) : V{};
    }
    // Zero for a tensor that was not given.
    V parameter(const void* row) const { return row ? get(static_cast<const Real*>(row)) : V{}; }
    template <class Storage>
    void put(Storage* row, V v) const {
        if (count) store_part(row + channel, v, count);
    }
    // One n of (E, N), whose lanes lie N apart; zero for a tensor that was not given.
    V column(const Real* matrix, int64_t d_state, int64_t n) const {
        V v{};
        for (int i = 0; matrix && i < count; i++) v[i] = matrix[(channel + i) * d_state + n];
        return v;
    }
    void put_column(Real* matrix, int64_t d_state, int64_t n, V v) const {
        for (int i = 0; i < count; i++) matrix[(channel + i) * d_state + n] = v[i];
    }
};

// The row `row` of a (B, L, ...) tensor from position `start` and `channel` on, or null.
template <class Storage>
struct Rows {
    using V = Vector<typename Compute<Storage>::real>;
    Storage* at;
    int64_t stride;

    Rows(const void* tensor, int64_t row, int64_t batch_stride, int64_t start, int64_t row_stride,
         int64_t channel = 0)
        : at(nullptr), stride(row_stride) {
        if (tensor) at = (Storage*)tensor + row * batch_stride + start * row_stride + channel;
    }
    Storage* operator[](int64_t t) const { return at + t * stride; }

    // A block's lanes at position t; WHOLE spares the check of `count` where all are channels.
    template <bool WHOLE>
    MAMBA_INLINE_MEMBER V get(int64_t t, int count) const {
        if (WHOLE) return load(at + t * stride);
        return count ? load_part(at + t * stride, count) : V{};
    }
    template <bool WHOLE>
    MAMBA_INLINE_MEMBER void put(int64_t t, int count, V v) const {
        if (WHOLE) {
            store(at + t * stride, v);
        } else if (count) {
            store_part(at + t * stride, v, count);
        }
    }
};

// One chunk of one row: its B and C in the compute type, and where documents start.
template <class Storage>
struct Chunk {
    using Real = typename Compute<Storage>::real;
    int64_t start;
    int steps;
    bool reset[CHUNK];
    Real *B, *C;  // (CHUNK, N)

    void load(const Call& c, int64_t row, int64_t group, int64_t index) {
        start = index * CHUNK;
        steps = int(c.length - start < CHUNK ? c.length - start : CHUNK);
        Rows<const Storage> b(c.B, row, c.B_batch, start, c.B_row);
        Rows<const Storage> r(c.C, row, c.C_batch, start, c.C_row);
        for (int t = 0; t < steps; t++) {
            for (int64_t n = 0; n < c.d_state; n++) {
                B[t * c.d_state + n] = to_real(b[t][group * c.B_group + n]);
                C[t * c.d_state + n] = to_real(r[t][group * c.C_group + n]);
            }
            reset[t] = starts_document(c, row, start + t);
        }
    }

    static bool starts_document(const Call& c, int64_t row, int64_t t) {
        if (!c.seq_idx || t == 0) return false;
        int64_t at = row * c.seq_idx_batch + t * c.seq_idx_row, before = at - c.seq_idx_row;
        if (c.seq_idx_bytes == sizeof(int64_t)) {
            const int64_t* ids = static_cast<const int64_t*>(c.seq_idx);
            return ids[at] != ids[before];
        }
        const int32_t* ids = static_cast<const int32_t*>(c.seq_idx);
        return ids[at] != ids[before];
    }
};

// Rows that the next pack will touch. A row is longer than a page, so the processor does not
// foresee them: without this a third of the forward is waiting. Each sweep over a chunk fetches one
// tensor's rows, as all at once would exceed the misses that a core can have open.
struct Ahead {
    struct Lines {
        const char* at;
        int64_t stride, last;

        MAMBA_INLINE_MEMBER void fetch(int64_t t) const {
            __builtin_prefetch(at + t * stride, 0, 2);
            __builtin_prefetch(at + t * stride + last, 0, 2);
        }
    };
    Lines tensors[7];
    int count = 0;

    template <class Storage>
    void add(const Rows<Storage>& rows) {
        if (!rows.at) return;
        constexpr int64_t size = sizeof(Storage);
        constexpr int64_t lanes = Lanes<typename Compute<Storage>::real>::count;
        const char* at = reinterpret_cast<const char*>(rows.at);
        tensors[count++] = {at, rows.stride * size, (PACK * lanes - 1) * size};
    }
    // What the sweep number `turn` fetches; `idle` is any address.
    Lines turn(int64_t number, const void* idle) const {
        if (number < count) return tensors[number];
        return {static_cast<const char*>(idle), 0, 0};
    }
};

// Whether all exponents of a block in a chunk may do without the bounds of exp2.
template <class Real>
struct Bound {
    using V = Vector<Real>;
    V limit;
    decltype(V{} < V{}) within;

    // `rates` (N) of one block. A rate that is NaN or infinite admits no delta at all.
    Bound(const V* rates, int64_t d_state) : within(V{} == V{}) {
        V fastest{};
        for (int64_t n = 0; n < d_state; n++) {
            V rate = rates[n] < 0 ? -rates[n] : rates[n];
            fastest = at_least(rate, fastest);
            within &= rate <= Real(1e30);
        }
        limit = at_most(126 / fastest, V{} + Real(1e30));
    }
    MAMBA_INLINE_MEMBER void see(V delta) { within &= (delta < 0 ? -delta : delta) <= limit; }
    bool holds() const {
        bool all = true;
        for (int i = 0; i < Lanes<Real>::count; i++) all = all && within[i];
        return all;
    }
};

template <bool BOUNDED, class V, int COUNT>
MAMBA_INLINE void decay_each(V (&exponents)[COUNT]) {
    if (BOUNDED) {
        exp2_bounded_each(exponents);
    } else {
        exp2_each(exponents);
    }
}

}  // namespace
