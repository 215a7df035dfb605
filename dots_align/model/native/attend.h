// Causal attention of packed segments with what comes before it in dots1 (RMSNorm of queries and keys, rotary
// positions), forward and backward. What lies in between stays in the cache: only the projections go in.
//
// A *tree* is a segment and those that continue it, each of which sees the whole of the first. A unit is one tree under
// one key-value head, so nothing is added up over units but the gradients of the two norms' weights.
#pragma once

#include "norm.h"
#include "product.h"

#include <algorithm>
#include <limits>
#include <vector>

constexpr int BLOCK_ROWS = 32;  // queries whose scores are there at one time

struct AttentionShape {
    const int64_t *bounds;    // [segments + 1]
    const int64_t *offsets;   // [trees + 1] of each tree in `members`
    const int64_t *members;   // segments, the continued one first
    int32_t trees, heads, kv_heads, dim, rounded;
    float scaling, eps;
};

struct AttentionArrays {
    const float *q, *k, *v, *q_weight, *k_weight, *cosines, *sines;  // [N, heads * dim] ..., [dim], [N, dim]
    float *out, *log_sums;                                           // [N, heads * dim], [N, heads]
    const float* grad;                                               // of out; from here on for backward only
    float *q_grad, *k_grad, *v_grad, *weight_grads;                  // the last [units, 2, dim]
};

class AttentionUnit {
    const AttentionShape& s;
    const AttentionArrays& a;
    const int tree, kv_head, D;
    const bool backward;
    const size_t q_width, kv_width;

    struct Keys {
        int begin, count, columns;  // columns: count rounded up to whole vectors
        std::vector<float> rows, turned, values_turned, grad, values_grad;
    };
    Keys shared, own;
    std::vector<float> queries, scores, score_grads, query_grads;

  public:
    AttentionUnit(const AttentionShape& s, const AttentionArrays& a, int unit, bool backward)
        : s(s), a(a), tree(unit / s.kv_heads), kv_head(unit % s.kv_heads), D(s.dim), backward(backward),
          q_width((size_t)s.heads * s.dim), kv_width((size_t)s.kv_heads * s.dim) {
        queries.resize(BLOCK_ROWS * D);
        query_grads.resize(BLOCK_ROWS * D);
        if (backward) std::fill_n(weight_grad(0), 2 * D, 0.f);
    }

    void run() {
        const int64_t* member = s.members + s.offsets[tree];
        const int count = (int)(s.offsets[tree + 1] - s.offsets[tree]);
        read(shared, member[0]);
        attend(nullptr, shared);
        for (int i = 1; i < count; ++i) {
            read(own, member[i]);
            attend(&shared, own);
            if (backward) finish(own);
        }
        if (backward) finish(shared);
    }

  private:
    float* weight_grad(int which) const {
        return a.weight_grads + ((size_t)(tree * s.kv_heads + kv_head) * 2 + which) * D;
    }
    const float* key_row(int token) const { return a.k + token * kv_width + kv_head * D; }
    const float* value_row(int token) const { return a.v + token * kv_width + kv_head * D; }

    // ----------------------------------------------------------------------------------------- norm and rotation

    void norm_and_turn(const float* x, const float* weight, int token, float factor, float* y) const {
        const int half = D / 2;
        const float *cosines = a.cosines + (size_t)token * D, *sines = a.sines + (size_t)token * D;
        const float scale = inverse_rms(x, D, s.eps);
        const F times = set1(factor);
        for (int i = 0; i < half; i += LANES) {
            const F low = load(weight + i) * normalised(load(x + i), scale, s.rounded);
            const F high = load(weight + half + i) * normalised(load(x + half + i), scale, s.rounded);
            store(y + i, (low * load(cosines + i) - high * load(sines + i)) * times);
            store(y + half + i, (high * load(cosines + half + i) + low * load(sines + half + i)) * times);
        }
    }

    // Overwrites `grad`, that of the turned row.
    void norm_and_turn_backward(float* grad, const float* x, const float* weight, int token, float* x_grad,
                                float* into) const {
        const int half = D / 2;
        const float *cosines = a.cosines + (size_t)token * D, *sines = a.sines + (size_t)token * D;
        for (int i = 0; i < half; i += LANES) {
            const F low = load(grad + i), high = load(grad + half + i);
            store(grad + i, low * load(cosines + i) + high * load(sines + half + i));
            store(grad + half + i, high * load(cosines + half + i) - low * load(sines + i));
        }
        norm_row_backward(grad, x, weight, D, inverse_rms(x, D, s.eps), s.rounded, x_grad, into);
    }

