// Gradients of the selective scan; see gpu_tile.cuh for who does what.
//
// Chunk by chunk from the last: forward from the kept state, noting the state every 4 steps in
// shared memory, then 4 steps at a time from the last: forward again with the states in registers
// (fp32), and back. With g_t the gradient of the state h_t:
//     g_t = C_t dy_t + exp(dt_(t+1) A) g_(t+1);  dC_t += h_t dy_t;  dB_t += g_t dt_t u_t
//     d(dt u)_t = sum_n B_t g_t;  q_t = g_t exp(dt_t A) h_(t-1);  d(dt)_t = sum_n A q_t;  dA += dt q
//
// dB and dC are sums over channels. A lane's register j holds the state 4 g + (j ^ (q mod 4)) of
// its group g, so that halving exchanges between the 8 lanes of a group need no selection; B and C
// lie in shared memory in the 4 orders that this asks for.
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
    int64 grad_y_batch, grad_y_row, seq_idx_batch, batch, length, channels, groups, splits;
};

constexpr int TILE = 4;
constexpr int TILES = CHUNK / TILE;
constexpr int TILE_FLOATS = TILE * WARP_CHANNELS;
// B and C of a step, each group of four states in four orders side by side, which the 8 lanes of a
// group read without bank conflicts; those of C stand 64 floats after those of B.
constexpr int STEP_FLOATS = 128;
constexpr int LANE_STATES = 8;
// The states before tiles 1 to 6 of a chunk; the last tile's stay in registers, the first one's are
// those before the chunk.
constexpr int NOTED = TILES - 2;
// Each channel's skip weight and step bias: L1, all of which shared memory takes, would not hold them.
constexpr int VECTOR_FLOATS = 2 * BLOCK_CHANNELS;
constexpr int WARP_FLOATS = NOTED * LANE_STATES * 32 + CHUNK * WARP_CHANNELS + 2 * TILE_FLOATS;

// v[j] becomes v[j ^ p].
DEVICE void reorder(float (&v)[4], int p) {
    const bool odd = p & 1, upper = p & 2;
    const float a = odd ? v[1] : v[0], b = odd ? v[0] : v[1];
    const float c = odd ? v[3] : v[2], d = odd ? v[2] : v[3];
    v[0] = upper ? c : a;
    v[1] = upper ? d : b;
    v[2] = upper ? a : c;
    v[3] = upper ? b : d;
}
DEVICE void reorder(float (&h)[2][4], int p) {
    reorder(h[0], p);
    reorder(h[1], p);
}

// B and C of a chunk into shared memory, in the four orders.
DEVICE void put(const ChunkInputs& inputs, float* shared) {
    float* const to = shared + inputs.first * STEP_FLOATS + (ChunkInputs::is_C() ? 64 : 0) +
                      16 * ChunkInputs::part();
#pragma unroll
    for (int i = 0; i < ChunkInputs::EACH; ++i) {
        const Four v = Storage::widen(inputs.raw[i]);
#pragma unroll
        for (int p = 0; p < 4; ++p)
            *reinterpret_cast<Four*>(to + i * (THREADS / 8) * STEP_FLOATS + 4 * p) =
                Four{{v.at[p], v.at[1 ^ p], v.at[2 ^ p], v.at[3 ^ p]}};
    }
}

// Halves the 4 values over the lanes of a group by bit 0, then bit 1 of q, and adds up the rest: the
// sum over all channels of the state 4 g + (q mod 4).
DEVICE float sum_over_group(const float (&v)[4]) {
    const float first = v[0] + from_lane_xor(v[1], 1);
    const float second = v[2] + from_lane_xor(v[3], 1);
    const float half = first + from_lane_xor(second, 2);
    return half + from_lane_xor(half, 4);
}

// What a lane of the way back has for its channels at one step.
struct Gate {
    Pair dy;        // gradient of the ungated output
    Pair dz_per_y;  // times the output, the gradient of the gate
};

DEVICE Gate gate_of(Raw2 grad_y, Raw2 raw_z) {
    const Pair grad = Storage::widen(grad_y);
#if GATE
    const Pair z = Storage::widen(raw_z);
    const Pair gate = {nonzero_gate(z.x), nonzero_gate(z.y)};
    const Pair open = {sigmoid(gate.x), sigmoid(gate.y)};
    // The output is y gate open, and d(gate open) = open (1 + gate (1 - open)).
    return {{grad.x * gate.x * open.x, grad.y * gate.y * open.y},
            {grad.x * (reciprocal(gate.x) + 1.f - open.x),
             grad.y * (reciprocal(gate.y) + 1.f - open.y)}};
#else
    return {grad, {0.f, 0.f}};
#endif
}

