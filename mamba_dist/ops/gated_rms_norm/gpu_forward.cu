// Gated RMSNorm, forward: normed = v / rms(v) * weight with v = x silu(z), for each group of
// channels by itself. Of rows wider than a tile x and z are read again.
//
// Macros: those of rows.cuh; X_BF16 (x and z), NORMED_BF16; WIDE says that a row has several tiles.
#include "gpu_gate.cuh"

struct Call {
    const void *x, *z;
    const float* weight;
    void* normed;
    float* reciprocal_rms;  // (rows, groups)
    int64 x_row, z_row;
    int64 rows, width, groups, parts;
    float eps;
};

KERNEL(gated_rms_norm_forward) {
    float* const slots = reinterpret_cast<float*>(shared_memory());
    const Place place(call);
    const int width = int(call.width);
    const int own = 4 * thread_in_team();
    const int tiles = WIDE ? (width + TILE - 1) / TILE : 1;
    const float per_element = 1.f / float(width);
    const float* const weights = call.weight + place.channel;
    Four weight[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) weight[i] = read_four<Fp32>(weights, own + i * STEP, width);

    int turn = 0;
#pragma unroll 1
    for (int64 first = place.part * TEAMS; first < call.rows;
         first += call.parts * TEAMS, turn ^= 1) {
        const int64 row = first + team_in_block();
        const int limit = row < call.rows ? width : 0;
        const X::Element* const x = row_of<X>(call.x, row, call.x_row) + place.channel;
        const X::Element* const z = row_of<X>(call.z, row, call.z_row) + place.channel;
        Four gated[HELD];
        float sum = 0.f;
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            const int at = tile * TILE + own;
            X::Raw4 raw_x[HELD], raw_z[HELD];
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                raw_x[i] = read_four<X>(x, at + i * STEP, limit);
                raw_z[i] = read_four<X>(z, at + i * STEP, limit);
            }
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const Four input = X::widen(raw_x[i]), gate = X::widen(raw_z[i]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    gated[i].at[j] = input.at[j] * Gate(gate.at[j]).silu;
                    sum += gated[i].at[j] * gated[i].at[j];
                }
            }
        }
        const float mean_square = per_element * over_team<Sum>(sum, slots + turn * WARPS);
        const float scale = reciprocal_sqrt(mean_square + call.eps);
        if (thread_in_team() == 0 && limit)
            call.reciprocal_rms[row * call.groups + block_index() % call.groups] = scale;

        Normed::Element* const normed =
            row_of<Normed>(call.normed, row, width * call.groups) + place.channel;
        // From the last tile on, which is still in registers.
#pragma unroll 1
        for (int tile = tiles - 1; tile >= 0; --tile) {
            const int at = tile * TILE + own;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (WIDE) weight[i] = read_four<Fp32>(weights, at + i * STEP, width);
                if (tile < tiles - 1) {
                    const Four input = X::widen(read_four<X>(x, at + i * STEP, limit));
                    const Four gate = X::widen(read_four<X>(z, at + i * STEP, limit));
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        gated[i].at[j] = input.at[j] * Gate(gate.at[j]).silu;
                }
                Four result;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    result.at[j] = gated[i].at[j] * scale * weight[i].at[j];
                write_four<Normed>(normed, at + i * STEP, limit, result);
            }
        }
    }
}
