// The router of one panel of tokens: fp32 scores, the choice of experts, the gates.
#pragma once

#include "gemm.h"
#include "model.h"

#include <limits>

// sigmoid(weight x) -> scores [experts][16]
inline void router_scores(const void* weight, bool is_bf16, int experts, int hidden, const float* x, float* scores,
                          Buffer& scratch) {
    const uint32_t* panel = (const uint32_t*)x;
    if (!is_bf16)
        gemm((const float*)weight, hidden, experts, panel, 0, LANES, scores, 0);
    else {
        constexpr int ROWS = 16;
        float* rows = scratch.get<float>((size_t)ROWS * hidden);
        for (int e = 0; e < experts; e += ROWS) {
            const int count = std::min(ROWS, experts - e);
            for (size_t i = 0; i < (size_t)count * hidden; ++i) rows[i] = to_float(((const bf16*)weight)[(size_t)e * hidden + i]);
            gemm(rows, hidden, count, panel, 0, LANES, scores + e * LANES, 0);
        }
    }
    for (int e = 0; e < experts; ++e) store(scores + e * LANES, sigmoid(load(scores + e * LANES)));
}

// torch.topk's choice where scores are equal: it follows from its algorithm on a CPU, which is repeated here.
inline void choose_as_torch(const float* choice, int experts, int k, int lane, int32_t* ids) {
    std::vector<std::pair<float, int>> queue(experts);
    for (int e = 0; e < experts; ++e) queue[e] = {choice[e * LANES + lane], e};
    const auto before = [](const std::pair<float, int>& a, const std::pair<float, int>& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
    if (k * 64 <= experts)
        std::partial_sort(queue.begin(), queue.begin() + k, queue.end(), before);
    else
        std::nth_element(queue.begin(), queue.begin() + k - 1, queue.end(), before);
    std::stable_sort(queue.begin(), queue.begin() + k, before);
    for (int j = 0; j < k; ++j) ids[j] = queue[j].second;
}

// scores [2 experts][16], the second half is overwritten; -> ids, gates [lanes, k], by falling score + bias.
inline void choose_experts(float* scores, const float* bias, int experts, int k, int lanes, bool normalise, float scale,
                           int32_t* ids, float* gates) {
    float* choice = scores + (size_t)experts * LANES;
    for (int e = 0; e < experts; ++e) store(choice + e * LANES, load(scores + e * LANES) + set1(bias[e]));
    std::vector<int32_t> best((k + 1) * LANES);
    std::vector<float> values((k + 1) * LANES);
    const int places = std::min(k + 1, experts);
    for (int j = 0; j < places; ++j) {
        float top[LANES];
        int32_t id[LANES];
        for (int t = 0; t < LANES; ++t) top[t] = -std::numeric_limits<float>::infinity(), id[t] = -1;
        for (int e = 0; e < experts; ++e)
            for (int t = 0; t < LANES; ++t) {
                const bool better = choice[e * LANES + t] > top[t];
                top[t] = better ? choice[e * LANES + t] : top[t];
                id[t] = better ? e : id[t];
            }
        for (int t = 0; t < LANES; ++t) {
            best[j * LANES + t] = id[t];
            values[j * LANES + t] = top[t];
            if (id[t] >= 0) choice[id[t] * LANES + t] = -std::numeric_limits<float>::infinity();
        }
    }
    for (int t = 0; t < lanes; ++t) {
        bool unclear = places > k && values[k * LANES + t] == values[(k - 1) * LANES + t];
        for (int j = 0; j < k; ++j) {
            ids[t * k + j] = best[j * LANES + t];
            unclear = unclear || ids[t * k + j] < 0;  // NaN
        }
        if (unclear) {
            for (int e = 0; e < experts; ++e) choice[e * LANES + t] = scores[e * LANES + t] + bias[e];
            choose_as_torch(choice, experts, k, t, ids + t * k);
        }
        float sum = 0.f;
        for (int j = 0; j < k; ++j) sum += gates[t * k + j] = scores[ids[t * k + j] * LANES + t];
        for (int j = 0; j < k; ++j) gates[t * k + j] = (normalise ? gates[t * k + j] / (sum + 1e-20f) : gates[t * k + j]) * scale;
    }
}