DEVICE Raw2 gate_input(const Rows& z, int ahead, bool within) {
#if GATE
    return z.two(ahead, within);
#else
    return Raw2{};
#endif
}

#if LOCAL
KERNEL(selective_scan_backward) {
    const Place place(call);
    const int length = int(call.length), order = place.pair & 3;
    float* const shared_bc = reinterpret_cast<float*>(shared_memory());
    float* const steps = shared_bc + CHUNK * STEP_FLOATS + warp_in_block() * WARP_FLOATS;
    float* const grads = steps + TILE_FLOATS;
    // The last chunk's last tile comes first.
    const int begin = place.end_chunk * CHUNK - TILE + place.quarter;
    Rows delta(call.delta, place.row * call.delta_batch + place.own(), call.delta_row, begin);
    Rows z(call.z, place.row * call.z_batch + place.own(), call.z_row, begin);
    Rows grad_y(call.grad_y, place.row * call.grad_y_batch + place.own(), call.grad_y_row, begin);
    int left = length - begin;
    const Pair bias = load_pair(call.delta_bias + place.own());
    const float* const c_of_lane = shared_bc + 64 + 16 * place.quarter + 4 * order;
    float A[2][4], carried[2][4];
    load_decays(A, call.A, place);
    reorder(A, order);
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
            const int at = place.quarter * WARP_CHANNELS + 2 * place.pair;
            const Pair dt = step_sizes(delta.two(0, left > 0), bias, left > 0);
            const Gate gate = gate_of(grad_y.two(0, left > 0), gate_input(z, 0, left > 0));
            delta.move(-TILE);
            z.move(-TILE);
            grad_y.move(-TILE);
            left += TILE;
            sync_warp();
            store_pair(steps + at, dt.x, dt.y);
            store_pair(grads + at, gate.dy.x, gate.dy.y);
            sync_warp();
#pragma unroll
            for (int t = TILE - 1; t >= 0; --t) {
                const Four c = load_four(c_of_lane + (tile * TILE + t) * STEP_FLOATS);
                const Pair step = load_pair(steps + t * WARP_CHANNELS + 2 * place.pair);
                const Pair dy = load_pair(grads + t * WARP_CHANNELS + 2 * place.pair);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    carried[0][j] = exp2_approx(step.x * A[0][j]) * (c.at[j] * dy.x + carried[0][j]);
                    carried[1][j] = exp2_approx(step.y * A[1][j]) * (c.at[j] * dy.y + carried[1][j]);
                }
#if DOCUMENTS
                if (starts >> (tile * TILE + t) & 1) clear(carried);
#endif
            }
        }
    }
    reorder(carried, order);
    store_states(call.split_states + state_offset(place, place.row * call.splits + place.split,
                                                  call.channels),
                 carried);
}
#else

// What the forward gave there, of use for the gate's gradient only.
DEVICE Raw2 output(const void* y, int64 at, bool within) {
    Raw2 raw{};
#if GATE
    if (within) raw = *reinterpret_cast<const Raw2*>(static_cast<const Element*>(y) + at);
#endif
    return raw;
}

// Sums gx and gA of both channels over the 4 lanes that share them: lane g is left with gx (g < 2)
// or gA, of channel g mod 2.
DEVICE float sum_over_states(Pair gx, Pair gA, int quarter) {
    const bool is_A = quarter & 2, second = quarter & 1;
    const float first = (is_A ? gA.x : gx.x) + from_lane_xor(is_A ? gx.x : gA.x, 16);
    const float other = (is_A ? gA.y : gx.y) + from_lane_xor(is_A ? gx.y : gA.y, 16);
    return (second ? other : first) + from_lane_xor(second ? first : other, 8);
}

