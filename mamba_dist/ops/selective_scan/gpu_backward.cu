// Gradients of the selective scan; see gpu_tile.cuh for who does what.
//
// Chunk by chunk from the last: forward from the kept state, noting the state every 4 steps in
// shared memory, then 4 steps at a time from the last: forward again with the states in registers
// (fp32), and back. With g_t the gradient of the state h_t:
//     g_t = C_t dy_t + exp(dt_(t+1) A) g_(t+1);  dC_t += h_t dy_t;  dB_t += g_t dt_t u_t
//     d(dt u)_t = sum_n B_t g_t;  q_t = g_t exp(dt_t A) h_(t-1);  d(dt)_t = sum_n A q_t;  dA += dt q
//
// Lane r + 4 s has the states 2s, 2s + 1 and four channels: its register c has 4r + (c ^ (s mod 2)).
// In this order the first exchange of a sum over states needs no selection; dt, dt u and dy lie in
// shared memory in both orders.
//
// Macros: STORAGE_BF16, SOFTPLUS, GATE, DOCUMENTS; DETERMINISTIC gives each block of channels its own
// dB and dC to be summed in order, instead of adding with atomics. LOCAL computes only the gradient
// of the state before each part of the length, as if nothing came after the part.
#include "gpu_tile.cuh"

struct Call {
    const void *u, *delta, *z, *B, *C, *y, *grad_y;
    const float *A, *D, *delta_bias, *chunk_states, *grad_final;
    const int* seq_idx;
    void *du, *ddelta, *dz;
    // dBC (tiles, B, L, G, 32) fp32, 16 of B and 16 of C; one tile unless DETERMINISTIC.
    float *dBC;
    // Per batch row and part of the length: (B, splits, E, 16), (B, splits, E), (B, splits, E).
    float *dA, *dD, *ddelta_bias;
    float *dinitial, *split_states;
    int64 u_batch, u_row, delta_batch, delta_row, z_batch, z_row;
    int64 B_batch, B_row, B_group, C_batch, C_row, C_group;
    // dz_gap: elements between the end of a row of dz and the next one, across batch rows too. With
    // two strides the kernel spills more.
    int64 grad_y_batch, grad_y_row, dz_gap, seq_idx_batch, batch, length, channels, groups, splits;
};

// Steps between two noted states.
constexpr int SPAN = 4;
// The states before spans 1 to 6 of a chunk are noted; those before the last one stay in registers,
// and those before the first one are the chunk's.
constexpr int NOTED = CHUNK / SPAN - 2;
// A tile in both orders: channels 4r to 4r + 3 of step t stand at 32 t + 8 r, in the order t mod 2,
// then in the other, by which neither writing nor reading meets bank conflicts.
constexpr int STEP_FLOATS = 2 * WARP_CHANNELS;
constexpr int ORDERED_FLOATS = TILE * STEP_FLOATS;
// dB and dC of a step, apart enough that 4 steps are written without bank conflicts.
constexpr int PART_FLOATS = 36;
// Each channel's skip weight and step bias: L1, all of which shared memory takes, would not hold them.
constexpr int VECTOR_FLOATS = 2 * BLOCK_CHANNELS;
// Inputs of the next tile on their way, three of each lane.
constexpr int FETCHED_FLOATS = 3 * 32 * int(sizeof(Raw4) / sizeof(float));
constexpr int WARP_FLOATS =
    NOTED * 8 * 32 + CHUNK * WARP_CHANNELS + 3 * ORDERED_FLOATS + FETCHED_FLOATS;

// B and C of a chunk into (CHUNK, 8, 4) fp32: B, B, C, C of the states 2s, 2s + 1.
DEVICE void put(const ChunkInputs& inputs, float* shared) {
    float* const to =
        shared + inputs.first * 32 + 8 * ChunkInputs::part() + (ChunkInputs::is_C() ? 2 : 0);
#pragma unroll
    for (int i = 0; i < ChunkInputs::EACH; ++i) {
        const Four v = Storage::widen(inputs.raw[i]);
        store_pair(to + i * (THREADS / 8) * 32, v.at[0], v.at[1]);
        store_pair(to + i * (THREADS / 8) * 32 + 4, v.at[2], v.at[3]);
    }
}

