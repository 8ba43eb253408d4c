// Selective scan, forward (arXiv 2312.00752, algorithm 2), channels last; see gpu_tile.cuh for who
// does what. Lane r + 4 s has channels 2s, 2s + 1 and states 4r to 4r + 3.
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

// B and C of a chunk into (CHUNK, 32) fp32: 16 of B, then 16 of C.
DEVICE void put(const ChunkInputs& inputs, float* shared) {
#pragma unroll
    for (int i = 0; i < ChunkInputs::EACH; ++i)
        store_four(shared + 4 * (i * THREADS + thread_in_block()), Storage::widen(inputs.raw[i]));
}

// A warp's dt, dt u and y of one tile, and the next tile's inputs in two sets.
constexpr int WARP_FLOATS = 3 * TILE_FLOATS + 6 * 32 * int(sizeof(Raw4) / sizeof(float));

DEVICE void load_states(float (&h)[2][4], const float* warp_states, const Place& place) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const Four row = load_four(warp_states + (2 * place.s + c) * STATES + 4 * place.r);
#pragma unroll
        for (int j = 0; j < 4; ++j) h[c][j] = row.at[j];
    }
}
DEVICE void store_states(float* warp_states, const float (&h)[2][4], const Place& place) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
        store_four(warp_states + (2 * place.s + c) * STATES + 4 * place.r,
                   {{h[c][0], h[c][1], h[c][2], h[c][3]}});
}

// The lanes' states times C of all steps of a tile: the column of the states' own step is the output
// of channels 2s, 2s + 1 there, and lane r has columns 2r and 2r + 1. `c` is C of step s.
DEVICE void multiply_all(float (&d)[4], const float (&h)[2][4], const Four& c) {
    multiply(d, {h[0][0], h[1][0], h[0][1], h[1][1]}, c.at[0], c.at[1]);
    multiply(d, {h[0][2], h[1][2], h[0][3], h[1][3]}, c.at[2], c.at[3]);
}

KERNEL(selective_scan_forward) {
    const Place place(call);
    const int length = int(call.length);
    float* const shared_bc = reinterpret_cast<float*>(shared_memory());
    float* const steps = shared_bc + CHUNK * 32 + warp_in_block() * WARP_FLOATS;
    float* const inputs = steps + TILE_FLOATS;
    float* const outputs = inputs + TILE_FLOATS;
    // The next tile's u, delta and z of this lane, for even and for odd tiles.
    Raw4* const fetched = reinterpret_cast<Raw4*>(outputs + TILE_FLOATS) + lane_in_warp();
    const int own_at = place.s * WARP_CHANNELS + 4 * place.r;

    const int begin = place.first_chunk * CHUNK + place.s;
    Rows u(call.u, place.row * call.u_batch + place.own(), call.u_row, begin);
    Rows delta(call.delta, place.row * call.delta_batch + place.own(), call.delta_row, begin);
    Rows z(call.z, place.row * call.z_batch + place.own(), call.z_row, begin);
    Element* y_at = static_cast<Element*>(call.y) +
                    (place.row * length + begin) * call.channels + place.own();
    // Steps from the lane's own one to the end of the row.
    int left = length - begin;
    const Four bias = load_four(call.delta_bias + place.own());
    const Four skip = load_four(call.D + place.own());
    float A[2][4], h[2][4];
    load_states(A, call.A + place.channel * STATES, place);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        A[0][j] = per_log2(A[0][j]);
        A[1][j] = per_log2(A[1][j]);
    }
    clear(h);
    const int64 split_at = place.row * call.splits + place.split;
    if (!LOCAL && call.splits > 1)
        load_states(h, call.split_states + place.states_at(split_at, call.channels), place);
    else if (!LOCAL && call.initial_state)
        load_states(h, call.initial_state + place.states_at(place.row, call.channels), place);

    Four total = {{0.f, 0.f, 0.f, 0.f}};
    uint32 any_start = 0;
    ChunkInputs next_bc(call, place);
    next_bc.fetch(place.first_chunk);
    u.fetch(fetched, 0, left > 0);
    delta.fetch(fetched + 32, 0, left > 0);