// A thread's share of dB and dC of a tile: values of one step that it adds up over the warps.
struct BlockSums {
    static constexpr int EACH = (TILE * 32 + THREADS - 1) / THREADS;
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
    // `parts` (WARPS, TILE, 32); then moves to the tile before.
    DEVICE void pass_on(const float* parts) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int ahead = i * (THREADS / 32);
            float sum = 0.f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp)
                sum += parts[warp * TILE * 32 + i * THREADS + thread_in_block()];
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
    const int length = int(call.length), order = place.pair & 3;
    float* const shared_bc = reinterpret_cast<float*>(shared_memory());
    float* const parts = shared_bc + CHUNK * STEP_FLOATS;
    float* const own_skip = parts + 2 * WARPS * TILE * 32 + warp_in_block() * WARP_CHANNELS +
                            2 * (lane_in_warp() & 7);
    float* const own_bias = own_skip + BLOCK_CHANNELS;
    float* const noted =
        parts + 2 * WARPS * TILE * 32 + VECTOR_FLOATS + warp_in_block() * WARP_FLOATS;
    float* const steps = noted + NOTED * LANE_STATES * 32;
    // One tile's dt u and dy, whose places the sums over states take step by step.
    float* const inputs = steps + CHUNK * WARP_CHANNELS;
    float* const grads = inputs + TILE_FLOATS;

    const int begin = place.end_chunk * CHUNK - TILE + place.quarter;
    Rows u(call.u, place.row * call.u_batch + place.own(), call.u_row, begin);
    Rows z(call.z, place.row * call.z_batch + place.own(), call.z_row, begin);
    Rows grad_y(call.grad_y, place.row * call.grad_y_batch + place.own(), call.grad_y_row, begin);
    // Of the output and the gradients of u, delta and z, which are all contiguous.
    int64 out_at = (place.row * length + begin) * call.channels + place.own();
    int left = length - begin;
    BlockSums sums(call, place);
    if (place.quarter == 0) {
        const Pair skip = load_pair(call.D + place.own());
        const Pair bias = load_pair(call.delta_bias + place.own());
        store_pair(own_skip, skip.x, skip.y);
        store_pair(own_bias, bias.x, bias.y);
    }
    const float* const bc_of_lane = shared_bc + 16 * place.quarter + 4 * order;
    const int own_pair = 2 * place.pair;
    const int sum_at = (place.quarter & 2 ? TILE_FLOATS : 0) + own_pair + (place.quarter & 1);
    // Both halves of a group end up with the same sum, and write it to the same place.
    const int part_at = 4 * place.quarter + order;
    const int chunks = int((call.length + CHUNK - 1) / CHUNK);
    const int64 split_at = place.row * call.splits + place.split;

    float A[2][4], carried[2][4], dA[2][4];
    load_decays(A, call.A, place);
    reorder(A, order);
    clear(dA);
    clear(carried);
    if (call.splits > 1)
        load_states(carried, call.split_states + state_offset(place, split_at, call.channels));
    else if (call.grad_final)
        load_states(carried, call.grad_final + state_offset(place, place.row, call.channels));
    reorder(carried, order);
    Pair dD = {0.f, 0.f}, dbias = {0.f, 0.f};