DEVICE void load_states(float (&h)[2][4], const float* warp_states, const Place& place) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int channel = 4 * place.r + (c ^ (place.s & 1));
        const Pair two = load_pair(warp_states + channel * STATES + 2 * place.s);
        h[0][c] = two.x;
        h[1][c] = two.y;
    }
}
DEVICE void store_states(float* warp_states, const float (&h)[2][4], const Place& place) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int channel = 4 * place.r + (c ^ (place.s & 1));
        store_pair(warp_states + channel * STATES + 2 * place.s, h[0][c], h[1][c]);
    }
}
DEVICE void load_decays(float (&A)[2][4], const float* table, const Place& place) {
    load_states(A, table + place.channel * STATES, place);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        A[0][c] = per_log2(A[0][c]);
        A[1][c] = per_log2(A[1][c]);
    }
}

// A lane's four values of a step, in both orders.
DEVICE void store_ordered(float* tile, const Place& place, const Four& v) {
    float* const to = tile + place.s * STEP_FLOATS + 8 * place.r;
    const int odd = 4 * (place.s & 1);
    store_four(to + odd, v);
    store_four(to + 4 - odd, {{v.at[1], v.at[0], v.at[3], v.at[2]}});
}

// Where a lane reads step t (its parity is enough) in its own order, and in the plain one.
DEVICE int ordered_at(const Place& place, int t) {
    return 8 * place.r + 4 * ((place.s & 1) ^ (t & 1));
}

// The gradient of the ungated output, and what times the output is the gate's gradient.
struct Gate {
    Four dy, dz_per_y;
};
DEVICE Gate gate_of(Raw4 grad_y, Raw4 raw_z) {
    Gate gate = {Storage::widen(grad_y), {}};
#if GATE
    const Four z = Storage::widen(raw_z);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float grad = gate.dy.at[i], value = nonzero_gate(z.at[i]), open = sigmoid(value);
        gate.dy.at[i] = grad * value * open;
        // The output is y value open, and d(value open) = open (1 + value (1 - open)).
        gate.dz_per_y.at[i] = grad * (reciprocal(value) + 1.f - open);
    }
#endif
    return gate;
}
DEVICE Raw4 gate_input(const Rows& z, bool within) {
#if GATE
    return z.four(0, within);
#else
    return Raw4{};
#endif
}

#if LOCAL
KERNEL(selective_scan_backward) {
    const Place place(call);
    const int length = int(call.length);
    float* const shared_bc = reinterpret_cast<float*>(shared_memory());
    float* const steps = shared_bc + CHUNK * 32 + warp_in_block() * 2 * ORDERED_FLOATS;
    float* const grads = steps + ORDERED_FLOATS;
    // The last chunk's last tile comes first.
    const int begin = place.end_chunk * CHUNK - TILE + place.s;
    Rows delta(call.delta, place.row * call.delta_batch + place.own(), call.delta_row, begin);
    Rows z(call.z, place.row * call.z_batch + place.own(), call.z_row, begin);
    Rows grad_y(call.grad_y, place.row * call.grad_y_batch + place.own(), call.grad_y_row, begin);
    int left = length - begin;
    const Four bias = load_four(call.delta_bias + place.own());
    float A[2][4], carried[2][4];
    load_decays(A, call.A, place);
    clear(carried);
    ChunkInputs bc(call, place);
#pragma unroll 1
    for (int chunk = place.end_chunk - 1; chunk >= place.first_chunk; --chunk) {
        bc.fetch(chunk);
        sync_block();
        put(bc, shared_bc);
        sync_block();
        uint32 starts = 0;
#if DOCUMENTS
        starts = document_starts(call.seq_idx + place.row * call.seq_idx_batch, length,
                                 chunk * CHUNK);
#endif
#pragma unroll 1
        for (int tile = TILES - 1; tile >= 0; --tile) {
            const Four own_steps = step_sizes(delta.four(0, left > 0), bias, left > 0);
            const Gate gate = gate_of(grad_y.four(0, left > 0), gate_input(z, left > 0));
            delta.move(-TILE);
            z.move(-TILE);
            grad_y.move(-TILE);
            left += TILE;
            sync_warp();
            store_ordered(steps, place, own_steps);
            store_ordered(grads, place, gate.dy);
            sync_warp();
#pragma unroll
            for (int t = TILE - 1; t >= 0; --t) {
                const Pair c = load_pair(shared_bc + (tile * TILE + t) * 32 + 4 * place.s + 2);
                const Four dt = load_four(steps + t * STEP_FLOATS + ordered_at(place, t));
                const Four dy = load_four(grads + t * STEP_FLOATS + ordered_at(place, t));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    carried[0][i] = exp2_approx(dt.at[i] * A[0][i]) * (c.x * dy.at[i] + carried[0][i]);
                    carried[1][i] = exp2_approx(dt.at[i] * A[1][i]) * (c.y * dy.at[i] + carried[1][i]);
                }
#if DOCUMENTS
                if (starts >> (tile * TILE + t) & 1) clear(carried);
#endif
            }
        }
    }
    const int64 split_at = place.row * call.splits + place.split;
    store_states(call.split_states + place.states_at(split_at, call.channels), carried, place);
}
#else

