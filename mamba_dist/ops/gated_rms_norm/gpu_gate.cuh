// Where a team of the gated norm's kernels works, and the gate.
//
// A block keeps to one group of channels, so that its weights stay in registers, and takes some of
// the positions; `width` is that of a group.
#pragma once
#include "rows.cuh"

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

// Row of a group in a tensor of all channels.
struct Place {
    int channel;  // the group's first one
    int64 part;   // which of the blocks that share the group

    template <class Call>
    DEVICE Place(const Call& call)
        : channel(int(block_index() % call.groups * call.width)),
          part(block_index() / call.groups) {}
};

struct Gate {
    float sigmoid, silu;

    DEVICE Gate(float z) : sigmoid(::sigmoid(z)), silu(z * sigmoid) {}
    // d silu / dz.
    DEVICE float slope() const { return sigmoid + silu * (1.f - sigmoid); }
};