#pragma unroll 1
    for (int chunk = place.end_chunk - 1; chunk >= place.first_chunk; --chunk) {
        const int chunk_start = chunk * CHUNK;
        float h[2][4];
        load_states(h, call.chunk_states +
                           state_offset(place, place.row * chunks + chunk, call.channels));
        // Whatever phase two does without is not kept in registers through it.
        const int chunk_begin = chunk_start + place.quarter;
        Rows first_u(call.u, place.row * call.u_batch + place.own(), call.u_row, chunk_begin);
        Rows delta(call.delta, place.row * call.delta_batch + place.own(), call.delta_row,
                   chunk_begin);
        int chunk_left = left + CHUNK - TILE;
        // Two tiles ahead: the memory answers later than one tile takes.
        Raw2 now_delta = delta.two(0, chunk_left > 0);
        Raw2 now_u = first_u.two(0, chunk_left > 0);
        Raw2 next_delta = delta.two(TILE, chunk_left > TILE);
        Raw2 next_u = first_u.two(TILE, chunk_left > TILE);
        const Raw2 last_u = u.two(0, left > 0);
        Raw2 next_grad = grad_y.two(0, left > 0);
        Raw2 next_z = gate_input(z, 0, left > 0);
        Raw2 next_y = output(call.y, out_at, left > 0);
        {
            ChunkInputs bc(call, place);
            bc.fetch(chunk);
            sync_block();
            put(bc, shared_bc);
        }
        uint32 starts = 0;
#if DOCUMENTS
        starts = document_starts(call.seq_idx + place.row * call.seq_idx_batch, length, chunk_start);
#endif
        reorder(h, order);
        sync_block();

#pragma unroll 1
        for (int tile = 0; tile < TILES; ++tile) {
            const Pair dt = step_sizes(now_delta, load_pair(own_bias), chunk_left > 0);
            const Pair x = Storage::widen(now_u);
            delta.move(TILE);
            first_u.move(TILE);
            chunk_left -= TILE;
            now_delta = next_delta;
            now_u = next_u;
            next_delta = delta.two(TILE, chunk_left > TILE);
            next_u = first_u.two(TILE, chunk_left > TILE);
            float* const tile_steps = steps + tile * TILE_FLOATS;
            store_pair(tile_steps + place.quarter * WARP_CHANNELS + own_pair, dt.x, dt.y);
            if (tile == TILES - 1) break;
            sync_warp();
            store_pair(inputs + place.quarter * WARP_CHANNELS + own_pair, dt.x * x.x, dt.y * x.y);
            sync_warp();
#pragma unroll
            for (int t = 0; t < TILE; ++t) {
                const Four b = load_four(bc_of_lane + (tile * TILE + t) * STEP_FLOATS);
                const Pair step = load_pair(tile_steps + t * WARP_CHANNELS + own_pair);
                const Pair in = load_pair(inputs + t * WARP_CHANNELS + own_pair);
#if DOCUMENTS
                if (starts >> (tile * TILE + t) & 1) clear(h);
#endif
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    h[0][j] = exp2_approx(step.x * A[0][j]) * h[0][j] + in.x * b.at[j];
                    h[1][j] = exp2_approx(step.y * A[1][j]) * h[1][j] + in.y * b.at[j];
                }
            }
            if (tile < NOTED) {
                store_four(noted + ((tile * 2) * 32 + lane_in_warp()) * 4, h[0]);
                store_four(noted + ((tile * 2 + 1) * 32 + lane_in_warp()) * 4, h[1]);
            }
        }

        next_u = last_u;
#pragma unroll 1
        for (int tile = TILES - 1; tile >= 0; --tile) {
            const float* const tile_steps = steps + tile * TILE_FLOATS;
            const int own_at = place.quarter * WARP_CHANNELS + own_pair;
            const Pair own_u = Storage::widen(next_u);
            const Gate gate = gate_of(next_grad, next_z);
            const bool within = left > 0;
            dD.x += gate.dy.x * own_u.x;
            dD.y += gate.dy.y * own_u.y;
#if GATE
            if (within) {
                const Pair own_y = Storage::widen(next_y);
                store_two(static_cast<Element*>(call.dz) + out_at, gate.dz_per_y.x * own_y.x,
                          gate.dz_per_y.y * own_y.y);
            }
#endif
            left += TILE;
            u.move(-TILE);
            grad_y.move(-TILE);
            z.move(-TILE);
            if (tile > 0) {
                next_u = u.two(0, left > 0);
                next_grad = grad_y.two(0, left > 0);
                next_z = gate_input(z, 0, left > 0);
                next_y = output(call.y, out_at - TILE * call.channels, left > 0);
            }
            if (tile == 0) {
                load_states(h, call.chunk_states +
                                   state_offset(place, place.row * chunks + chunk, call.channels));
                reorder(h, order);
            } else if (tile <= NOTED) {
                const Four first_channel = load_four(noted + (((tile - 1) * 2) * 32 + lane_in_warp()) * 4);
                const Four second = load_four(noted + (((tile - 1) * 2 + 1) * 32 + lane_in_warp()) * 4);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    h[0][j] = first_channel.at[j];
                    h[1][j] = second.at[j];
                }
            }
            sync_warp();
            {
                const Pair dt = load_pair(tile_steps + own_at);
                store_pair(inputs + own_at, dt.x * own_u.x, dt.y * own_u.y);
                store_pair(grads + own_at, gate.dy.x, gate.dy.y);
            }
            sync_warp();

            // Two sets take turns, so that one barrier a tile is enough.
            float* const own_parts =
                parts + ((tile & 1) * WARPS + warp_in_block()) * TILE * 32 + part_at;
            // States only: with the decays as well a lane does not get by with 128 registers, and what is
            // spilled lies in L2, since shared memory takes all of L1 (2.6 ms instead of 2.0).
            float before[TILE][2][4];