// Starts to fetch what phase two needs of a tile: the output's gradient, and with a gate the gate and
// the output.
DEVICE void fetch_tile(Raw4* fetched, const Rows& grad_y, const Rows& z, const Element* y,
                       bool within) {
    grad_y.fetch(fetched, 0, within);
#if GATE
    z.fetch(fetched + 32, 0, within);
    copy_async<sizeof(Raw4)>(fetched + 64, y, within);
#endif
}

// Sums over the warp's channels of v times w, for the lane's two states: of step r of a span, if v is
// of that step. `w` are the lane's values of step s / 2, which are columns s of the product: a pair
// of columns for each step, the odd one in the odd order, as are the odd rows of v.
DEVICE Pair sum_over_channels(const float (&v)[2][4], const Four& w, bool odd) {
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    multiply(d, {v[0][0], v[1][0], v[0][1], v[1][1]}, w.at[0], w.at[1]);
    multiply(d, {v[0][2], v[1][2], v[0][3], v[1][3]}, w.at[2], w.at[3]);
    return {odd ? d[1] : d[0], odd ? d[3] : d[2]};
}

// Sums gx and gA of four channels over the 8 lanes of an r: lane s is left with gx (s < 4) or gA, of
// channel s mod 4.
DEVICE float sum_over_states(const float (&gx)[4], const float (&gA)[4], int s) {
    const float x0 = gx[0] + from_lane_xor(gx[1], 4), x2 = gx[2] + from_lane_xor(gx[3], 4);
    const float A0 = gA[0] + from_lane_xor(gA[1], 4), A2 = gA[2] + from_lane_xor(gA[3], 4);
    const bool second = s & 2, is_A = s & 4;
    const float x = (second ? x2 : x0) + from_lane_xor(second ? x0 : x2, 8);
    const float A = (second ? A2 : A0) + from_lane_xor(second ? A0 : A2, 8);
    return (is_A ? A : x) + from_lane_xor(is_A ? x : A, 16);
}

// Sums four channels' values over half of the 8 lanes of an r: lane s is left with channel s mod 4. One
// register to go on adding to, where four would be spilled.
DEVICE float channel_of_sum(const Four& v, int s) {
    const bool odd = s & 1, second = s & 2;
    const float first = (odd ? v.at[1] : v.at[0]) + from_lane_xor(odd ? v.at[0] : v.at[1], 4);
    const float other = (odd ? v.at[3] : v.at[2]) + from_lane_xor(odd ? v.at[2] : v.at[3], 4);
    return (second ? other : first) + from_lane_xor(second ? first : other, 8);
}

// A thread's share of dB and dC of a tile: values of some steps that it adds up over the warps.
struct BlockSums {
    static constexpr int EACH = TILE * 32 / THREADS;
    float* to;
    int64 step_floats;
    int left;

    template <class Call>
    DEVICE BlockSums(const Call& call, const Place& place)
        : to(call.dBC), step_floats(call.groups * 32) {
        const int64 begin = place.end_chunk * CHUNK - TILE + (thread_in_block() >> 5);
        to += ((place.row * call.length + begin) * call.groups + place.group) * 32 +
              (thread_in_block() & 31);
        left = int(call.length - begin);
#if DETERMINISTIC
        const int64 tile = place.channel % (call.channels / call.groups) / BLOCK_CHANNELS;
        to += tile * call.batch * call.length * step_floats;
#endif
    }
    // `parts` (WARPS, TILE, PART_FLOATS); then moves to the tile before.
    DEVICE void pass_on(const float* parts) {
        parts += (thread_in_block() >> 5) * PART_FLOATS + (thread_in_block() & 31);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int ahead = i * WARPS;
            float sum = 0.f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp)
                sum += parts[(warp * TILE + ahead) * PART_FLOATS];
            sum *= CUT_OFF * CUT_OFF;
            if (ahead >= left) continue;
#if DETERMINISTIC
            to[ahead * step_floats] = sum;
#else
            add_to_global(to + ahead * step_floats, sum);
#endif
        }
        to -= TILE * step_floats;
        left += TILE;
    }
};