#if GATE && !LOCAL
    z.fetch(fetched + 64, 0, left > 0);
#endif
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
                             place.states_at(place.row * chunks + chunk, call.channels),
                         h, place);
#pragma unroll 1
        for (int tile = 0; tile < TILES; ++tile) {
            wait_for_copies();
            const Raw4* const now = fetched + (tile & 1) * 96;
            Raw4* const next = fetched + (~tile & 1) * 96;
            u.move(TILE);
            delta.move(TILE);
            u.fetch(next, 0, left > TILE);
            delta.fetch(next + 32, 0, left > TILE);
#if GATE && !LOCAL
            z.move(TILE);
            z.fetch(next + 64, 0, left > TILE);
#endif
            const Raw4 now_u = now[0];
            const Four own_steps = step_sizes(now[32], bias, left > 0);
#pragma unroll
            for (int i = 0; i < 4; ++i) total.at[i] += own_steps.at[i];
            sync_warp();
            store_four(steps + own_at, own_steps);
            store_four(inputs + own_at, product(own_steps, Storage::widen(now_u)));
            sync_warp();
            // Read once a tile instead of at each step, which shared memory would not keep up with.
            Four c{};
            if (!LOCAL) c = load_four(shared_bc + (tile * TILE + place.s) * 32 + 16 + 4 * place.r);
            Pair y[2];
#pragma unroll
            for (int t = 0; t < TILE; ++t) {
                const float* bc = shared_bc + (tile * TILE + t) * 32 + 4 * place.r;
                const Four b = load_four(bc);
                const Pair dt = load_pair(steps + t * WARP_CHANNELS + 2 * place.s);
                const Pair x = load_pair(inputs + t * WARP_CHANNELS + 2 * place.s);
#if DOCUMENTS
                if (starts >> (tile * TILE + t) & 1) clear(h);
#endif
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    h[0][j] = exp2_approx(dt.x * A[0][j]) * h[0][j] + x.x * b.at[j];
                    h[1][j] = exp2_approx(dt.y * A[1][j]) * h[1][j] + x.y * b.at[j];
                }
                if (LOCAL) continue;
                float d[4] = {0.f, 0.f, 0.f, 0.f};
                multiply_all(d, h, c);
                if (place.r == t / 2) y[t % 2] = {d[t % 2], d[2 + t % 2]};
            }
            if (!LOCAL) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    store_pair(outputs + (2 * place.r + i) * WARP_CHANNELS + 2 * place.s, y[i].x,
                               y[i].y);
                sync_warp();
                const Four x = Storage::widen(now_u);
                Four out = load_four(outputs + own_at);
#if GATE
                const Four z_of_own = Storage::widen(now[64]);
#endif
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    out.at[i] = CUT_OFF * out.at[i] + skip.at[i] * x.at[i];
#if GATE
                    const float gate = nonzero_gate(z_of_own.at[i]);
                    out.at[i] *= gate * sigmoid(gate);
#endif
                }
                if (left > 0) store_rounded(y_at, out);
                y_at += TILE * call.channels;
            }
            left -= TILE;
        }
    }
    if (LOCAL) {
        store_states(call.split_states + place.states_at(split_at, call.channels), h, place);
        total = sum_over_steps(total);
        const float wiped = bits_to_float(0x7f800000u);
        if (any_start) total = {{wiped, wiped, wiped, wiped}};
        if (place.s == 0)
            store_four(call.split_steps + split_at * call.channels + place.own(), total);
    } else if (place.end_chunk == chunks && place.first_chunk < place.end_chunk) {
        store_states(call.final_state + place.states_at(place.row, call.channels), h, place);
    }
}
