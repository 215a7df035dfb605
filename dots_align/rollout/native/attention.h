// Attention of queries over rows of keys and values that lie anywhere (in the blocks of the cache), one head at a time.
//
// Keys go in blocks of KEYS, with a running maximum and sum (online softmax). The same arithmetic, operation for
// operation, exists in two shapes: sixteen queries side by side in the lanes (prompts, and a prefix shared by many
// sequences), and one query with its own keys (decoding). Which of them computed a query does not show in its bits:
// a score is 16 partial chains over d summed as a tree, a block's sum of weights is 16 partial chains over keys summed
// as a tree, and an output is one chain over keys.
#pragma once

#include "vec.h"

#include <type_traits>

constexpr int KEYS = 64;

template <class T>
struct KeyBlock {
    int n;  // keys in this block, at most KEYS
    const T* keys[KEYS];
    const T* values[KEYS];
};

// Up to 16 queries; `q` [D / STEP][16]; o [D][16]. Starts with m = -infinity, l = 0, o = 0.
struct PanelState {
    float m[LANES], l[LANES];
    float* o;
};

template <int COUNT>
struct Sums {
    F v[COUNT];
    INLINE Sums operator+(const Sums& other) const {
        Sums r;
        for (int i = 0; i < COUNT; ++i) r.v[i] = v[i] + other.v[i];
        return r;
    }
};

template <class T, int COUNT, int L>
INLINE auto partial_scores(const uint32_t* q, int steps, const T* const* keys) {
    using P = Precision<T>;
    Sums<COUNT> sums;
    for (int i = 0; i < COUNT; ++i) sums.v[i] = set1(0.f);
    for (int s = L; s < steps; s += LANES) {
        auto x = P::template load<LANES>(q + s * LANES);
        for (int i = 0; i < COUNT; ++i)
            sums.v[i] = P::template mac<LANES>(sums.v[i], x, P::template spread<LANES>(keys[i] + s * P::STEP));
    }
    return sums;
}

template <class T, int COUNT, int STEPS>
static INLINE void panel_scores(const uint32_t* q, int d, const T* const* keys, float scale, float* scores) {
    const int steps = STEPS ? STEPS : d / Precision<T>::STEP;
    auto sums = tree_of<1, 0>([&](auto l) INLINE_LAMBDA { return partial_scores<T, COUNT, decltype(l)::value>(q, steps, keys); });
    for (int i = 0; i < COUNT; ++i) store(scores + i * LANES, sums.v[i] * set1(scale));
}

template <class T, int STEPS>
ONE_COPY void all_panel_scores(const uint32_t* q, int d, const KeyBlock<T>& block, float scale, float* scores) {
    constexpr int COUNT = NATIVE_LANES == 16 ? 4 : 1;
    int key = 0;
    for (; key + COUNT <= block.n; key += COUNT)
        panel_scores<T, COUNT, STEPS>(q, d, block.keys + key, scale, scores + key * LANES);
    for (; key < block.n; ++key) panel_scores<T, 1, STEPS>(q, d, block.keys + key, scale, scores + key * LANES);
}

// o[d ... d + 8][16] += values^T weights, after scaling by `correction`.
template <class T>
static INLINE void panel_values(const KeyBlock<T>& block, int d, const float* weights, F correction, float* o) {
    constexpr int COUNT = 8;
    F acc[COUNT];
    for (int i = 0; i < COUNT; ++i) acc[i] = load(o + (d + i) * LANES) * correction;
    for (int key = 0; key < block.n; ++key) {
        const F w = load(weights + key * LANES);
        const T* v = block.values[key] + d;
        if constexpr (std::is_same<T, float>::value)
            for (int i = 0; i < COUNT; ++i) acc[i] = fma(set1(v[i]), w, acc[i]);
        else
            for (int i = 0; i < COUNT; i += 2) {
                I pairs = Precision<bf16>::spread<LANES>(v + i);
                acc[i] = fma(even(pairs), w, acc[i]);
                acc[i + 1] = fma(odd(pairs), w, acc[i + 1]);
            }
    }
    for (int i = 0; i < COUNT; ++i) store(o + (d + i) * LANES, acc[i]);
}