#pragma unroll
            for (int t = 0; t < TILE; ++t) {
                const float* const bc = bc_of_lane + (tile * TILE + t) * STEP_FLOATS;
                const Four b = load_four(bc);
                const Pair step = load_pair(tile_steps + t * WARP_CHANNELS + own_pair);
                const Pair in = load_pair(inputs + t * WARP_CHANNELS + own_pair);
                const Pair dy = load_pair(grads + t * WARP_CHANNELS + own_pair);
#if DOCUMENTS
                if (starts >> (tile * TILE + t) & 1) clear(h);
#endif
                float part[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    before[t][0][j] = h[0][j];
                    before[t][1][j] = h[1][j];
                    h[0][j] = exp2_approx(step.x * A[0][j]) * h[0][j] + in.x * b.at[j];
                    h[1][j] = exp2_approx(step.y * A[1][j]) * h[1][j] + in.y * b.at[j];
                    part[j] = h[0][j] * dy.x + h[1][j] * dy.y;
                }
                own_parts[t * 32 + 16] = sum_over_group(part);
            }

#pragma unroll
            for (int t = TILE - 1; t >= 0; --t) {
                const float* const bc = bc_of_lane + (tile * TILE + t) * STEP_FLOATS;
                const Four b = load_four(bc);
                const Four c = load_four(bc + 64);
                const Pair step = load_pair(tile_steps + t * WARP_CHANNELS + own_pair);
                const Pair in = load_pair(inputs + t * WARP_CHANNELS + own_pair);
                const Pair dy = load_pair(grads + t * WARP_CHANNELS + own_pair);
                float part[4];
                Pair gx = {0.f, 0.f}, gA = {0.f, 0.f};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float g0 = c.at[j] * dy.x + carried[0][j];
                    const float g1 = c.at[j] * dy.y + carried[1][j];
                    part[j] = g0 * in.x + g1 * in.y;
                    gx.x += g0 * b.at[j];
                    gx.y += g1 * b.at[j];
                    carried[0][j] = g0 * exp2_approx(step.x * A[0][j]);
                    carried[1][j] = g1 * exp2_approx(step.y * A[1][j]);
                    const float q0 = carried[0][j] * before[t][0][j];
                    const float q1 = carried[1][j] * before[t][1][j];
                    gA.x += A[0][j] * q0;
                    gA.y += A[1][j] * q1;
                    dA[0][j] += step.x * q0;
                    dA[1][j] += step.y * q1;
                }
#if DOCUMENTS
                if (starts >> (tile * TILE + t) & 1) clear(carried);
#endif
                const float sum = sum_over_states(gx, gA, place.quarter);
                own_parts[t * 32] = sum_over_group(part);
                inputs[t * WARP_CHANNELS + sum_at] = sum;
            }
            sync_block();
            sums.pass_on(parts + (tile & 1) * WARPS * TILE * 32);

            const Pair gx = load_pair(inputs + own_at);
            const Pair gA = load_pair(grads + own_at);
            const Pair dt = load_pair(tile_steps + own_at);
            const Pair skip = load_pair(own_skip);
            Pair ddelta = {own_u.x * gx.x + gA.x * (1.f / LOG2_E),
                           own_u.y * gx.y + gA.y * (1.f / LOG2_E)};
#if SOFTPLUS
            ddelta.x *= softplus_slope(dt.x);
            ddelta.y *= softplus_slope(dt.y);
#endif
            if (within) {
                dbias.x += ddelta.x;
                dbias.y += ddelta.y;
                store_two(static_cast<Element*>(call.du) + out_at,
                          skip.x * gate.dy.x + dt.x * gx.x, skip.y * gate.dy.y + dt.y * gx.y);
                store_two(static_cast<Element*>(call.ddelta) + out_at, ddelta.x, ddelta.y);
            }
            out_at -= TILE * call.channels;
        }
    }

    reorder(dA, order);
    store_states(call.dA + state_offset(place, split_at, call.channels), dA);
#pragma unroll
    for (int mask = 8; mask <= 16; mask *= 2) {
        dD.x += from_lane_xor(dD.x, mask);
        dD.y += from_lane_xor(dD.y, mask);
        dbias.x += from_lane_xor(dbias.x, mask);
        dbias.y += from_lane_xor(dbias.y, mask);
    }
    if (place.quarter == 0) {
        store_pair(call.dD + split_at * call.channels + place.own(), dD.x, dD.y);
        store_pair(call.ddelta_bias + split_at * call.channels + place.own(), dbias.x, dbias.y);
    }
    if (call.dinitial && place.split == 0) {
        reorder(carried, order);
        store_states(call.dinitial + state_offset(place, place.row, call.channels), carried);
    }
}
#endif
