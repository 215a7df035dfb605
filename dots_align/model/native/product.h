// Small matrix products: c [rows, columns] = (c +) a [rows, depth] times b [depth, columns].
//
// b and c lie row by row, `columns` is a multiple of 16; `a` has any strides, so a transposed one costs nothing. An
// output is one chain of multiply-adds in ascending order.
#pragma once

#include "vec.h"

#if NATIVE_LANES == 16
constexpr int PRODUCT_ROWS = 8, PRODUCT_VECTORS = 2;
#else
constexpr int PRODUCT_ROWS = 4, PRODUCT_VECTORS = 1;
#endif

struct Matrix {
    const float* at;
    size_t row, step;  // distances of neighbours in a column, and in a row
};

template <int R, int C>
ONE_COPY void product_tile(Matrix a, const float* b, size_t ldb, int depth, float* c, size_t ldc, bool add) {
    F acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < C; ++v) acc[r][v] = add ? load(c + r * ldc + v * LANES) : set1(0.f);
    for (int k = 0; k < depth; ++k) {
        F from[C];
#pragma GCC unroll 2
        for (int v = 0; v < C; ++v) from[v] = load(b + k * ldb + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F factor = set1(a.at[r * a.row + k * a.step]);
#pragma GCC unroll 2
            for (int v = 0; v < C; ++v) acc[r][v] = fma(factor, from[v], acc[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < C; ++v) store(c + r * ldc + v * LANES, acc[r][v]);
}

template <int R>
static void product_rows(Matrix a, const float* b, size_t ldb, int depth, int columns, float* c, size_t ldc, bool add) {
    int done = 0;
    for (; done + PRODUCT_VECTORS * LANES <= columns; done += PRODUCT_VECTORS * LANES)
        product_tile<R, PRODUCT_VECTORS>(a, b + done, ldb, depth, c + done, ldc, add);
    for (; done < columns; done += LANES) product_tile<R, 1>(a, b + done, ldb, depth, c + done, ldc, add);
}

static void product(Matrix a, int rows, int depth, const float* b, size_t ldb, int columns, float* c, size_t ldc,
                    bool add) {
    const auto step = [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (; rows >= R; rows -= R, a.at += R * a.row, c += R * ldc)
            product_rows<R>(a, b, ldb, depth, columns, c, ldc, add);
    };
    step(std::integral_constant<int, PRODUCT_ROWS>());
    step(std::integral_constant<int, PRODUCT_ROWS / 2>());
    step(std::integral_constant<int, 1>());
}