// One block of keys for a panel of queries. `visible`: how many keys of the block each lane sees, or null for all.
template <class T>
ONE_COPY void attend_panel(const uint32_t* q, int d, const KeyBlock<T>& block, const int* visible, float scale,
                         PanelState& state) {
    alignas(64) float scores[KEYS * LANES];
    constexpr int STEP = Precision<T>::STEP;
    switch (d) {
        case 32: all_panel_scores<T, 32 / STEP>(q, d, block, scale, scores); break;
        case 64: all_panel_scores<T, 64 / STEP>(q, d, block, scale, scores); break;
        case 128: all_panel_scores<T, 128 / STEP>(q, d, block, scale, scores); break;
        default: all_panel_scores<T, 0>(q, d, block, scale, scores);
    }
    if (visible)
        for (int key = 0; key < block.n; ++key)
            for (int t = 0; t < LANES; ++t)
                scores[key * LANES + t] = key < visible[t] ? scores[key * LANES + t] : -INFINITY;
    const F before = load(state.m);
    F m = before;
    for (int key = 0; key < block.n; ++key) m = max(load(scores + key * LANES), m);
    const F correction = exponential(before - m);
    F sums[LANES];
    for (int i = 0; i < LANES; ++i) sums[i] = set1(0.f);
    for (int first = 0; first < block.n; first += LANES)
        for (int i = 0; i < LANES && first + i < block.n; ++i) {
            const F weight = exponential(load(scores + (first + i) * LANES) - m);
            store(scores + (first + i) * LANES, weight);
            sums[i] = sums[i] + weight;
        }
    const F sum = tree_of<1, 0>([&](auto l) INLINE_LAMBDA { return sums[decltype(l)::value]; });
    store(state.l, fma(load(state.l), correction, sum));
    store(state.m, m);
    for (int i = 0; i < d; i += 8) panel_values(block, i, scores, correction, state.o);
}

// -------------------------------------------------------------------------------------------------------- one query

constexpr int MAX_HEAD = 256;

// 16 steps of a row, zeros past its end.
template <class T>
INLINE typename Precision<T>::template Steps<LANES> row_steps(const T* row, int step, int steps) {
    const uint32_t* words = (const uint32_t*)row;
    if (step + LANES <= steps) return Precision<T>::template load<LANES>(words + step);
    uint32_t padded[LANES] = {};
    memcpy(padded, words + step, 4 * (steps - step));
    return Precision<T>::template load<LANES>(padded);
}

template <class T, int STEPS>
static INLINE void row_scores(const T* q, int d, const KeyBlock<T>& block, int first, float scale, float* scores) {
    using P = Precision<T>;
    const int steps = STEPS ? STEPS : d / P::STEP;
    F acc[LANES];
    for (int i = 0; i < LANES; ++i) {
        acc[i] = set1(0.f);
        const T* key = block.keys[std::min(first + i, block.n - 1)];
        for (int s = 0; s < steps; s += LANES) acc[i] = P::template mac<LANES>(acc[i], row_steps(q, s, steps), row_steps(key, s, steps));
    }
    store(scores + first, tree_sums(acc) * set1(scale));
}

// o [d] in row order; COUNT vectors of it.
template <int STEPS>
static INLINE void row_values(const KeyBlock<float>& block, int d, const float* weights, float correction, float* o) {
    const int steps = STEPS ? STEPS : d;
    for (int s = 0; s < steps; s += 4 * LANES) {
        const int count = std::min(4, (steps - s) / LANES);
        F acc[4];
        for (int i = 0; i < 4; ++i)
            if (i < count) acc[i] = load(o + s + i * LANES) * set1(correction);
        for (int key = 0; key < block.n; ++key) {
            const F w = set1(weights[key]);
            for (int i = 0; i < 4; ++i)
                if (i < count) acc[i] = fma(load(block.values[key] + s + i * LANES), w, acc[i]);
        }
        for (int i = 0; i < 4; ++i)
            if (i < count) store(o + s + i * LANES, acc[i]);
    }
}

