// Matrix products with sixteen tokens in the lanes of a vector.
//
// Activations lie in *panels* of 16 tokens, [k steps][16 lanes] of 32 bits; weights are read in place, [out, in] row by
// row, one number (or bf16 pair) at a time, spread over the lanes. An output is one chain of multiply-adds over k in
// ascending order, whatever the tile, the block or the number of tokens, so its bits do not depend on them. There is
// nothing to pack and no sum over lanes.
#pragma once

#include "vec.h"

#include <algorithm>

#if NATIVE_LANES == 16
constexpr int TILE_ROWS = 8, TILE_PANELS = 3;
#else
constexpr int TILE_ROWS = 4, TILE_PANELS = 1;
#endif
constexpr int K_BLOCK = 1024;     // steps of k whose panels of one token block stay in the L2 cache
constexpr int BLOCK_PANELS = 6;   // panels of a token block

constexpr int LINE = 16;          // steps of a row in a cache line

// NR weight rows times NP panels and, with HALF, 8 lanes of one more. c: [panel][.][16], rows 16 floats apart.
// `fetch`: bring the next NR rows into the cache meanwhile (weights come from memory, and a row is too short for the
// hardware to notice).
template <class T, int NR, int NP, bool HALF>
ONE_COPY void tile(const T* w, size_t ldw, const uint32_t* x, size_t x_panel, int begin, int end, bool fetch,
                 float* c, size_t c_panel) {
    using P = Precision<T>;
    constexpr int NH = HALF ? 1 : 0;
    Floats<16> acc[NR][NP + 1];
    Floats<8> half[NR];
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < NP; ++p)
            acc[r][p] = begin == 0 ? splat<16>(0.f) : load_floats<16>(c + p * c_panel + r * LANES);
        if (HALF) half[r] = begin == 0 ? splat<8>(0.f) : load_floats<8>(c + NP * c_panel + r * LANES);
    }
    for (int line = begin; line < end; line += LINE) {
        if (fetch)
#pragma GCC unroll 8
            for (int r = 0; r < NR; ++r) __builtin_prefetch((const uint32_t*)(w + (NR + r) * ldw) + line, 0, 2);
        const int stop = std::min(end, line + LINE);
        for (int k = line; k < stop; ++k) {
            typename P::template Steps<16> xs[NP + 1];
            typename P::template Steps<8> xh;
#pragma GCC unroll 4
            for (int p = 0; p < NP; ++p) xs[p] = P::template load<16>(x + p * x_panel + (size_t)k * LANES);
            if (HALF) xh = P::template load<8>(x + NP * x_panel + (size_t)k * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < NR; ++r) {
                const T* at = w + r * ldw + (size_t)k * P::STEP;
                if constexpr (NP > 0) {
                    const auto spread = P::template spread<16>(at);
#pragma GCC unroll 4
                    for (int p = 0; p < NP; ++p) acc[r][p] = P::template mac<16>(acc[r][p], xs[p], spread);
                    // Spreading fp32 is free (part of the multiply-add), spreading bf16 pairs is not.
                    if constexpr (HALF && P::STEP == 2) half[r] = P::template mac<8>(half[r], xh, lower(spread));
                }
                if constexpr (HALF && (NP == 0 || P::STEP == 1))
                    half[r] = P::template mac<8>(half[r], xh, P::template spread<8>(at));
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < NP; ++p) store(c + p * c_panel + r * LANES, acc[r][p]);
        if (HALF) store(c + NP * c_panel + r * LANES, half[r]);
    }
}

template <class T, int NR>
static void tiles(const T* w, size_t ldw, const uint32_t* x, size_t x_panel, int panels, bool half, int begin, int end,
                  float* c, size_t c_panel) {
    bool fetch = true;
    while (panels > 0 || half) {
        int now = panels > TILE_PANELS && panels < 2 * TILE_PANELS ? (panels + 1) / 2 : std::min(panels, TILE_PANELS);
        const bool with_half = half && now == panels && now < TILE_PANELS;
        const auto run = [&](auto np) {
            constexpr int NP = std::min(decltype(np)::value, TILE_PANELS);
            if constexpr (NP < TILE_PANELS)
                if (with_half) return tile<T, NR, NP, true>(w, ldw, x, x_panel, begin, end, fetch, c, c_panel);
            if constexpr (NP > 0) tile<T, NR, NP, false>(w, ldw, x, x_panel, begin, end, fetch, c, c_panel);
        };
        switch (now) {
            case 0: run(std::integral_constant<int, 0>()); break;
            case 1: run(std::integral_constant<int, 1>()); break;
            case 2: run(std::integral_constant<int, 2>()); break;
            default: run(std::integral_constant<int, 3>());
        }
        panels -= now;
        half = half && !with_half;
        x += now * x_panel;
        c += now * c_panel;
        fetch = false;
    }
}

// c [panel][rows][16] = weights [rows, k] times the panels of `tokens` tokens. `x_panel`, `c_panel`: distance of panels
// in words.
template <class T>
static void gemm(const T* w, size_t ldw, int rows, const uint32_t* x, size_t x_panel, int tokens, float* c,
                 size_t c_panel) {
    const int steps = (int)(ldw / Precision<T>::STEP), rest = tokens % LANES;
    const int panels = tokens / LANES + (rest > LANES / 2);
    const bool half = rest > 0 && rest <= LANES / 2;
    for (int begin = 0; begin == 0 || begin < steps; begin += K_BLOCK) {
        const int end = std::min(steps, begin + K_BLOCK);
        int r = 0;
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
            tiles<T, TILE_ROWS>(w + r * ldw, ldw, x, x_panel, panels, half, begin, end, c + r * LANES, c_panel);
        for (; r < rows; ++r)
            tiles<T, 1>(w + r * ldw, ldw, x, x_panel, panels, half, begin, end, c + r * LANES, c_panel);
    }
}
