// RMSNorm of a row, as transformers' dots1 has it: the normalised row is rounded to the input's dtype, then weighted.
#pragma once

#include "vec.h"

#include <cmath>

static INLINE F normalised(F x, float scale, bool rounded) {
    const F found = x * set1(scale);
    return rounded ? round_bf16(found) : found;
}

template <class X>
static float inverse_rms(const X* x, int width, float eps) {
    F squares = set1(0.f);
    for (int i = 0; i < width; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    return 1.f / std::sqrt(tree_sum(squares) / width + eps);
}

template <class X, class Y>
static void norm_row(const X* x, const float* weight, int width, float scale, bool rounded, Y* y) {
    for (int i = 0; i < width; i += LANES) store(y + i, load(weight + i) * normalised(load(x + i), scale, rounded));
}

// From the gradient of y to that of x, which may be the same place; adds to that of the weight.
template <class Y, class X>
static void norm_row_backward(const Y* grad, const X* x, const float* weight, int width, float scale, bool rounded,
                              X* x_grad, float* weight_grad) {
    F dots = set1(0.f);
    for (int i = 0; i < width; i += LANES) dots = fma(load(grad + i) * load(weight + i), load(x + i), dots);
    const F pull = set1(tree_sum(dots) * scale * scale / width);  // times x: the part along the normalised row
    for (int i = 0; i < width; i += LANES) {
        const F g = load(grad + i), own = load(x + i);
        store(weight_grad + i, fma(g, normalised(own, scale, rounded), load(weight_grad + i)));
        store(x_grad + i, (g * load(weight + i) - own * pull) * set1(scale));
    }
}
