// Softmax cross entropy of rows of logits, and its gradient in their place; a block has a row.
//
// A row is read twice, the second time mostly out of L2. One pass finds the largest logit and the
// sum of the exponentials at once: what is summed up so far shrinks whenever a larger one appears.
//
// Macros: HELD; STORAGE_BF16; GRADIENT: the logits become softmax minus one-hot.
#define TEAM THREADS
#define WHOLE 1
#include "rows.cuh"

struct Call {
    void* logits;         // (rows, columns), columns in fours; overwritten by the gradient
    const int64* labels;  // (rows,)
    float* losses;        // (rows,)
    int64 rows, columns, vocabulary;
};

#if STORAGE_BF16
typedef Bf16 Storage;
#else
typedef Fp32 Storage;
#endif
typedef Storage::Element Element;

constexpr int64 IGNORED_LABEL = -100;
// Below every logit but -inf, and finite: a difference of two of them is no NaN.
constexpr float LOWEST = -3.4e38f;

DEVICE float widened(uint16 bits) { return bits_to_float(uint32(bits) << 16); }
DEVICE float widened(float value) { return value; }

// Four logits; those of padded columns, which take no part, are -inf.
DEVICE Four logits_of(Storage::Raw4 raw, int at, int vocabulary) {
    Four values = Storage::widen(raw);
    if (at + 4 > vocabulary) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (at + j >= vocabulary) values.at[j] = bits_to_float(0xff800000u);
    }
    return values;
}

struct RunningSum {
    float largest = LOWEST, total = 0.f;

    DEVICE void rescale(float to) {
        total *= exp2_approx(LOG2_E * (largest - to));
        largest = to;
    }
    DEVICE void add(const Four (&values)[HELD]) {
        float most = largest;
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) most = fmaxf(most, values[i].at[j]);
        rescale(most);
        // The difference first: it is exact, and an error of it would be that of the loss.
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                total += exp2_approx(LOG2_E * (values[i].at[j] - largest));
    }
};

DEVICE void fill(Element* row, int columns, float value) {
    for (int at = 4 * thread_in_block(); at < columns; at += STEP)
        write_four<Storage>(row, at, columns, {{value, value, value, value}});
}

KERNEL(softmax_loss) {
    float* const slots = reinterpret_cast<float*>(shared_memory());
    const int columns = int(call.columns), vocabulary = int(call.vocabulary);
    const int64 index = block_index();
    Element* const row = row_of<Storage>(call.logits, index, call.columns);
    const int64 label = call.labels[index];
    if (label < 0 || label >= vocabulary) {
        // NaN for a label that there is no logit of: an error here would cost a synchronisation.
        const float outcome = label == IGNORED_LABEL ? 0.f : bits_to_float(0x7fc00000u);
        if (thread_in_block() == 0) call.losses[index] = outcome;
        if (GRADIENT) fill(row, columns, outcome);
        return;
    }
    const float chosen = widened(row[label]);
    const int own = 4 * thread_in_block();

    RunningSum sum;
#pragma unroll 1
    for (int tile = own; tile < vocabulary; tile += TILE) {
        Storage::Raw4 raw[HELD];
        Four values[HELD];
#pragma unroll
        for (int i = 0; i < HELD; ++i) raw[i] = read_four<Storage>(row, tile + i * STEP, columns);
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            values[i] = logits_of(raw[i], tile + i * STEP, vocabulary);
        sum.add(values);
    }
    sum.rescale(over_team<Largest>(sum.largest, slots));
    const float total = over_team<Sum>(sum.total, slots + WARPS);
    // Everyone has read the label's logit before its owner overwrites it.
    sync_block();
    // In this order: a sure token's loss is small beside `largest`.
    if (thread_in_block() == 0) call.losses[index] = logf(total) + (sum.largest - chosen);
    if (!GRADIENT) return;
    const float scale = 1.f / total;
#pragma unroll 1
    for (int tile = own; tile < columns; tile += TILE) {
        Storage::Raw4 raw[HELD];
#pragma unroll
        for (int i = 0; i < HELD; ++i) raw[i] = read_four<Storage>(row, tile + i * STEP, columns);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int at = tile + i * STEP;
            Four values = logits_of(raw[i], at, vocabulary);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                values.at[j] = scale * exp2_approx(LOG2_E * (values.at[j] - sum.largest));
            if (at == (int(label) & ~3)) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (j == (int(label) & 3)) values.at[j] -= 1.f;
            }
            write_four<Storage>(row, at, columns, values);
        }
    }
}
