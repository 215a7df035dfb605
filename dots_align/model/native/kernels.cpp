// What a dots1 layer does between its matrix products, forward and backward, in fp32: see kernels.py.
#include "attend.h"
#include "norm.h"
#include "threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int NORM_ROWS = 128;  // of a unit

EXPORT void dots_attention(const AttentionShape* shape, const AttentionArrays* arrays, const OpenMP* openmp,
                           int backward) {
    each_unit(*openmp, shape->trees * shape->kv_heads,
              [&](int unit) { AttentionUnit(*shape, *arrays, unit, backward).run(); });
}

EXPORT void dots_norm(const float* x, const float* weight, int64_t rows, int64_t width, float eps, int rounded,
                      float* y, float* scales, const OpenMP* openmp) {
    each_unit(*openmp, (int)((rows + NORM_ROWS - 1) / NORM_ROWS), [&](int unit) {
        for (int64_t r = (int64_t)unit * NORM_ROWS; r < std::min(rows, (unit + 1) * (int64_t)NORM_ROWS); ++r) {
            scales[r] = inverse_rms(x + r * width, (int)width, eps);
            norm_row(x + r * width, weight, (int)width, scales[r], rounded, y + r * width);
        }
    });
}

// weight_grads: [units, width], each unit's part.
EXPORT void dots_norm_backward(const float* grad, const float* x, const float* weight, const float* scales,
                               int64_t rows, int64_t width, int rounded, float* x_grad, float* weight_grads,
                               const OpenMP* openmp) {
    each_unit(*openmp, (int)((rows + NORM_ROWS - 1) / NORM_ROWS), [&](int unit) {
        float* into = weight_grads + unit * width;
        std::fill_n(into, width, 0.f);
        for (int64_t r = (int64_t)unit * NORM_ROWS; r < std::min(rows, (unit + 1) * (int64_t)NORM_ROWS); ++r)
            norm_row_backward(grad + r * width, x + r * width, weight, (int)width, scales[r], rounded,
                              x_grad + r * width, into);
    });
}

// Rows of gate and up lie `distance` apart, those of y have no gaps.
EXPORT void dots_swiglu(const float* gate, const float* up, int64_t distance, int64_t rows, int64_t width, float* y,
                        const OpenMP* openmp) {
    each_unit(*openmp, (int)((rows + NORM_ROWS - 1) / NORM_ROWS), [&](int unit) {
        for (int64_t r = (int64_t)unit * NORM_ROWS; r < std::min(rows, (unit + 1) * (int64_t)NORM_ROWS); ++r)
            for (int64_t i = 0; i < width; i += LANES)
                store(y + r * width + i, silu(load(gate + r * distance + i)) * load(up + r * distance + i));
    });
}

EXPORT void dots_swiglu_backward(const float* grad, const float* gate, const float* up, int64_t distance, int64_t rows,
                                 int64_t width, float* gate_grad, float* up_grad, const OpenMP* openmp) {
    each_unit(*openmp, (int)((rows + NORM_ROWS - 1) / NORM_ROWS), [&](int unit) {
        for (int64_t r = (int64_t)unit * NORM_ROWS; r < std::min(rows, (unit + 1) * (int64_t)NORM_ROWS); ++r)
            for (int64_t i = 0; i < width; i += LANES) {
                const int64_t at = r * distance + i;
                const F g = load(grad + r * width + i), x = load(gate + at), one = set1(1.f), share = sigmoid(x);
                store(gate_grad + at, g * load(up + at) * share * fma(x, one - share, one));
                store(up_grad + at, g * x * share);
            }
    });
}

// y of a token: the sum of its `choices` rows of x, row places[choice, token], in order, each times its weight (1 where
// there are none).
EXPORT void dots_collect(const float* x, const int64_t* places, const float* weights, int64_t tokens, int64_t choices,
                         int64_t width, float* y, const OpenMP* openmp) {
    each_unit(*openmp, (int)((tokens + NORM_ROWS - 1) / NORM_ROWS), [&](int unit) {
        for (int64_t t = (int64_t)unit * NORM_ROWS; t < std::min(tokens, (unit + 1) * (int64_t)NORM_ROWS); ++t)
            for (int64_t i = 0; i < width; i += LANES) {
                F sum = set1(0.f);
                for (int64_t j = 0; j < choices; ++j)
                    sum = fma(load(x + places[j * tokens + t] * width + i),
                              set1(weights ? weights[t * choices + j] : 1.f), sum);
                store(y + t * width + i, sum);
            }
    });
}

EXPORT void dots_collect_backward(const float* grad, const float* x, const int64_t* places, const float* weights,
                                  int64_t tokens, int64_t choices, int64_t width, float* x_grad, float* weight_grads,
                                  const OpenMP* openmp) {
    each_unit(*openmp, (int)((tokens + NORM_ROWS - 1) / NORM_ROWS), [&](int unit) {
        for (int64_t t = (int64_t)unit * NORM_ROWS; t < std::min(tokens, (unit + 1) * (int64_t)NORM_ROWS); ++t)
            for (int64_t j = 0; j < choices; ++j) {
                const int64_t row = places[j * tokens + t] * width;
                F dots = set1(0.f);
                for (int64_t i = 0; i < width; i += LANES) {
                    const F g = load(grad + t * width + i);
                    dots = fma(g, load(x + row + i), dots);
                    store(x_grad + row + i, g * set1(weights[t * choices + j]));
                }
                weight_grads[t * choices + j] = tree_sum(dots);
            }
    });
}
