// Softmax cross entropy of a block of logits and its gradient, row by row, in place.
//
// A row of logits is read three times while it is in the cache: for the largest one, for the sum of
// the exponentials, and to be replaced by softmax minus one-hot. T tokens, V vocabulary.
#include "simd.h"

namespace {

constexpr int64_t IGNORED_LABEL = -100;

struct Arguments {
    void* logits;           // (T, V), overwritten by the gradient if `gradient` is set
    const int64_t* labels;  // (T,)
    void* losses;           // (T,) fp32, fp64 for fp64 logits
    int64_t tokens;
    int64_t vocabulary;
    int64_t row_stride;
    int64_t gradient;
    int64_t threads;
};

template <class Storage>
void row(Storage* logits, int64_t vocabulary, int64_t label, bool gradient,
         typename Compute<Storage>::real* loss) {
    using real = typename Compute<Storage>::real;
    using vector = typename Lanes<real>::type;
    constexpr int64_t lanes = Lanes<real>::count;
    const int64_t whole = vocabulary / lanes * lanes;
    const int rest = int(vocabulary - whole);

    vector largest_v = splat(real(-INFINITY));
    for (int64_t v = 0; v < whole; v += lanes) largest_v = at_least(load(logits + v), largest_v);
    real largest = largest_v[0];
    for (int64_t i = 1; i < lanes; i++) largest = largest_v[i] > largest ? largest_v[i] : largest;
    for (int64_t v = whole; v < vocabulary; v++) {
        const real x = to_real(logits[v]);
        largest = x > largest ? x : largest;
    }

    const vector shift = splat(largest);
    vector total_v{};
    for (int64_t v = 0; v < whole; v += lanes) total_v += exp_v(load(logits + v) - shift);
    real total = lane_sum(total_v);
    if (rest) {
        const vector last = exp_v(load_part(logits + whole, rest) - shift);
        for (int i = 0; i < rest; i++) total += last[i];
    }

    // In this order: the difference is exact, and a sure token's loss is small beside `largest`.
    *loss = std::log(total) + (largest - to_real(logits[label]));
    if (!gradient) return;
    const vector scale = splat(1 / total);
    // Before the row is overwritten.
    const real chosen = std::exp(to_real(logits[label]) - largest) / total;
    for (int64_t v = 0; v < whole; v += lanes) {
        store(logits + v, exp_v(load(logits + v) - shift) * scale);
    }
    if (rest) {
        const vector last = exp_v(load_part(logits + whole, rest) - shift) * scale;
        store_part(logits + whole, last, rest);
    }
    from_real(chosen - 1, logits + label);
}

// The first label that is no row of the head, or -1; nothing is computed then.
template <class Storage>
int64_t block(const Arguments& a) {
    using real = typename Compute<Storage>::real;
    for (int64_t t = 0; t < a.tokens; t++) {
        const int64_t label = a.labels[t];
        if (label != IGNORED_LABEL && (label < 0 || label >= a.vocabulary)) return t;
    }
#pragma omp parallel for num_threads(int(a.threads)) schedule(static)
    for (int64_t t = 0; t < a.tokens; t++) {
        Storage* logits = static_cast<Storage*>(a.logits) + t * a.row_stride;
        real* loss = static_cast<real*>(a.losses) + t;
        const int64_t label = a.labels[t];
        if (label == IGNORED_LABEL) {
            *loss = 0;
            if (a.gradient) memset(logits, 0, size_t(a.vocabulary) * sizeof(Storage));
            continue;
        }
        row(logits, a.vocabulary, label, a.gradient != 0, loss);
    }
    return -1;
}

}  // namespace

extern "C" {
int64_t softmax_loss_arguments_bytes() { return sizeof(Arguments); }
int64_t softmax_loss_fp32(const Arguments* a) { return block<float>(*a); }
int64_t softmax_loss_bf16(const Arguments* a) { return block<bf16>(*a); }
int64_t softmax_loss_fp64(const Arguments* a) { return block<double>(*a); }
}
