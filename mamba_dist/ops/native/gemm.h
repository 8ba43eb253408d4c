// Products of small matrices that lie in cache, and transposition, on the vectors of simd.h.
//
// A kernel packs its operands into zero-padded rows of whole vectors, so that only the row count of
// a product needs a remainder. Every element of a product is one sum in ascending order: its bits
// depend on neither the tile it falls into nor the thread.
#pragma once

#include <type_traits>

#include "simd.h"

template <class Real>
using Vector = typename Lanes<Real>::type;

template <class Real>
constexpr int lanes = Lanes<Real>::count;

// Rows of `stride` elements.
template <class Real>
struct View {
    Real* at;
    int64_t stride;

    Real* row(int64_t i) const { return at + i * stride; }
    Real* vector(int64_t i, int64_t v) const { return at + i * stride + v * lanes<Real>; }
};

// Vectors that hold `count` elements.
template <class Real>
constexpr int vectors_of(int64_t count) {
    return int((count + lanes<Real> - 1) / lanes<Real>);
}

// Sum of the lanes, in pairs.
template <class V>
MAMBA_INLINE auto total(V v) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
    if constexpr (sizeof(v[0]) == 4) return float(_mm512_reduce_add_ps((__m512)v));
#endif
    return lane_sum(v);
}

// The terms of row i's sums: all, those up to i, or those from i on (a triangular left factor). The
// others are left out, not multiplied by zero: a NaN there would go through.
enum class Terms { all, to_row, from_row };

// 16 sums in flight hide the latency of two multiply-add units, and the tile fits the 32 registers
// of AVX-512; with 16 registers there is room for 12. 8 rows divide the usual sizes.
#if VECTOR_BYTES == 64
constexpr int tile_rows = 8;
#else
constexpr int tile_rows = 6;
#endif
constexpr int tile_vectors = 2;

// A tile's sums, and its operands at the next term.
template <int rows, int vectors, class Real>
struct Tile {
    Vector<Real> sums[rows][vectors] = {};
    const Real *left, *right;
    int64_t next_row, next_term, next_right;

    // Adds the next term to rows [first, last).
    MAMBA_INLINE_MEMBER void add(int first, int last) {
        Vector<Real> terms[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) terms[v] = load(right + v * lanes<Real>);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            if (r < first || r >= last) continue;
            Vector<Real> factor = splat(left[r * next_row]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] += factor * terms[v];
        }
        left += next_term;
        right += next_right;
    }
};

// `which` says which of the terms [from, to) a row takes; a triangle's are square.
template <bool transposed, int rows, int vectors, class Real, class Finish>
static void product_tile(View<Real> a, View<Real> b, int row, int vector, int from, int to,
                         Terms which, const Finish& finish) {
    Tile<rows, vectors, Real> tile;
    tile.left = transposed ? a.row(from) + row : a.row(row) + from;
    tile.next_row = transposed ? 1 : a.stride, tile.next_term = transposed ? a.stride : 1;
    tile.right = b.vector(from, vector), tile.next_right = b.stride;
    const bool up_to = which == Terms::to_row, from_on = which == Terms::from_row;
    if (from_on) {
#pragma GCC unroll 8
        for (int r = 0; r < rows - 1; r++) tile.add(0, r + 1);
    }
    const int start = from_on ? from + rows - 1 : from, stop = up_to ? to - rows + 1 : to;
    for (int k = start; k < stop; k++) tile.add(0, rows);
    if (up_to) {
#pragma GCC unroll 8
        for (int r = 1; r < rows; r++) tile.add(r, rows);
    }
    finish(tile.sums, row, vector);
}

// finish(sums, row, vector) receives tiles of A B, where A is rows x terms (or its transpose lies
// in memory; square if triangular) and B is terms x (vectors * lanes).
template <bool transposed, class Real, class Finish>
static void product(int rows, int vectors, int terms, View<Real> a, View<Real> b, Terms which,
                    const Finish& finish) {
    auto columns = [&](auto width, int vector) {
        constexpr int w = decltype(width)::value;
        int row = 0;
        auto tile = [&](auto height) {
            constexpr int h = decltype(height)::value;
            int from = which == Terms::from_row ? row : 0;
            int to = which == Terms::to_row ? row + h : terms;
            product_tile<transposed, h, w>(a, b, row, vector, from, to, which, finish);
            row += h;
        };
        while (row + tile_rows <= rows) tile(std::integral_constant<int, tile_rows>{});
        if (rows - row >= 4) tile(std::integral_constant<int, 4>{});
        if (rows - row >= 2) tile(std::integral_constant<int, 2>{});
        if (rows - row >= 1) tile(std::integral_constant<int, 1>{});
    };
    int vector = 0;
    for (; vector + tile_vectors <= vectors; vector += tile_vectors)
        columns(std::integral_constant<int, tile_vectors>{}, vector);
    for (; vector < vectors; vector++) columns(std::integral_constant<int, 1>{}, vector);
}

// ---- what becomes of a tile of sums

// out = sums, or out = factor * former + sums; `former` may be out itself.
template <class Real>
struct Accumulate {
    View<Real> out;
    bool keep = false;
    Real factor = 1;
    View<Real> former = out;

    template <int rows, int vectors>
    __attribute__((always_inline)) void operator()(Vector<Real> (&sums)[rows][vectors], int row,
                                                   int vector) const {
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const Real* before = former.vector(row + r, vector + v);
                store(out.vector(row + r, vector + v),
                      keep ? load(before) * factor + sums[r][v] : sums[r][v]);
            }
    }
};