    // ------------------------------------------------------------------------------------------------------- keys

    void read(Keys& keys, int64_t segment) const {
        keys.begin = (int)s.bounds[segment];
        keys.count = (int)(s.bounds[segment + 1] - s.bounds[segment]);
        keys.columns = (keys.count + LANES - 1) / LANES * LANES;
        keys.rows.resize((size_t)keys.columns * D);
        for (int j = 0; j < keys.count; ++j)
            norm_and_turn(key_row(keys.begin + j), a.k_weight, keys.begin + j, 1.f, &keys.rows[(size_t)j * D]);
        turn(keys.rows.data(), D, keys, keys.turned);
        if (!backward) return;
        turn(value_row(keys.begin), kv_width, keys, keys.values_turned);
        keys.grad.assign((size_t)keys.count * D, 0.f);
        keys.values_grad.assign((size_t)keys.count * D, 0.f);
    }

    // [count, D] -> [D, columns], zero where there is no key
    void turn(const float* rows, size_t distance, const Keys& keys, std::vector<float>& turned) const {
        turned.resize((size_t)keys.columns * D);
        std::vector<uint32_t> panel((size_t)D * LANES);
        for (int j = 0; j < keys.columns; j += LANES) {
            const int lanes = std::min(LANES, keys.count - j);
            const void* from[LANES];
            for (int l = 0; l < lanes; ++l) from[l] = rows + (j + l) * distance;
            rows_to_panel(from, lanes, D, panel.data());
            for (int d = 0; d < D; ++d) {
                float* to = &turned[(size_t)d * keys.columns + j];
                memcpy(to, &panel[(size_t)d * LANES], LANES * sizeof(float));
                for (int l = lanes; l < LANES; ++l) to[l] = 0.f;
            }
        }
    }

    void finish(Keys& keys) const {
        for (int j = 0; j < keys.count; ++j) {
            const int token = keys.begin + j;
            const size_t at = token * kv_width + kv_head * D;
            norm_and_turn_backward(&keys.grad[(size_t)j * D], key_row(token), a.k_weight, token, a.k_grad + at,
                                   weight_grad(1));
            memcpy(a.v_grad + at, &keys.values_grad[(size_t)j * D], D * sizeof(float));
        }
    }

    // -------------------------------------------------------------------------------------------------- attention

    struct Block {
        int head, token, first, rows;     // the first query's place in the batch and in its segment
        int before, columns;              // columns of the shared keys, and of all keys that may be seen
    };

    void attend(Keys* before, Keys& keys) {
        const int group = s.heads / s.kv_heads;
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
            for (int first = 0; first < keys.count; first += BLOCK_ROWS) {
                const int rows = std::min(BLOCK_ROWS, keys.count - first);
                const int seen = (first + rows + LANES - 1) / LANES * LANES;
                const int shared_columns = before ? before->columns : 0;
                const Block block{head, keys.begin + first, first, rows, shared_columns, shared_columns + seen};
                score(block, before, keys);
                if (backward)
                    block_backward(block, before, keys);
                else
                    block_forward(block, before, keys);
            }
    }

    const float* query_row(const Block& b, int i) const { return a.q + (b.token + i) * q_width + b.head * D; }
    size_t out_at(const Block& b, int i) const { return (b.token + i) * q_width + b.head * D; }
    float* score_row(const Block& b, int i) { return &scores[(size_t)i * b.columns]; }

    // Scores of the block's queries, -infinity where there is no key or it may not be seen.
    void score(const Block& b, const Keys* before, const Keys& keys) {
        for (int i = 0; i < b.rows; ++i)
            norm_and_turn(query_row(b, i), a.q_weight, b.token + i, s.scaling, &queries[(size_t)i * D]);
        scores.resize((size_t)BLOCK_ROWS * b.columns);
        const Matrix q{queries.data(), (size_t)D, 1};
        if (before)
            product(q, b.rows, D, before->turned.data(), before->columns, b.before, score_row(b, 0), b.columns, false);
        product(q, b.rows, D, keys.turned.data(), keys.columns, b.columns - b.before, score_row(b, 0) + b.before,
                b.columns, false);
        const float never = -std::numeric_limits<float>::infinity();
        for (int i = 0; i < b.rows; ++i) {
            if (before) std::fill(score_row(b, i) + before->count, score_row(b, i) + b.before, never);
            std::fill(score_row(b, i) + b.before + b.first + i + 1, score_row(b, i) + b.columns, never);
        }
    }