// o: [steps] of the even elements, then [steps] of the odd ones, both padded to a multiple of 16.
template <int STEPS>
static INLINE void row_values(const KeyBlock<bf16>& block, int d, const float* weights, float correction, float* o) {
    const int steps = STEPS ? STEPS : d / 2, padded = (steps + LANES - 1) / LANES * LANES;
    for (int s = 0; s < steps; s += 2 * LANES) {
        const int count = std::min(2, (steps - s + LANES - 1) / LANES);
        F evens[2], odds[2];
        for (int i = 0; i < 2; ++i)
            if (i < count) {
                evens[i] = load(o + s + i * LANES) * set1(correction);
                odds[i] = load(o + padded + s + i * LANES) * set1(correction);
            }
        for (int key = 0; key < block.n; ++key) {
            const F w = set1(weights[key]);
            for (int i = 0; i < 2; ++i)
                if (i < count) {
                    const I pairs = row_steps(block.values[key], s + i * LANES, steps);
                    evens[i] = fma(even(pairs), w, evens[i]);
                    odds[i] = fma(odd(pairs), w, odds[i]);
                }
        }
        for (int i = 0; i < 2; ++i)
            if (i < count) {
                store(o + s + i * LANES, evens[i]);
                store(o + padded + s + i * LANES, odds[i]);
            }
    }
}

// One block of keys, all visible, for one query. `o` in the order of `row_values`.
template <class T, int STEPS>
ONE_COPY void attend_row(const T* q, int d, const KeyBlock<T>& block, float scale, float& m, float& l, float* o) {
    alignas(64) float scores[KEYS];
    F highest = set1(m), sums = set1(0.f);
    for (int first = 0; first < block.n; first += LANES) {
        row_scores<T, STEPS>(q, d, block, first, scale, scores);
        highest = max(load(scores + first), highest);  // the last key again where there is none
    }
    const float now = max_of(highest);
    float corrections[LANES];
    store(corrections, exponential(set1(m) - set1(now)));
    for (int first = 0; first < block.n; first += LANES) {
        for (int i = block.n - first; i < LANES; ++i) scores[first + i] = -INFINITY;
        const F weights = exponential(load(scores + first) - set1(now));
        store(scores + first, weights);
        sums = sums + weights;
    }
    l = fma(set1(l), set1(corrections[0]), set1(tree_sum(sums))).v[0][0];
    m = now;
    row_values<STEPS>(block, d, scores, corrections[0], o);
}

template <class T>
static void attend_row(const T* q, int d, const KeyBlock<T>& block, float scale, float& m, float& l, float* o) {
    constexpr int STEP = Precision<T>::STEP;
    switch (d) {
        case 32: return attend_row<T, 32 / STEP>(q, d, block, scale, m, l, o);
        case 64: return attend_row<T, 64 / STEP>(q, d, block, scale, m, l, o);
        case 128: return attend_row<T, 128 / STEP>(q, d, block, scale, m, l, o);
        default: return attend_row<T, 0>(q, d, block, scale, m, l, o);
    }
}

// Floats of the `o` of `attend_row`.
template <class T>
INLINE int row_width(int d) {
    return Precision<T>::STEP == 1 ? d : (d / 2 + LANES - 1) / LANES * LANES * 2;
}

// `o` of `attend_row` -> [d] in ascending order.
template <class T>
INLINE void row_order(const float* o, int d, float* row) {
    if (Precision<T>::STEP == 1) {
        memcpy(row, o, d * sizeof(float));
        return;
    }
    const int padded = row_width<T>(d) / 2;
    for (int i = 0; i < d / 2; ++i) row[2 * i] = o[i], row[2 * i + 1] = o[padded + i];
}

template <class T>
INLINE void from_row_order(const float* row, int d, float* o) {
    if (Precision<T>::STEP == 1) {
        memcpy(o, row, d * sizeof(float));
        return;
    }
    const int padded = row_width<T>(d) / 2;
    memset(o, 0, sizeof(float) * 2 * padded);
    for (int i = 0; i < d / 2; ++i) o[i] = row[2 * i], o[padded + i] = row[2 * i + 1];
}
