// What a dots1 layer does between its matrix products, forward and backward, in fp32: see kernels.py.
#include "attend.h"
#include "norm.h"
#include "threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int UNIT_ROWS = 128;

// Calls fn with null pointers whose types say what lies in memory: fp32, or bf16 where the flag is set.
template <class Fn>
static void of_type(int is_bf16, const Fn& fn) {
    is_bf16 ? fn((bf16*)nullptr) : fn((float*)nullptr);
}

// fn(row, unit) of every row, the rows of a unit in order.
template <class Fn>
static void each_row(const OpenMP& openmp, int64_t rows, const Fn& fn) {
    each_unit(openmp, (int)((rows + UNIT_ROWS - 1) / UNIT_ROWS), [&](int unit) {
        for (int64_t r = (int64_t)unit * UNIT_ROWS; r < std::min(rows, (unit + 1) * (int64_t)UNIT_ROWS); ++r)
            fn(r, unit);
    });
}

EXPORT void dots_attention(const AttentionShape* shape, const AttentionArrays* arrays, const OpenMP* openmp,
                           int backward) {
    each_unit(*openmp, shape->trees * shape->kv_heads,
              [&](int unit) { AttentionUnit(*shape, *arrays, unit, backward).run(); });
}

EXPORT void dots_norm(const void* x, const float* weight, int64_t rows, int64_t width, float eps, int x_bf16,
                      int y_bf16, void* y, float* scales, const OpenMP* openmp) {
    of_type(x_bf16, [&](auto* of_x) {
        of_type(y_bf16, [&](auto* of_y) {
            const auto from = (decltype(of_x))x;
            const auto to = (decltype(of_y))y;
            each_row(*openmp, rows, [&](int64_t r, int) {
                scales[r] = inverse_rms(from + r * width, (int)width, eps);
                norm_row(from + r * width, weight, (int)width, scales[r], x_bf16, to + r * width);
            });
        });
    });
}

// weight_grads: [units, width], each unit's part.
EXPORT void dots_norm_backward(const void* grad, const void* x, const float* weight, const float* scales, int64_t rows,
                               int64_t width, int x_bf16, int y_bf16, void* x_grad, float* weight_grads,
                               const OpenMP* openmp) {
    of_type(x_bf16, [&](auto* of_x) {
        of_type(y_bf16, [&](auto* of_y) {
            const auto from = (decltype(of_x))x, to = (decltype(of_x))x_grad;
            const auto of_out = (decltype(of_y))grad;
            each_row(*openmp, rows, [&](int64_t r, int unit) {
                float* into = weight_grads + unit * width;
                if (r % UNIT_ROWS == 0) std::fill_n(into, width, 0.f);
                norm_row_backward(of_out + r * width, from + r * width, weight, (int)width, scales[r], x_bf16,
                                  to + r * width, into);
            });
        });
    });
}

// Rows of gate and up lie `distance` apart, those of y have no gaps.
EXPORT void dots_swiglu(const void* gate, const void* up, int64_t distance, int64_t rows, int64_t width, int is_bf16,
                        void* y, const OpenMP* openmp) {
    of_type(is_bf16, [&](auto* type) {
        const auto g = (decltype(type))gate, u = (decltype(type))up, to = (decltype(type))y;
        each_row(*openmp, rows, [&](int64_t r, int) {
            for (int64_t i = 0; i < width; i += LANES)
                store(to + r * width + i, silu(load(g + r * distance + i)) * load(u + r * distance + i));
        });
    });
}

EXPORT void dots_swiglu_backward(const void* grad, const void* gate, const void* up, int64_t distance, int64_t rows,
                                 int64_t width, int is_bf16, void* gate_grad, void* up_grad, const OpenMP* openmp) {
    of_type(is_bf16, [&](auto* type) {
        using T = decltype(type);
        each_row(*openmp, rows, [&](int64_t r, int) {
            for (int64_t i = 0; i < width; i += LANES) {
                const int64_t at = r * distance + i;
                const F g = load((T)grad + r * width + i), x = load((T)gate + at), one = set1(1.f), share = sigmoid(x);
                store((T)gate_grad + at, g * load((T)up + at) * share * fma(x, one - share, one));
                store((T)up_grad + at, g * x * share);
            }
        });
    });
}

// y of a token: the sum of its `choices` rows of x, row places[choice, token], in order, each times its weight (1 where
// there are none).
EXPORT void dots_collect(const void* x, const int64_t* places, const float* weights, int64_t tokens, int64_t choices,
                         int64_t width, int is_bf16, float* y, const OpenMP* openmp) {
    of_type(is_bf16, [&](auto* type) {
        const auto from = (decltype(type))x;
        each_row(*openmp, tokens, [&](int64_t t, int) {
            for (int64_t i = 0; i < width; i += LANES) {
                F sum = set1(0.f);
                for (int64_t j = 0; j < choices; ++j)
                    sum = fma(load(from + places[j * tokens + t] * width + i),
                              set1(weights ? weights[t * choices + j] : 1.f), sum);
                store(y + t * width + i, sum);
            }
        });
    });
}

EXPORT void dots_collect_backward(const void* grad, const void* x, const int64_t* places, const float* weights,
                                  int64_t tokens, int64_t choices, int64_t width, int is_bf16, void* x_grad,
                                  float* weight_grads, const OpenMP* openmp) {
    of_type(is_bf16, [&](auto* type) {
        using T = decltype(type);
        each_row(*openmp, tokens, [&](int64_t t, int) {
            for (int64_t j = 0; j < choices; ++j) {
                const int64_t row = places[j * tokens + t] * width;
                F dots = set1(0.f);
                for (int64_t i = 0; i < width; i += LANES) {
                    const F g = load((T)grad + t * width + i);
                    dots = fma(g, load((T)x + row + i), dots);
                    store((T)x_grad + row + i, g * set1(weights[t * choices + j]));
                }
                weight_grads[t * choices + j] = tree_sum(dots);
            }
        });
    });
}
