// Selective scan of the `cpu` backend (arXiv 2312.00752, equations 2 and 4): forward, backward and
// the single step of decoding, with delta's bias and softplus, the skip D and the gate z inside.
//
// layout.h has the words and how the work is cut, forward.h and backward.h the two passes.

#include "backward.h"
#include "forward.h"

namespace {

template <class Storage>
int run_forward(const Call& c) {
    using Real = typename Compute<Storage>::real;
    const Partition<Real> p(c);
    int failed = 0;
#pragma omp parallel num_threads(int(c.threads < p.tasks ? c.threads : p.tasks))
    {
        Forward<Storage> forward(c, p);
        if (!forward.arena) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.tasks; task++) {
            if (forward.arena) forward.run(Range<Real>(p, c, task));
        }
    }
    return failed;
}

template <class Storage>
int run_backward(const Call& c) {
    using Real = typename Compute<Storage>::real;
    const Partition<Real> p(c);
    const int64_t of_rows = c.batch * p.ranges * c.groups * c.length * c.d_state;
    const int64_t of_blocks = c.batch * c.groups * p.blocks * p.lanes;
    Real* arena = memory<Real>(2 * of_rows + of_blocks * (c.d_state + 2));
    if (!arena) return 1;
    Partials<Real> partials;
    partials.B = arena, partials.C = partials.B + of_rows, partials.A = partials.C + of_rows;
    partials.D = partials.A + of_blocks * c.d_state, partials.bias = partials.D + of_blocks;
    int failed = 0;
#pragma omp parallel num_threads(int(c.threads < p.tasks ? c.threads : p.tasks))
    {
        Backward<Storage> backward(c, p, partials);
        if (!backward.arena) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.tasks; task++) {
            if (backward.arena) backward.run(Range<Real>(p, c, task));
        }
#pragma omp for schedule(static) nowait
        for (int64_t at = 0; at < c.batch * p.chunks; at++) {
            add_ranges<Storage>(c, p, partials, at / p.chunks, at % p.chunks);
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < c.groups * p.blocks; at++) add_rows(c, p, partials, at);
    }
    free(arena);
    return failed;
}

// One position of one block without a gradient. The vectors run over n, as the state's memory does,
// so nothing is transposed.
template <class Storage, class Real = typename Compute<Storage>::real>
void step_block(const Call& c, int64_t row, const Block<Real>& block) {
    using V = Vector<Real>;
    constexpr int lanes = Lanes<Real>::count, TOGETHER = 4;
    const int64_t d_state = c.d_state, group = block.channel / (c.channels / c.groups);
    V d[1] = {block.get((const Storage*)c.delta + row * c.delta_batch)};
    d[0] += block.parameter(c.delta_bias);
    if (c.delta_softplus) softplus_each(d);
    const V x = block.get((const Storage*)c.u + row * c.u_batch);
    const V exponent = d[0] * Real(LOG2_E), inflow = d[0] * x;
    const Storage* B = (const Storage*)c.B + row * c.B_batch + group * c.B_group;
    const Storage* C = (const Storage*)c.C + row * c.C_batch + group * c.C_group;
    V out[lanes] = {};
    for (int64_t n = 0; n < d_state; n += lanes) {
        const int part = int(d_state - n < lanes ? d_state - n : lanes);
        const V b = load_part(B + n, part), r = load_part(C + n, part);
        for (int i = 0; i < block.count; i += TOGETHER) {
            const int width = block.count - i < TOGETHER ? block.count - i : TOGETHER;
            const int64_t at = (block.channel + i) * d_state + n;
            const Real* A = static_cast<const Real*>(c.A) + at;
            const int64_t state = row * c.channels * d_state + at;
            V decay[TOGETHER] = {};
            for (int j = 0; j < width; j++) {
                decay[j] = exponent[i + j] * load_part(A + j * d_state, part);
            }
            exp2_each(decay);
            for (int j = 0; j < width; j++) {
                V h = inflow[i + j] * b;
                if (c.initial_state) {
                    const Real* before = static_cast<const Real*>(c.initial_state) + state;
                    h += decay[j] * load_part(before + j * d_state, part);
                }
                store_part(static_cast<Real*>(c.final_state) + state + j * d_state, h, part);
                out[i + j] += h * r;
            }
        }
    }
    V y = lane_sums(out) + block.parameter(c.D) * x;
    if (c.z) {
        const V gate = block.get((const Storage*)c.z + row * c.z_batch);
        y *= gate * sigmoid_v(gate);
    }
    block.put(static_cast<Storage*>(c.y) + row * c.channels, y);
}

// Elements of the state below which waking a second thread costs more than it saves.
constexpr int64_t STEP_PARALLEL = 1 << 17;

template <class Storage>
int run_step(const Call& c) {
    using Real = typename Compute<Storage>::real;
    const Partition<Real> p(c);
    const int64_t blocks = c.groups * p.blocks, tasks = c.batch * blocks;
    const bool alone = c.batch * c.channels * c.d_state < STEP_PARALLEL;
#pragma omp parallel for num_threads(int(alone ? 1 : c.threads)) schedule(static)
    for (int64_t at = 0; at < tasks; at++) {
        step_block<Storage>(c, at / blocks,
                            Block<Real>(p, at % blocks / p.blocks, at % p.blocks));
    }
    return 0;
}

}  // namespace

// Each gives 0, or 1 when there was not enough memory. `storage` is 0 for fp32, 1 bf16, 2 fp64.
#define EXPORT(NAME)                                        \
    extern "C" int selective_scan_##NAME(const Call* c) {   \
        if (c->storage == 1) return run_##NAME<bf16>(*c);   \
        if (c->storage == 2) return run_##NAME<double>(*c); \
        return run_##NAME<float>(*c);                       \
    }
EXPORT(forward)
EXPORT(backward)
EXPORT(step)

extern "C" int64_t selective_scan_call_bytes() { return sizeof(Call); }
extern "C" int64_t selective_scan_chunk_steps() { return CHUNK; }