    // c [rows, D] = m [rows, keys] times the rows of the keys (or of what else they have)
    template <class Of>
    void gather(const Block& b, const float* m, const Keys* before, const Keys& keys, const Of& of, float* c,
                size_t ldc) const {
        const int seen = b.first + b.rows;
        if (before)
            product({m, (size_t)b.columns, 1}, b.rows, before->count, of(*before).first, of(*before).second, D, c, ldc,
                    false);
        product({m + b.before, (size_t)b.columns, 1}, b.rows, seen, of(keys).first, of(keys).second, D, c, ldc,
                before != nullptr);
    }

    void block_forward(const Block& b, const Keys* before, const Keys& keys) {
        for (int i = 0; i < b.rows; ++i) {
            float* row = score_row(b, i);
            F best = load(row), total = set1(0.f);
            for (int j = LANES; j < b.columns; j += LANES) best = max(load(row + j), best);
            const float highest = max_of(best);
            for (int j = 0; j < b.columns; j += LANES) {
                const F weight = exponential(load(row + j) - set1(highest));
                store(row + j, weight);
                total = total + weight;
            }
            const float sum = tree_sum(total);
            a.log_sums[(size_t)(b.token + i) * s.heads + b.head] = highest + std::log(sum);
            for (int j = 0; j < b.columns; j += LANES) store(row + j, load(row + j) / set1(sum));
        }
        const auto values = [&](const Keys& k) { return std::make_pair(value_row(k.begin), kv_width); };
        gather(b, score_row(b, 0), before, keys, values, a.out + out_at(b, 0), q_width);
    }

    void block_backward(const Block& b, Keys* before, Keys& keys) {
        const float* grad = a.grad + out_at(b, 0);
        score_grads.resize((size_t)BLOCK_ROWS * b.columns);
        float* d = score_grads.data();
        if (before)
            product({grad, q_width, 1}, b.rows, D, before->values_turned.data(), before->columns, b.before, d,
                    b.columns, false);
        product({grad, q_width, 1}, b.rows, D, keys.values_turned.data(), keys.columns, b.columns - b.before,
                d + b.before, b.columns, false);
        for (int i = 0; i < b.rows; ++i) weigh(b, i, d + (size_t)i * b.columns);
        const auto rows = [&](const Keys& k) { return std::make_pair(k.rows.data(), (size_t)D); };
        gather(b, d, before, keys, rows, query_grads.data(), D);
        for (int i = 0; i < b.rows; ++i) {
            float* row = &query_grads[(size_t)i * D];
            for (int x = 0; x < D; x += LANES) store(row + x, load(row + x) * set1(s.scaling));
            norm_and_turn_backward(row, query_row(b, i), a.q_weight, b.token + i, a.q_grad + out_at(b, i),
                                   weight_grad(0));
        }
        if (before) spread(b, d, 0, before->count, *before);
        spread(b, d, b.before, b.first + b.rows, keys);
    }

    // Turns a row of scores into weights, and of their gradients into those of the scores.
    void weigh(const Block& b, int i, float* d) {
        const float *grad = a.grad + out_at(b, i), *out = a.out + out_at(b, i);
        F dots = set1(0.f);
        for (int x = 0; x < D; x += LANES) dots = fma(load(grad + x), load(out + x), dots);
        const F mean = set1(tree_sum(dots));
        const F log_sum = set1(a.log_sums[(size_t)(b.token + i) * s.heads + b.head]);
        float* row = score_row(b, i);
        for (int j = 0; j < b.columns; j += LANES) {
            const F weight = exponential(load(row + j) - log_sum);
            store(row + j, weight);
            store(d + j, weight * (load(d + j) - mean));
        }
    }

    // Adds the block's part to the gradients of `count` keys and values, whose columns begin at `column`.
    void spread(const Block& b, const float* d, int column, int count, Keys& keys) {
        product({d + column, 1, (size_t)b.columns}, count, b.rows, queries.data(), D, D, keys.grad.data(), D, true);
        product({score_row(b, 0) + column, 1, (size_t)b.columns}, count, b.rows, a.grad + out_at(b, 0), q_width, D,
                keys.values_grad.data(), D, true);
    }
};
