// Selective scan, forward (arXiv 2312.00752, algorithm 2), channels last; see gpu_tile.cuh for who
// does what.
//
// Macros: STORAGE_BF16, SOFTPLUS, GATE, DOCUMENTS; KEEP_STATES writes the state before each chunk;
// LOCAL computes only the state that each part of the length would end with if it began with zero,
// from which `selective_scan_chain` gets the state that it begins with.
#include "gpu_tile.cuh"

struct Call {
    const void *u, *delta, *z, *B, *C;
    const float *A, *D, *delta_bias, *initial_state;
    const int* seq_idx;
    void* y;
    float *final_state, *chunk_states;
    // Per part of the length: the state before it (B, splits, E, 16), under LOCAL its own end
    // state; and the sum of its steps (B, splits, E), infinite if a document starts in it.
    float *split_states, *split_steps;
    int64 u_batch, u_row, delta_batch, delta_row, z_batch, z_row;
    int64 B_batch, B_row, B_group, C_batch, C_row, C_group;
    int64 seq_idx_batch, batch, length, channels, groups, splits;
};

// Steps whose inputs are prepared together; 8 values of a channel lie side by side for a lane each.
constexpr int TILE = 8;
// A warp's part of shared memory: dt, dt u, and y of one tile.
constexpr int TILE_FLOATS = TILE * WARP_CHANNELS;

// B and C of a chunk into (CHUNK, 32) fp32: 16 of B, then 16 of C.
DEVICE void put(const ChunkInputs& inputs, float* shared) {
#pragma unroll
    for (int i = 0; i < ChunkInputs::EACH; ++i) {
        const int item = i * THREADS + thread_in_block();
        store_four(shared + 4 * item, Storage::widen(inputs.raw[i]).at);
    }
}

// What a lane reads of u, delta and z for one tile: steps quarter and quarter + 4.
struct TileInputs {
    Raw2 u[2], delta[2], z[2];

    DEVICE void fetch(const Rows& u_rows, const Rows& delta_rows, const Rows& z_rows, int left) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u[i] = u_rows.two(4 * i, 4 * i < left);
            delta[i] = delta_rows.two(4 * i, 4 * i < left);
#if GATE && !LOCAL
            z[i] = z_rows.two(4 * i, 4 * i < left);
#endif
        }
    }
};

// Sums of y[step][channel] over the 4 lanes that share channels: each lane is left with the one at
// step quarter / 2, channel quarter mod 2.
DEVICE float sum_over_states(const float (&y)[2][2], int quarter) {
    const bool second_step = quarter & 2, second_channel = quarter & 1;
    float kept[2];
#pragma unroll
    for (int c = 0; c < 2; ++c)
        kept[c] = (second_step ? y[1][c] : y[0][c]) +
                  from_lane_xor(second_step ? y[0][c] : y[1][c], 16);
    return (second_channel ? kept[1] : kept[0]) +
           from_lane_xor(second_channel ? kept[0] : kept[1], 8);
}

