// Loads and stores of four neighbouring elements of a row at a time, and of single ones.
//
// Macro: WHOLE says that rows consist of whole fours, all at aligned addresses.
#pragma once
#include "device.cuh"

DEVICE Bits2 gathered(const uint16* at, int count) {
    uint32 bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) bits[j] = j < count ? at[j] : 0;
    return {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
}
DEVICE Four gathered(const float* at, int count) {
    Four values;
#pragma unroll
    for (int j = 0; j < 4; ++j) values.at[j] = j < count ? at[j] : 0.f;
    return values;
}
DEVICE void scatter(uint16* at, Bits2 raw, int count) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint32 word = j < 2 ? raw.low : raw.high;
        if (j < count) at[j] = uint16(j % 2 ? word >> 16 : word);
    }
}
DEVICE void scatter(float* at, Four values, int count) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (j < count) at[j] = values.at[j];
}

// Elements `at` to `at` + 3 of a row, as they lie in memory; zeros from `limit` on.
template <class Storage>
DEVICE typename Storage::Raw4 read_four(const typename Storage::Element* row, int at, int limit) {
    typename Storage::Raw4 raw{};
#if WHOLE
    if (at < limit) raw = *reinterpret_cast<const typename Storage::Raw4*>(row + at);
#else
    if (at < limit) raw = gathered(row + at, limit - at);
#endif
    return raw;
}
template <class Storage>
DEVICE void write_four(typename Storage::Element* row, int at, int limit, Four values) {
    const typename Storage::Raw4 raw = Storage::narrow(values);
#if WHOLE
    if (at < limit) *reinterpret_cast<typename Storage::Raw4*>(row + at) = raw;
#else
    if (at < limit) scatter(row + at, raw, limit - at);
#endif
}

// Row `index` of a tensor whose rows lie `stride` elements apart.
template <class Storage>
DEVICE const typename Storage::Element* row_of(const void* tensor, int64 index, int64 stride) {
    return static_cast<const typename Storage::Element*>(tensor) + index * stride;
}
template <class Storage>
DEVICE typename Storage::Element* row_of(void* tensor, int64 index, int64 stride) {
    return static_cast<typename Storage::Element*>(tensor) + index * stride;
}

DEVICE float number(uint16 bits) { return bf16_low(bits); }
DEVICE float number(float x) { return x; }
DEVICE void put(uint16* at, float x) { *at = uint16(pack_bf16(x, 0.f)); }
DEVICE void put(float* at, float x) { *at = x; }

// Sixteen bytes to an aligned address of global memory at once: of an assignment the compiler makes
// several stores as soon as it knows where its parts come from.
DEVICE void store_at_once(float* at, Four v) {
#ifdef EMULATED
    *reinterpret_cast<Four*>(at) = v;
#else
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(at), "f"(v.at[0]), "f"(v.at[1]), "f"(v.at[2]), "f"(v.at[3])
                 : "memory");
#endif
}
