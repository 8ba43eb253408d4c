// Residual add and RMSNorm, backward. With r = 1 / rms(s) of the stream s, g the gradient of the
// normed output and p = weight g:
//     ds = (gradient of the stream) + r p - s r^3 mean(p s);  dweight = sum over rows of g s r.
// ds is the gradient of both x and the residual.
//
// Macros: those of rows.cuh; NORMED_BF16; GRAD_STREAM: the stream has a gradient; GRAD_FP32
// and GRAD_BF16: ds is written in that dtype; WIDE says that a row has several tiles.
#include "rows.cuh"

struct Call {
    const void* grad_normed;
    const float *grad_stream, *stream, *reciprocal_rms, *weight;
    float* grad_fp32;
    void* grad_bf16;
    float* grad_weight;  // of each team by itself: (blocks x TEAMS, D)
    int64 grad_normed_row, grad_stream_row, stream_row;
    int64 rows, width, blocks;
};

#if NORMED_BF16
typedef Bf16 Normed;
#else
typedef Fp32 Normed;
#endif

KERNEL(add_rms_norm_backward) {
    float* const slots = reinterpret_cast<float*>(shared_memory());
    const int width = int(call.width);
    const int own = 4 * thread_in_team();
    const int tiles = WIDE ? (width + TILE - 1) / TILE : 1;
    const float per_element = 1.f / float(width);
    float* const grad_weight =
        call.grad_weight + (int64(block_index()) * TEAMS + team_in_block()) * width;
    Four weight[HELD], weight_sum[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        weight[i] = read_four<Fp32>(call.weight, own + i * STEP, width);
        weight_sum[i] = {{0.f, 0.f, 0.f, 0.f}};
    }

    int turn = 0;
    bool is_first = true;
#pragma unroll 1
    for (int64 first = int64(block_index()) * TEAMS; first < call.rows;
         first += call.blocks * TEAMS, turn ^= 1, is_first = false) {
        const int64 row = first + team_in_block();
        const int limit = row < call.rows ? width : 0;
        const float* const stream = row_of<Fp32>(call.stream, row, call.stream_row);
        const Normed::Element* const grad_normed =
            row_of<Normed>(call.grad_normed, row, call.grad_normed_row);
#if GRAD_STREAM
        const float* const grad_stream =
            row_of<Fp32>(call.grad_stream, row, call.grad_stream_row);
#endif
        const float scale = limit ? call.reciprocal_rms[row] : 0.f;
        Normed::Raw4 grad[HELD];
        Four value[HELD], passed[HELD];
        float sum = 0.f;
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            const int at = tile * TILE + own;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                grad[i] = read_four<Normed>(grad_normed, at + i * STEP, limit);
                value[i] = read_four<Fp32>(stream, at + i * STEP, limit);
                if (WIDE) weight[i] = read_four<Fp32>(call.weight, at + i * STEP, limit);
            }
            // Asked for with the rest, though it is needed after the reduction only.
#if GRAD_STREAM
#pragma unroll
            for (int i = 0; i < HELD; ++i)
                passed[i] = read_four<Fp32>(grad_stream, at + i * STEP, limit);
#endif
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const Four g = Normed::widen(grad[i]);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    sum += g.at[j] * weight[i].at[j] * value[i].at[j];
            }
        }
        const float mean = per_element * over_team<Sum>(sum, slots + turn * WARPS);
        const float share = scale * scale * scale * mean;

        // From the last tile on, which is still in registers.
#pragma unroll 1
        for (int tile = tiles - 1; tile >= 0; --tile) {
            const int at = tile * TILE + own;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (tile < tiles - 1) {
                    grad[i] = read_four<Normed>(grad_normed, at + i * STEP, limit);
                    value[i] = read_four<Fp32>(stream, at + i * STEP, limit);
                    weight[i] = read_four<Fp32>(call.weight, at + i * STEP, limit);
#if GRAD_STREAM
                    passed[i] = read_four<Fp32>(grad_stream, at + i * STEP, limit);
#endif
                }
                const Four g = Normed::widen(grad[i]);
                // Of a wide row the registers hold one tile, so the sums lie in memory.
                if (WIDE && !is_first)
                    weight_sum[i] = read_four<Fp32>(grad_weight, at + i * STEP, width);
                else if (WIDE)
                    weight_sum[i] = {{0.f, 0.f, 0.f, 0.f}};
                Four result;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float scaled = scale * g.at[j];
                    weight_sum[i].at[j] += scaled * value[i].at[j];
                    result.at[j] = scaled * weight[i].at[j] - share * value[i].at[j];
#if GRAD_STREAM
                    result.at[j] += passed[i].at[j];
#endif
                }
                if (WIDE) write_four<Fp32>(grad_weight, at + i * STEP, width, weight_sum[i]);
#if GRAD_FP32
                write_four<Fp32>(row_of<Fp32>(call.grad_fp32, row, width), at + i * STEP, limit,
                                 result);
#endif
#if GRAD_BF16
                write_four<Bf16>(row_of<Bf16>(call.grad_bf16, row, width), at + i * STEP, limit,
                                 result);
#endif
            }
        }
    }
    if (!WIDE) {
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            write_four<Fp32>(grad_weight, own + i * STEP, width, weight_sum[i]);
    }
}