KERNEL(selective_scan_forward) {
    const Place place(call);
    const int length = int(call.length);
    float* const shared_bc = reinterpret_cast<float*>(shared_memory());
    float* const steps = shared_bc + CHUNK * 32 + warp_in_block() * 3 * TILE_FLOATS;
    float* const inputs = steps + TILE_FLOATS;
    float* const outputs = inputs + TILE_FLOATS;

    const int begin = place.first_chunk * CHUNK + place.quarter;
    Rows u(call.u, place.row * call.u_batch + place.own(), call.u_row, begin);
    Rows delta(call.delta, place.row * call.delta_batch + place.own(), call.delta_row, begin);
    Rows z(call.z, place.row * call.z_batch + place.own(), call.z_row, begin);
    Element* y_at = static_cast<Element*>(call.y) +
                    (place.row * length + begin) * call.channels + place.own();
    const Pair bias = load_pair(call.delta_bias + place.own());
    const Pair skip = load_pair(call.D + place.own());
    float A[2][4], h[2][4];
    load_decays(A, call.A, place);
    clear(h);
    const int64 split_at = place.row * call.splits + place.split;
    if (!LOCAL && call.splits > 1)
        load_states(h, call.split_states + state_offset(place, split_at, call.channels));
    else if (!LOCAL && call.initial_state)
        load_states(h, call.initial_state + state_offset(place, place.row, call.channels));

    Pair total = {0.f, 0.f};
    uint32 any_start = 0;
    ChunkInputs next_bc(call, place);
    TileInputs next;
    next_bc.fetch(place.first_chunk);
    // Steps from the lane's own one to the end of the row.
    int left = length - begin;
    next.fetch(u, delta, z, left);
    const int chunks = int((call.length + CHUNK - 1) / CHUNK);
#pragma unroll 1
    for (int chunk = place.first_chunk; chunk < place.end_chunk; ++chunk) {
        sync_block();
        put(next_bc, shared_bc);
        if (chunk + 1 < place.end_chunk) next_bc.fetch(chunk + 1);
        sync_block();
        uint32 starts = 0;
#if DOCUMENTS
        starts = document_starts(call.seq_idx + place.row * call.seq_idx_batch, length,
                                 chunk * CHUNK);
        any_start |= starts;
#endif
        if (KEEP_STATES)
            store_states(call.chunk_states +
                             state_offset(place, place.row * chunks + chunk, call.channels),
                         h);
#pragma unroll 1
        for (int tile = 0; tile < CHUNK / TILE; ++tile) {
            const TileInputs now = next;
            u.move(TILE);
            delta.move(TILE);
            z.move(TILE);
            next.fetch(u, delta, z, left - TILE);
            sync_warp();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = (4 * i + place.quarter) * WARP_CHANNELS + 2 * place.pair;
                const Pair dt = step_sizes(now.delta[i], bias, 4 * i < left);
                const Pair x = Storage::widen(now.u[i]);
                store_pair(steps + at, dt.x, dt.y);
                store_pair(inputs + at, dt.x * x.x, dt.y * x.y);
                total.x += dt.x;
                total.y += dt.y;
            }
            sync_warp();
            float y[2][2], summed[TILE / 2];
#pragma unroll
            for (int t = 0; t < TILE; ++t) {
                const float* bc = shared_bc + (tile * TILE + t) * 32 + 4 * place.quarter;
                const Four b = load_four(bc);
                const Four c = load_four(bc + 16);
                const Pair dt = load_pair(steps + t * WARP_CHANNELS + 2 * place.pair);
                const Pair x = load_pair(inputs + t * WARP_CHANNELS + 2 * place.pair);
#if DOCUMENTS
                if (starts >> (tile * TILE + t) & 1) clear(h);
#endif
                y[t & 1][0] = y[t & 1][1] = 0.f;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    h[0][j] = exp2_approx(dt.x * A[0][j]) * h[0][j] + x.x * b.at[j];
                    h[1][j] = exp2_approx(dt.y * A[1][j]) * h[1][j] + x.y * b.at[j];
                    y[t & 1][0] += h[0][j] * c.at[j];
                    y[t & 1][1] += h[1][j] * c.at[j];
                }
                if (!LOCAL && (t & 1)) summed[t / 2] = sum_over_states(y, place.quarter);
            }
            if (LOCAL) {
                left -= TILE;
                continue;
            }
#pragma unroll
            for (int two = 0; two < TILE / 2; ++two)
                outputs[(2 * two + place.quarter / 2) * WARP_CHANNELS + 2 * place.pair +
                        (place.quarter & 1)] = summed[two];
            sync_warp();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                Pair out = load_pair(outputs + (4 * i + place.quarter) * WARP_CHANNELS +
                                     2 * place.pair);
                const Pair x = Storage::widen(now.u[i]);
                out.x += skip.x * x.x;
                out.y += skip.y * x.y;
#if GATE
                const Pair raw_gate = Storage::widen(now.z[i]);
                const Pair gate = {nonzero_gate(raw_gate.x), nonzero_gate(raw_gate.y)};
                out.x *= gate.x * sigmoid(gate.x);
                out.y *= gate.y * sigmoid(gate.y);
#endif
                if (4 * i < left) store_two(y_at + 4 * i * call.channels, out.x, out.y);
            }
            y_at += TILE * call.channels;
            left -= TILE;
        }
    }
    if (LOCAL) {
        store_states(call.split_states + state_offset(place, split_at, call.channels), h);
        total.x += from_lane_xor(total.x, 8);
        total.y += from_lane_xor(total.y, 8);
        total.x += from_lane_xor(total.x, 16);
        total.y += from_lane_xor(total.y, 16);
        const float wiped = bits_to_float(0x7f800000u);
        if (place.quarter == 0)
            store_pair(call.split_steps + split_at * call.channels + place.own(),
                       any_start ? wiped : total.x, any_start ? wiped : total.y);
    } else if (place.end_chunk == chunks && place.first_chunk < place.end_chunk) {
        store_states(call.final_state + state_offset(place, place.row, call.channels), h);
    }
}
