// What the CUDA kernels are written in: the few instructions that CUDA C++ has no name for, values
// in the two storage types, and sums over lanes.
//
// No header of the CUDA toolkit is included, which users do not have; NVRTC brings the language.
// The same sources run on a CPU in the tests: tests/ops/simt/emulator.h stands in for everything
// between the two marks below.
#pragma once

typedef unsigned int uint32;
typedef unsigned short uint16;
typedef long long int64;

struct alignas(8) Pair {
    float x, y;
};
struct alignas(16) Four {
    float at[4];
};
struct alignas(8) Bits2 {
    uint32 low, high;
};

#ifndef EMULATED
// What the emulator replaces: from here

// A kernel named `name`, whose body follows with `call` as its argument (a `Call`). THREADS and
// BLOCKS_PER_SM are macros of each compilation.
#define KERNEL(name)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)                 \
        name(const __grid_constant__ Call call)
#define DEVICE __device__ __forceinline__

DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char shared[];
    return shared;
}
DEVICE int thread_in_block() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float from_lane_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
// Bit i is lane i's condition.
DEVICE uint32 ballot(bool condition) { return __ballot_sync(~0u, condition); }

// 2^x; subnormal results are 0.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x to the last bit but one.
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
DEVICE float bits_to_float(uint32 bits) { return __uint_as_float(bits); }
// `low` and `high` rounded to bf16, in the halves of a word.
DEVICE uint32 pack_bf16(float low, float high) {
    uint32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
// D += A B on the tensor cores, fp32 sums of tf32 products: of each factor the lower 13 bits are left
// out. A is 16 x 8 and a lane has its rows lane / 4 and that + 8, columns lane mod 4 (a[0], a[1]) and
// that + 4 (a[2], a[3]); B is 8 x 8, rows lane mod 4 and that + 4, column lane / 4; D is 16 x 8, rows
// as A, columns 2 (lane mod 4) and the next (PTX ISA, mma.m16n8k8).
DEVICE void multiply_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
    // Volatile, for all lanes must take part, also those that have no use for the result.
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// Copies 8 or 16 bytes to shared memory while the thread goes on, zeros unless `within`. Unlike a load
// it holds none of the six scoreboards, on which other instructions would then wait as well.
template <int BYTES>
DEVICE void copy_async(void* shared, const void* global, bool within) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"((uint32)__cvta_generic_to_shared(shared)), "l"(global), "n"(BYTES),
                   "r"(within ? BYTES : 0)
                 : "memory");
}
// Until the thread's own copies have arrived.
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_all;" : : : "memory");
}
DEVICE uint32 float_to_bits(float x) { return __float_as_uint(x); }
DEVICE void add_to_global(float* target, float value) {
    asm volatile("red.global.add.f32 [%0], %1;" : : "l"(target), "f"(value) : "memory");
}
// and up to here.
#endif

DEVICE int warp_in_block() { return thread_in_block() >> 5; }
DEVICE int lane_in_warp() { return thread_in_block() & 31; }
DEVICE float bf16_low(uint32 word) { return bits_to_float(word << 16); }
DEVICE float bf16_high(uint32 word) { return bits_to_float(word & 0xffff0000u); }

// How a tensor's elements lie in memory. `Raw2` and `Raw4` hold two and four of them as loaded.
struct Bf16 {
    typedef uint16 Element;
    typedef uint32 Raw2;
    typedef Bits2 Raw4;
    DEVICE static Pair widen(Raw2 raw) { return {bf16_low(raw), bf16_high(raw)}; }
    DEVICE static Four widen(Raw4 raw) {
        return {{bf16_low(raw.low), bf16_high(raw.low), bf16_low(raw.high), bf16_high(raw.high)}};
    }
    DEVICE static Raw2 narrow(float x, float y) { return pack_bf16(x, y); }
    DEVICE static Raw4 narrow(Four v) {
        return {pack_bf16(v.at[0], v.at[1]), pack_bf16(v.at[2], v.at[3])};
    }
};
struct Fp32 {
    typedef float Element;
    typedef Pair Raw2;
    typedef Four Raw4;
    DEVICE static Pair widen(Raw2 raw) { return raw; }
    DEVICE static Four widen(Raw4 raw) { return raw; }
    DEVICE static Raw2 narrow(float x, float y) { return {x, y}; }
    DEVICE static Raw4 narrow(Four v) { return v; }
};

constexpr float LOG2_E = 1.4426950408889634f;

// A log2(e), so that exp(dt A) is one multiplication and one 2^x. Finite: where no step is taken, dt
// is 0 and nothing decays, also at a rate of infinity. A NaN stays one.
DEVICE float per_log2(float A) {
    constexpr float fastest = -3.4028234e38f;
    const float rate = A * LOG2_E;
    return rate < fastest ? fastest : rate;
}

// What tf32 keeps of x.
DEVICE float tf32_part(float x) { return bits_to_float(float_to_bits(x) & 0xffffe000u); }

// D += A B to fp32 precision, in three products.
DEVICE void multiply_fp32(float (&d)[4], const float (&a)[4], float b0, float b1) {
    const float high[4] = {tf32_part(a[0]), tf32_part(a[1]), tf32_part(a[2]), tf32_part(a[3])};
    const float low[4] = {a[0] - high[0], a[1] - high[1], a[2] - high[2], a[3] - high[3]};
    const float b0_high = tf32_part(b0), b1_high = tf32_part(b1);
    multiply_tf32(d, high, b0 - b0_high, b1 - b1_high);
    multiply_tf32(d, low, b0_high, b1_high);
    multiply_tf32(d, high, b0_high, b1_high);
}

DEVICE float sigmoid(float x) { return reciprocal(1.f + exp2_approx(-LOG2_E * x)); }

// log(1 + e) for e in [0, 1], as 2 artanh(e / (2 + e)): right to 2e-7 of the result even for small
// e, where the hardware's logarithm of 1 + e has lost it.
DEVICE float log_of_1_plus(float e) {
    const float s = e * reciprocal(2.f + e);
    const float q = s * s;
    // Fitted to (artanh(s) / s - 1) / q for s up to 1/3, with an error of 3e-8.
    float series = 0.13429263f;
    series = series * q + 0.14112623f;
    series = series * q + 0.20004369f;
    series = series * q + 0.33333309f;
    return 2.f * (s + s * (q * series));
}

DEVICE float softplus(float x) {
    const float magnitude = x < 0.f ? -x : x;
    return (x > 0.f ? x : 0.f) + log_of_1_plus(exp2_approx(-LOG2_E * magnitude));
}

// The derivative of softplus where its value is `y`: 1 - exp(-y).
DEVICE float softplus_slope(float y) {
    const float small = y * (1.f - y * (0.5f - y * (1.f / 6.f - y * (1.f / 24.f))));
    return y < 0.1f ? small : 1.f - exp2_approx(-LOG2_E * y);
}
