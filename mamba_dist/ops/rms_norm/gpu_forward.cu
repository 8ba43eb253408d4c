// Residual add and RMSNorm, forward: each row is read once, and lies in registers until the root of
// its mean square is known; of rows wider than a tile the stream is read again.
//
// Macros: those of rows.cuh; X_BF16, NORMED_BF16; RESIDUAL; STREAM writes the stream, which
// otherwise is x itself; WIDE says that a row has several tiles.
#include "rows.cuh"

struct Call {
    const void* x;
    const float *residual, *weight;
    void* normed;
    float *stream, *reciprocal_rms;
    int64 x_row, residual_row;
    int64 rows, width, blocks;
    float eps;
};

#if X_BF16
typedef Bf16 X;
#else
typedef Fp32 X;
#endif
#if NORMED_BF16
typedef Bf16 Normed;
#else
typedef Fp32 Normed;
#endif

KERNEL(add_rms_norm_forward) {
    float* const slots = reinterpret_cast<float*>(shared_memory());
    const int width = int(call.width);
    const int own = 4 * thread_in_team();
    const int tiles = WIDE ? (width + TILE - 1) / TILE : 1;
    const float per_element = 1.f / float(width);
    Four weight[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) weight[i] = read_four<Fp32>(call.weight, own + i * STEP, width);

    int turn = 0;
#pragma unroll 1
    for (int64 first = int64(block_index()) * TEAMS; first < call.rows;
         first += call.blocks * TEAMS, turn ^= 1) {
        const int64 row = first + team_in_block();
        const int limit = row < call.rows ? width : 0;
        const X::Element* const x = row_of<X>(call.x, row, call.x_row);
#if RESIDUAL
        const float* const residual = row_of<Fp32>(call.residual, row, call.residual_row);
#endif
#if STREAM
        float* const stream = row_of<Fp32>(call.stream, row, width);
#else
        const float* const stream = x;
#endif
        Four held[HELD];
        float sum = 0.f;
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            const int at = tile * TILE + own;
            X::Raw4 raw[HELD];
#pragma unroll
            for (int i = 0; i < HELD; ++i) raw[i] = read_four<X>(x, at + i * STEP, limit);
#if RESIDUAL
#pragma unroll
            for (int i = 0; i < HELD; ++i)
                held[i] = read_four<Fp32>(residual, at + i * STEP, limit);
#endif
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const Four added = X::widen(raw[i]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#if RESIDUAL
                    held[i].at[j] += added.at[j];
#else
                    held[i].at[j] = added.at[j];
#endif
                    sum += held[i].at[j] * held[i].at[j];
                }
            }
#if STREAM
#pragma unroll
            for (int i = 0; i < HELD; ++i)
                write_four<Fp32>(stream, at + i * STEP, limit, held[i]);
#endif
        }
        const float mean_square = per_element * over_team<Sum>(sum, slots + turn * WARPS);
        const float scale = reciprocal_sqrt(mean_square + call.eps);
        if (thread_in_team() == 0 && limit) call.reciprocal_rms[row] = scale;

        Normed::Element* const normed = row_of<Normed>(call.normed, row, width);
        // From the last tile on, which is still in registers.
#pragma unroll 1
        for (int tile = tiles - 1; tile >= 0; --tile) {
            const int at = tile * TILE + own;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (tile < tiles - 1) held[i] = read_four<Fp32>(stream, at + i * STEP, limit);
                if (WIDE) weight[i] = read_four<Fp32>(call.weight, at + i * STEP, limit);
                Four result;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    result.at[j] = held[i].at[j] * scale * weight[i].at[j];
                write_four<Normed>(normed, at + i * STEP, limit, result);
            }
        }
    }
}