KERNEL(selective_scan_backward) {
    const Place place(call);
    const int length = int(call.length);
    const bool odd = place.s & 1;
    float* const shared_bc = reinterpret_cast<float*>(shared_memory());
    float* const parts = shared_bc + CHUNK * 32;
    float* const own_skip = parts + WARPS * TILE * PART_FLOATS + warp_in_block() * WARP_CHANNELS +
                            4 * (lane_in_warp() & 3);
    float* const own_bias = own_skip + BLOCK_CHANNELS;
    float* const noted = parts + WARPS * TILE * PART_FLOATS + VECTOR_FLOATS +
                         warp_in_block() * WARP_FLOATS + 4 * lane_in_warp();
    float* const all_steps = parts + WARPS * TILE * PART_FLOATS + VECTOR_FLOATS +
                             warp_in_block() * WARP_FLOATS + NOTED * 8 * 32;
    // One tile's dt, dt u and dy; the sums over states take the place of dt u step by step.
    float* const steps = all_steps + CHUNK * WARP_CHANNELS;
    float* const inputs = steps + ORDERED_FLOATS;
    float* const grads = inputs + ORDERED_FLOATS;
    Raw4* const fetched = reinterpret_cast<Raw4*>(grads + ORDERED_FLOATS) + lane_in_warp();
    float* const own_parts =
        parts + (warp_in_block() * TILE + place.r) * PART_FLOATS + 2 * place.s;
    const int ordered[2] = {ordered_at(place, 0), ordered_at(place, 1)};
    const int own_plain = place.s * WARP_CHANNELS + 4 * place.r;
    // This lane's own values in the plain order, and its values of step s / 2 of a span in its own.
    const int own_at = place.s * STEP_FLOATS + 8 * place.r + 4 * (place.s & 1);
    const int column_at = place.s / 2 * STEP_FLOATS + ordered_at(place, place.s / 2);
    const int sum_at = 8 * place.r + place.s;

    const int begin = place.end_chunk * CHUNK - TILE + place.s;
    Rows u(call.u, place.row * call.u_batch + place.own(), call.u_row, begin);
    Rows z(call.z, place.row * call.z_batch + place.own(), call.z_row, begin);
    Rows grad_y(call.grad_y, place.row * call.grad_y_batch + place.own(), call.grad_y_row, begin);
    // Of the output and the gradients of u and delta, all contiguous, and of z but for its gaps.
    int64 out_at = (place.row * length + begin) * call.channels + place.own();
    int left = length - begin;
    BlockSums sums(call, place);
    if (place.s == 0) {
        store_four(own_skip, load_four(call.D + place.own()));
        store_four(own_bias, load_four(call.delta_bias + place.own()));
    }
    const int chunks = int((call.length + CHUNK - 1) / CHUNK);
    const int64 split_at = place.row * call.splits + place.split;

    float A[2][4], carried[2][4], dA[2][4];
    load_decays(A, call.A, place);
    clear(dA);
    clear(carried);
    if (call.splits > 1)
        load_states(carried, call.split_states + place.states_at(split_at, call.channels), place);
    else if (call.grad_final)
        load_states(carried, call.grad_final + place.states_at(place.row, call.channels), place);
    // Of channel s mod 4 of this lane's four.
    float dD = 0.f, dbias = 0.f;

#pragma unroll 1
    for (int chunk = place.end_chunk - 1; chunk >= place.first_chunk; --chunk) {
        float h[2][4];
        load_states(h, call.chunk_states +
                           place.states_at(place.row * chunks + chunk, call.channels),
                    place);
        // Whatever phase two does without is not kept in registers through it.
        Rows first_u(call.u, place.row * call.u_batch + place.own(), call.u_row,
                     chunk * CHUNK + place.s);
        Rows delta(call.delta, place.row * call.delta_batch + place.own(), call.delta_row,
                   chunk * CHUNK + place.s);
        int chunk_left = left + CHUNK - TILE;
        delta.fetch(fetched, 0, chunk_left > 0);
        first_u.fetch(fetched + 32, 0, chunk_left > 0);
        {
            ChunkInputs bc(call, place);
            bc.fetch(chunk);
            sync_block();
            put(bc, shared_bc);
        }
        uint32 starts = 0;
#if DOCUMENTS
        starts = document_starts(call.seq_idx + place.row * call.seq_idx_batch, length,
                                 chunk * CHUNK);
#endif
        sync_block();

#pragma unroll 1
        for (int tile = 0; tile < TILES; ++tile) {
            wait_for_copies();
            const Four dt_of_own = step_sizes(fetched[0], load_four(own_bias), chunk_left > 0);
            const Four x_of_own = product(dt_of_own, Storage::widen(fetched[32]));
            delta.move(TILE);
            first_u.move(TILE);
            chunk_left -= TILE;
            store_four(all_steps + tile * TILE_FLOATS + own_plain, dt_of_own);
            sync_warp();
            store_ordered(steps, place, dt_of_own);
            store_ordered(inputs, place, x_of_own);
            sync_warp();
            if (tile + 1 < TILES) {
                delta.fetch(fetched, 0, chunk_left > 0);
                first_u.fetch(fetched + 32, 0, chunk_left > 0);
            } else {
                fetch_tile(fetched, grad_y, z, static_cast<const Element*>(call.y) + out_at,
                           left > 0);
            }
#pragma unroll 1
            for (int half = 0; half < TILE / SPAN; ++half) {
                const int span = tile * (TILE / SPAN) + half;
                if (span > NOTED) break;
#pragma unroll
                for (int i = 0; i < SPAN; ++i) {
                    const int t = half * SPAN + i;
                    const Pair b = load_pair(shared_bc + (tile * TILE + t) * 32 + 4 * place.s);
                    const Four dt = load_four(steps + t * STEP_FLOATS + ordered[i & 1]);
                    const Four x = load_four(inputs + t * STEP_FLOATS + ordered[i & 1]);
#if DOCUMENTS
                    if (starts >> (tile * TILE + t) & 1) clear(h);
#endif
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        h[0][c] = exp2_approx(dt.at[c] * A[0][c]) * h[0][c] + x.at[c] * b.x;
                        h[1][c] = exp2_approx(dt.at[c] * A[1][c]) * h[1][c] + x.at[c] * b.y;
                    }
                }
                if (span < NOTED) {
                    store_four(noted + span * 256, {{h[0][0], h[0][1], h[0][2], h[0][3]}});
                    store_four(noted + span * 256 + 128, {{h[1][0], h[1][1], h[1][2], h[1][3]}});
                }
            }
        }

#pragma unroll 1
        for (int tile = TILES - 1; tile >= 0; --tile) {
            const bool within = left > 0;
            // Read a short while ago, so it comes out of L2.
            const Raw4 own_u = u.four(0, within);
            wait_for_copies();
            {
                const Gate gate = gate_of(fetched[0], fetched[32]);
                const Four dt = load_four(all_steps + tile * TILE_FLOATS + own_plain);
                const Four wide_u = Storage::widen(own_u);
                dD += channel_of_sum(product(gate.dy, wide_u), place.s);
#if GATE
                if (within)
                    store_rounded(static_cast<Element*>(call.dz) + out_at +
                                      (place.row * length + (length - left)) * call.dz_gap,
                                  product(gate.dz_per_y, Storage::widen(fetched[64])));
#endif
                // The block's reading of its parts is over, and the warp's of its sums.
                sync_block();
                store_ordered(steps, place, dt);
                store_ordered(inputs, place, product(dt, wide_u));
                store_ordered(grads, place, gate.dy);
            }
            left += TILE;
            u.move(-TILE);
            grad_y.move(-TILE);
            z.move(-TILE);
            if (tile > 0)
                fetch_tile(fetched, grad_y, z,
                           static_cast<const Element*>(call.y) + out_at - TILE * call.channels,
                           left > 0);
            sync_warp();

#pragma unroll 1
            for (int half = TILE / SPAN - 1; half >= 0; --half) {
                const int span = tile * (TILE / SPAN) + half;
                if (span == 0) {
                    load_states(h, call.chunk_states +
                                       place.states_at(place.row * chunks + chunk, call.channels),
                                place);
                } else if (span <= NOTED) {
                    const Four first = load_four(noted + (span - 1) * 256);
                    const Four second = load_four(noted + (span - 1) * 256 + 128);
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        h[0][c] = first.at[c];
                        h[1][c] = second.at[c];
                    }
                }
                const int at = half * SPAN * STEP_FLOATS;
                Four columns = load_four(grads + at + column_at);
                const float* const bc_of_span = shared_bc + span * SPAN * 32 + 4 * place.s;
                // States only: with the decays as well a lane does not get by with 128 registers,
                // and what is spilled lies in L2, since shared memory takes all of L1.
                float before[SPAN][2][4];
                Pair kept;
#pragma unroll
                for (int t = 0; t < SPAN; ++t) {
                    const Pair b = load_pair(bc_of_span + t * 32);
                    const Four dt = load_four(steps + at + t * STEP_FLOATS + ordered[t & 1]);
                    const Four x = load_four(inputs + at + t * STEP_FLOATS + ordered[t & 1]);
#if DOCUMENTS
                    if (starts >> (span * SPAN + t) & 1) clear(h);
#endif
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        before[t][0][c] = h[0][c];
                        before[t][1][c] = h[1][c];
                        h[0][c] = exp2_approx(dt.at[c] * A[0][c]) * h[0][c] + x.at[c] * b.x;
                        h[1][c] = exp2_approx(dt.at[c] * A[1][c]) * h[1][c] + x.at[c] * b.y;
                    }
                    const Pair dC = sum_over_channels(h, columns, odd);
                    if (place.r == t) kept = dC;
                }
                store_pair(own_parts + half * SPAN * PART_FLOATS + 16, kept.x, kept.y);
                columns = load_four(inputs + at + column_at);
                // The sums of each step take the place of its input, here of any lane's.
                sync_warp();

#pragma unroll
                for (int t = SPAN - 1; t >= 0; --t) {
                    const Four bc = load_four(bc_of_span + t * 32);
                    const Four dt = load_four(steps + at + t * STEP_FLOATS + ordered[t & 1]);
                    const Four dy = load_four(grads + at + t * STEP_FLOATS + ordered[t & 1]);
                    float g[2][4], gx[4], gA[4];
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        g[0][c] = bc.at[2] * dy.at[c] + carried[0][c];
                        g[1][c] = bc.at[3] * dy.at[c] + carried[1][c];
                        gx[c] = g[0][c] * bc.at[0] + g[1][c] * bc.at[1];
                        carried[0][c] = g[0][c] * exp2_approx(dt.at[c] * A[0][c]);
                        carried[1][c] = g[1][c] * exp2_approx(dt.at[c] * A[1][c]);
                        const float q0 = carried[0][c] * before[t][0][c];
                        const float q1 = carried[1][c] * before[t][1][c];
                        gA[c] = A[0][c] * q0 + A[1][c] * q1;
                        dA[0][c] += dt.at[c] * q0;
                        dA[1][c] += dt.at[c] * q1;
                    }
                    const Pair dB = sum_over_channels(g, columns, odd);
                    if (place.r == t) kept = dB;
#if DOCUMENTS
                    if (starts >> (span * SPAN + t) & 1) clear(carried);
#endif
                    const float sum = sum_over_states(gx, gA, place.s);
                    inputs[(half * SPAN + t) * STEP_FLOATS + sum_at] = sum;
                }
                store_pair(own_parts + half * SPAN * PART_FLOATS, kept.x, kept.y);
            }
            sync_block();
            sums.pass_on(parts);

            const Four gx = load_four(inputs + place.s * STEP_FLOATS + 8 * place.r);
            const Four gA = load_four(inputs + place.s * STEP_FLOATS + 8 * place.r + 4);
            const Four dt = load_four(steps + own_at);
            const Four dy = load_four(grads + own_at);
            const Four skip = load_four(own_skip);
            const Four wide_u = Storage::widen(own_u);
            Four du, ddelta;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                du.at[i] = skip.at[i] * dy.at[i] + dt.at[i] * gx.at[i];
                ddelta.at[i] = wide_u.at[i] * gx.at[i] + gA.at[i] * (1.f / LOG2_E);
#if SOFTPLUS
                ddelta.at[i] *= softplus_slope(dt.at[i]);
#endif
                ddelta.at[i] = within ? ddelta.at[i] : 0.f;
            }
            dbias += channel_of_sum(ddelta, place.s);
            if (within) {
                store_rounded(static_cast<Element*>(call.du) + out_at, du);
                store_rounded(static_cast<Element*>(call.ddelta) + out_at, ddelta);
            }
            out_at -= TILE * call.channels;
        }
    }

    store_states(call.dA + place.states_at(split_at, call.channels), dA, place);
    dD += from_lane_xor(dD, 16);
    dbias += from_lane_xor(dbias, 16);
    if (place.s < 4) {
        const int64 at = split_at * call.channels + place.own() + place.s;
        call.dD[at] = dD;
        call.ddelta_bias[at] = dbias;
    }
    if (call.dinitial && place.split == 0)
        store_states(call.dinitial + place.states_at(place.row, call.channels), carried, place);
}
#endif
