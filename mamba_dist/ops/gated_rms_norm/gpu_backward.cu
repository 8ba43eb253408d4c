// Gated RMSNorm, backward. With v = x silu(z), r = 1 / rms(v), g the output's gradient and
// p = weight g:
//     dv = r p - v r^3 mean(p v);  dx = dv silu(z);  dz = dv x silu'(z);
//     dweight = sum over rows of g v r.
//
// Macros: those of rows.cuh; X_BF16 (x and z), NORMED_BF16; WIDE says that a row has several tiles.
#include "gpu_gate.cuh"

struct Call {
    const void *grad_normed, *x, *z;
    const float *reciprocal_rms, *weight;
    void *grad_x, *grad_z;
    float* grad_weight;  // of each team by itself: (parts x TEAMS, D)
    int64 grad_normed_row, x_row, z_row, grad_z_row;
    int64 rows, width, groups, parts;
};

KERNEL(gated_rms_norm_backward) {
    // The sums of a thread's own weights lie in shared memory, as registers are short.
    Four* const sums = reinterpret_cast<Four*>(shared_memory()) + thread_in_block();
    float* const slots = reinterpret_cast<float*>(shared_memory()) + 4 * HELD * THREADS;
    const Place place(call);
    const int width = int(call.width);
    const int64 channels = width * call.groups;
    const int own = 4 * thread_in_team();
    const int tiles = WIDE ? (width + TILE - 1) / TILE : 1;
    const float per_element = 1.f / float(width);
    const float* const weights = call.weight + place.channel;
    float* const grad_weight =
        call.grad_weight + (place.part * TEAMS + team_in_block()) * channels + place.channel;
    Four weight[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        weight[i] = read_four<Fp32>(weights, own + i * STEP, width);
        sums[i * THREADS] = {{0.f, 0.f, 0.f, 0.f}};
    }

    int turn = 0;
    bool is_first = true;
#pragma unroll 1
    for (int64 first = place.part * TEAMS; first < call.rows;
         first += call.parts * TEAMS, turn ^= 1, is_first = false) {
        const int64 row = first + team_in_block();
        const int limit = row < call.rows ? width : 0;
        const X::Element* const x = row_of<X>(call.x, row, call.x_row) + place.channel;
        const X::Element* const z = row_of<X>(call.z, row, call.z_row) + place.channel;
        const Normed::Element* const grad_normed =
            row_of<Normed>(call.grad_normed, row, call.grad_normed_row) + place.channel;
        const float scale =
            limit ? call.reciprocal_rms[row * call.groups + block_index() % call.groups] : 0.f;
        Normed::Raw4 raw_grad[HELD];
        X::Raw4 raw_x[HELD], raw_z[HELD];
        float sum = 0.f;
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            const int at = tile * TILE + own;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                raw_grad[i] = read_four<Normed>(grad_normed, at + i * STEP, limit);
                raw_x[i] = read_four<X>(x, at + i * STEP, limit);
                raw_z[i] = read_four<X>(z, at + i * STEP, limit);
                if (WIDE) weight[i] = read_four<Fp32>(weights, at + i * STEP, width);
            }
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const Four grad = Normed::widen(raw_grad[i]);
                const Four input = X::widen(raw_x[i]), gate = X::widen(raw_z[i]);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    sum += grad.at[j] * weight[i].at[j] * (input.at[j] * Gate(gate.at[j]).silu);
            }
        }
        const float mean = per_element * over_team<Sum>(sum, slots + turn * WARPS);
        const float share = scale * scale * scale * mean;

        X::Element* const grad_x = row_of<X>(call.grad_x, row, channels) + place.channel;
        X::Element* const grad_z = row_of<X>(call.grad_z, row, call.grad_z_row) + place.channel;
        // From the last tile on, which is still in registers.
#pragma unroll 1
        for (int tile = tiles - 1; tile >= 0; --tile) {
            const int at = tile * TILE + own;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (tile < tiles - 1) {
                    raw_grad[i] = read_four<Normed>(grad_normed, at + i * STEP, limit);
                    raw_x[i] = read_four<X>(x, at + i * STEP, limit);
                    raw_z[i] = read_four<X>(z, at + i * STEP, limit);
                    weight[i] = read_four<Fp32>(weights, at + i * STEP, width);
                }
                Four weight_sum = sums[i * THREADS];
                // There is room for one tile's; those of a wide row go to memory each time.
                if (WIDE && !is_first)
                    weight_sum = read_four<Fp32>(grad_weight, at + i * STEP, width);
                const Four grad = Normed::widen(raw_grad[i]);
                const Four input = X::widen(raw_x[i]), z_values = X::widen(raw_z[i]);
                Four dx, dz;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const Gate gate(z_values.at[j]);
                    const float gated = input.at[j] * gate.silu;
                    const float scaled = scale * grad.at[j];
                    weight_sum.at[j] += scaled * gated;
                    const float dv = scaled * weight[i].at[j] - share * gated;
                    dx.at[j] = dv * gate.silu;
                    dz.at[j] = dv * input.at[j] * gate.slope();
                }
                if (WIDE)
                    write_four<Fp32>(grad_weight, at + i * STEP, width, weight_sum);
                else
                    sums[i * THREADS] = weight_sum;
                write_four<X>(grad_x, at + i * STEP, limit, dx);
                write_four<X>(grad_z, at + i * STEP, limit, dz);
            }
        }
    }
    if (!WIDE) {
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            write_four<Fp32>(grad_weight, own + i * STEP, width, sums[i * THREADS]);
    }
}
