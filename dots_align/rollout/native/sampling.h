// Drawing tokens: the inverse of the cumulative distribution at a counter-based uniform number, as in sampling.py.
#pragma once

#include "model.h"

struct SamplingArrays {
    const float* logits;       // [rows, vocab]
    const float* temperature;  // [rows]; 0 is greedy
    const int64_t *keys, *positions;
    int64_t* tokens;  // [rows]; -1 where a logit is NaN
    float *rollout_logprobs, *logprobs;
    int32_t rows, vocab;
};

inline uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

inline double uniform(int64_t key, int64_t position) {
    return (double)(splitmix64((uint64_t)key + (uint64_t)position * 0x9E3779B97F4A7C15u) >> 11) / 9007199254740992.0;
}

constexpr int CHUNK = 256;  // entries whose weights are summed in fp32

// exp((logits - highest) * scale) of `count` entries into `weights`, whose sum is returned.
inline double weights_of(const float* logits, int count, float highest, float scale, float* weights) {
    F sums = set1(0.f);
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const F w = exponential((load(logits + i) - set1(highest)) * set1(scale));
        store(weights + i, w);
        sums = sums + w;
    }
    if (i < count) {
        float rest[LANES];
        for (int j = 0; j < LANES; ++j) rest[j] = i + j < count ? logits[i + j] : -INFINITY;
        const F w = exponential((load(rest) - set1(highest)) * set1(scale));
        store(rest, w);
        memcpy(weights + i, rest, (count - i) * sizeof(float));
        sums = sums + w;
    }
    return tree_sum(sums);
}

// The first entry whose cumulative weight exceeds `target`, else the last one with weight.
inline int invert(const SamplingArrays& a, const float* logits, float highest, float scale, const double* sums,
                  double target) {
    float weights[CHUNK];
    double before = 0;
    int drawn = -1;
    for (int chunk = 0; chunk * CHUNK < a.vocab; ++chunk) {
        const int first = chunk * CHUNK, count = std::min(CHUNK, a.vocab - first);
        if (before + sums[chunk] <= target && first + CHUNK < a.vocab && drawn >= 0) {
            before += sums[chunk];
            continue;
        }
        weights_of(logits + first, count, highest, scale, weights);
        double within = before;
        for (int i = 0; i < count; ++i) {
            if (weights[i] > 0) drawn = first + i;
            within += weights[i];
            if (within > target && weights[i] > 0) return drawn;
        }
        before += sums[chunk];
    }
    return drawn;
}

inline void sample_row(const SamplingArrays& a, int row, Buffer& scratch) {
    const float* logits = a.logits + (size_t)row * a.vocab;
    float highest = -INFINITY;
    bool valid = true;
    int argmax = 0;
    for (int i = 0; i < a.vocab; ++i) {
        valid = valid && logits[i] == logits[i];
        if (logits[i] > highest) highest = logits[i], argmax = i;
    }
    if (!valid || std::isinf(highest)) {
        a.tokens[row] = -1;
        a.rollout_logprobs[row] = a.logprobs[row] = NAN;
        return;
    }
    const int chunks = (a.vocab + CHUNK - 1) / CHUNK;
    double* sums = scratch.get<double>(chunks);
    const bool greedy = a.temperature[row] == 0.f;
    const float scale = greedy ? 1.f : 1.f / a.temperature[row];
    float weights[CHUNK];
    double total = 0, total_model = 0;
    for (int c = 0; c < chunks; ++c) {
        const int count = std::min(CHUNK, a.vocab - c * CHUNK);
        total += sums[c] = weights_of(logits + c * CHUNK, count, highest, scale, weights);
        if (scale != 1.f) total_model += weights_of(logits + c * CHUNK, count, highest, 1.f, weights);
    }
    if (scale == 1.f) total_model = total;
    const int token = greedy ? argmax : invert(a, logits, highest, scale, sums, uniform(a.keys[row], a.positions[row]) * total);
    a.tokens[row] = token;
    const double shifted = (double)logits[token] - highest;
    a.rollout_logprobs[row] = greedy ? 0.f : (float)(shifted / a.temperature[row] - std::log(total));
    a.logprobs[row] = (float)(shifted - std::log(total_model));
}