// out[i] = factors[i] * sums[i].
template <class Real>
struct ScaleRows {
    View<Real> out;
    const Real* factors;

    template <int rows, int vectors>
    __attribute__((always_inline)) void operator()(Vector<Real> (&sums)[rows][vectors], int row,
                                                   int vector) const {
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                store(out.vector(row + r, vector + v), sums[r][v] * factors[row + r]);
    }
};

// out += sums, and column_dots += sums * weights, summed over the rows.
template <class Real>
struct AddAndDot {
    View<Real> out, weights;
    Real* column_dots;

    template <int rows, int vectors>
    __attribute__((always_inline)) void operator()(Vector<Real> (&sums)[rows][vectors], int row,
                                                   int vector) const {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            Real* dots = column_dots + (vector + v) * lanes<Real>;
            Vector<Real> dot = load(dots);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                Real* p = out.vector(row + r, vector + v);
                store(p, load(p) + sums[r][v]);
                dot += sums[r][v] * load(weights.vector(row + r, vector + v));
            }
            store(dots, dot);
        }
    }
};

// out = factor * out + sums, and dot += out * weights with the former out, lane by lane.
template <class Real>
struct DecayAndDot {
    View<Real> out, weights;
    Real factor;
    Real* dot_lanes;

    template <int rows, int vectors>
    __attribute__((always_inline)) void operator()(Vector<Real> (&sums)[rows][vectors], int row,
                                                   int vector) const {
        Vector<Real> dot = load(dot_lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                Real* p = out.vector(row + r, vector + v);
                Vector<Real> former = load(p);
                dot += former * load(weights.vector(row + r, vector + v));
                store(p, former * factor + sums[r][v]);
            }
        store(dot_lanes, dot);
    }
};

// Memory that the next products need, to be fetched while this one runs. Rows of a few lines at a
// wide stride are nothing that the hardware foresees: it left a third of the time to waiting.
class Ahead {
  public:
    void clear() { count = current = 0; }

    void add(const void* first, int64_t stride_bytes, int64_t rows, int64_t row_bytes) {
        if (count < most && rows > 0 && first)
            blocks[count++] = {static_cast<const char*>(first), stride_bytes, rows, row_bytes, 0};
    }

    void fetch(int lines) {
        while (lines > 0 && current < count) {
            Block& block = blocks[current];
            // Into the second cache: the product needs the first.
            __builtin_prefetch(block.row + block.offset, 0, 2);
            block.offset += 64;
            lines--;
            if (block.offset < block.row_bytes) continue;
            block.offset = 0;
            block.row += block.stride_bytes;
            if (--block.rows == 0) current++;
        }
    }

  private:
    struct Block {
        const char* row;
        int64_t stride_bytes, rows, row_bytes, offset;
    };
    static constexpr int most = 8;
    Block blocks[most];
    int count = 0, current = 0;
};

// Another finish, and a few lines of what is needed next. A tile takes 500 to 2000 cycles.
template <class Finish>
struct Fetching {
    Finish finish;
    Ahead& ahead;

    template <class V, int rows, int vectors>
    __attribute__((always_inline)) void operator()(V (&sums)[rows][vectors], int row,
                                                   int vector) const {
        finish(sums, row, vector);
        ahead.fetch(16);
    }
};

// ---- transposition

// A step of the transposition of a square of vectors: lanes l with bit `distance` set change places
// with lanes l - distance of the vector that many rows on.
template <int distance, class Real>
MAMBA_INLINE void exchange(Vector<Real>& low, Vector<Real>& high) {
    using Index = typename std::conditional<sizeof(Real) == 4, int32_t, int64_t>::type;
    typedef Index index_v __attribute__((vector_size(VECTOR_BYTES)));
    constexpr int n = lanes<Real>;
    index_v to_low, to_high;
#pragma GCC unroll 16
    for (int l = 0; l < n; l++) {
        to_low[l] = l & distance ? n + l - distance : l;
        to_high[l] = l & distance ? n + l : l + distance;
    }
    Vector<Real> new_low = __builtin_shuffle(low, high, to_low);
    high = __builtin_shuffle(low, high, to_high);
    low = new_low;
}

template <int distance, class Real>
MAMBA_INLINE void exchange_all(Vector<Real> (&square)[lanes<Real>]) {
    if constexpr (distance < lanes<Real>) {
#pragma GCC unroll 16
        for (int r = 0; r < lanes<Real>; r++)
            if (!(r & distance)) exchange<distance, Real>(square[r], square[r + distance]);
        exchange_all<distance * 2, Real>(square);
    }
}

// to[j][i] = from[i][j] for i < rows; rows up to the next whole vector become zero columns of `to`.
template <class Real>
static void transpose(int rows, int vectors, View<const Real> from, View<Real> to) {
    constexpr int n = lanes<Real>;
    for (int row = 0; row < rows; row += n)
        for (int v = 0; v < vectors; v++) {
            Vector<Real> square[n];
#pragma GCC unroll 16
            for (int r = 0; r < n; r++)
                square[r] = row + r < rows ? load(from.row(row + r) + v * n) : Vector<Real>{};
            exchange_all<1, Real>(square);
#pragma GCC unroll 16
            for (int r = 0; r < n; r++) store(to.row(v * n + r) + row, square[r]);
        }
}
