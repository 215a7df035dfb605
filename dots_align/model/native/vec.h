// Sixteen-lane vectors over whatever the machine has (AVX-512, AVX2, NEON, or nothing), and what is built from them.
//
// A lane never looks at another lane, except in transpositions and in `tree_sums`, whose order is fixed. That is what
// makes a token's numbers independent of the tokens computed beside it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define NATIVE_LANES 16
#elif defined(__AVX2__)
#define NATIVE_LANES 8
#else
#define NATIVE_LANES 4
#endif

#define INLINE inline __attribute__((always_inline))
// Specialising a hot loop for arguments known at some calls would only multiply it.
#if defined(__clang__)
#define ONE_COPY static __attribute__((noinline))
#else
#define ONE_COPY static __attribute__((noinline, noclone))
#endif
#define INLINE_LAMBDA __attribute__((always_inline))

struct bf16 {
    uint16_t bits;
};

constexpr int LANES = 16;

template <int W>
struct Native {
    typedef float F __attribute__((vector_size(4 * W)));
    typedef int32_t I __attribute__((vector_size(4 * W)));
};

template <int N>
struct Floats {
    static constexpr int W = N < NATIVE_LANES ? N : NATIVE_LANES, C = N / W;
    typedef typename Native<W>::F V;
    V v[C];
};

template <int N>
struct Ints {
    static constexpr int W = N < NATIVE_LANES ? N : NATIVE_LANES, C = N / W;
    typedef typename Native<W>::I V;
    V v[C];
};

using F = Floats<LANES>;
using I = Ints<LANES>;

// ------------------------------------------------------------------------------------------------- native operations

template <class V>
INLINE V native_fma(V a, V b, V c) {
#if defined(__FMA__) || defined(__AVX512F__)
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
    if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    if constexpr (sizeof(V) == 16) return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(__ARM_NEON)
    if constexpr (sizeof(V) == 16) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
    return a * b + c;
}

#define EACH for (int i = 0; i < C; ++i)

template <int N>
INLINE Floats<N> splat(float x) {
    Floats<N> r;
    for (int i = 0; i < r.C; ++i) r.v[i] = x - (typename Floats<N>::V){};
    return r;
}
template <int N>
INLINE Ints<N> splat_int(int32_t x) {
    Ints<N> r;
    for (int i = 0; i < r.C; ++i) r.v[i] = x - (typename Ints<N>::V){};
    return r;
}
template <int N>
INLINE Floats<N> load_floats(const float* p) {
    Floats<N> r;
    memcpy(&r, p, sizeof r);
    return r;
}
template <int N>
INLINE Ints<N> load_ints(const void* p) {
    Ints<N> r;
    memcpy(&r, p, sizeof r);
    return r;
}
template <int N>
INLINE void store(void* p, Floats<N> x) {
    memcpy(p, &x, sizeof x);
}
template <int N>
INLINE void store(void* p, Ints<N> x) {
    memcpy(p, &x, sizeof x);
}
// The first eight lanes.
template <template <int> class Lanes>
INLINE Lanes<8> lower(const Lanes<16>& x) {
    Lanes<8> r;
#if NATIVE_LANES == 16
    r.v[0] = __builtin_shufflevector(x.v[0], x.v[0], 0, 1, 2, 3, 4, 5, 6, 7);
#else
    for (int i = 0; i < r.C; ++i) r.v[i] = x.v[i];
#endif
    return r;
}
INLINE F load(const float* p) { return load_floats<LANES>(p); }
INLINE F set1(float x) { return splat<LANES>(x); }

#define BINARY(OP)                                                  \
    template <int N>                                                \
    INLINE Floats<N> operator OP(Floats<N> a, Floats<N> b) {        \
        for (int i = 0; i < a.C; ++i) a.v[i] = a.v[i] OP b.v[i];    \
        return a;                                                   \
    }
BINARY(+)
BINARY(-)
BINARY(*)
BINARY(/)
#undef BINARY

template <int N>
INLINE Floats<N> fma(Floats<N> a, Floats<N> b, Floats<N> c) {
    for (int i = 0; i < a.C; ++i) c.v[i] = native_fma(a.v[i], b.v[i], c.v[i]);
    return c;
}
template <int N>
INLINE Floats<N> max(Floats<N> a, Floats<N> b) {  // b where either is NaN
    for (int i = 0; i < a.C; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
INLINE F square_root(F a) {
    for (int i = 0; i < F::C; ++i)
        for (int j = 0; j < F::W; ++j) a.v[i][j] = __builtin_sqrtf(a.v[i][j]);
    return a;
}

// ------------------------------------------------------------------------------------------------------------- bf16

// A pair of bf16 in 32 bits: the even element below, the odd one above.
template <int N>
INLINE Floats<N> even(Ints<N> pairs) {
    Floats<N> r;
    for (int i = 0; i < r.C; ++i) r.v[i] = (typename Floats<N>::V)(pairs.v[i] << 16);
    return r;
}
template <int N>
INLINE Floats<N> odd(Ints<N> pairs) {
    Floats<N> r;
    for (int i = 0; i < r.C; ++i) r.v[i] = (typename Floats<N>::V)(pairs.v[i] & (int32_t)0xffff0000);
    return r;
}
// Round to nearest even; NaN stays NaN.
INLINE F round_bf16(F x) {
#if defined(__AVX512BF16__) && NATIVE_LANES == 16
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x.v[0]);
    x.v[0] = (F::V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
#else
    for (int i = 0; i < F::C; ++i) {
        I::V bits = (I::V)x.v[i];
        I::V rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
        x.v[i] = x.v[i] == x.v[i] ? (F::V)rounded : x.v[i];
    }
#endif
    return x;
}
// Of numbers that are bf16 already.
INLINE I pair(F even, F odd) {
    typedef uint32_t U __attribute__((vector_size(sizeof(I::V))));
    I r;
    for (int i = 0; i < I::C; ++i) r.v[i] = (I::V)((U)even.v[i] >> 16) | (I::V)odd.v[i];
    return r;
}
INLINE float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
INLINE float to_float(float x) { return x; }
// Sixteen of them as fp32, and back (rounded).
INLINE F load(const bf16* p) {
    F r;
    for (int i = 0; i < F::C; ++i) {
        typedef uint16_t Bits __attribute__((vector_size(2 * F::W)));
        Bits bits;
        memcpy(&bits, p + i * F::W, sizeof bits);
        r.v[i] = (F::V)(__builtin_convertvector(bits, I::V) << 16);
    }
    return r;
}
INLINE void store(bf16* p, F x) {
    x = round_bf16(x);
    for (int i = 0; i < F::C; ++i) {
        typedef uint16_t Bits __attribute__((vector_size(2 * F::W)));
        const Bits bits = __builtin_convertvector((I::V)x.v[i] >> 16, Bits);
        memcpy(p + i * F::W, &bits, sizeof bits);
    }
}

// What differs between the two precisions. A *step* is what a panel holds of one token in 32 bits: one fp32, or a pair
// of bf16.
template <class T>
struct Precision;

template <>
struct Precision<float> {
    static constexpr int STEP = 1;
    template <int N>
    using Steps = Floats<N>;
    static INLINE F round(F x) { return x; }
    template <int N>
    static INLINE Steps<N> load(const uint32_t* p) { return load_floats<N>((const float*)p); }
    template <int N>
    static INLINE Steps<N> spread(const float* p) { return splat<N>(*p); }
    template <int N>
    static INLINE Floats<N> mac(Floats<N> acc, Steps<N> x, Steps<N> w) { return fma(x, w, acc); }
};

template <>
struct Precision<bf16> {
    static constexpr int STEP = 2;
    template <int N>
    using Steps = Ints<N>;
    static INLINE F round(F x) { return round_bf16(x); }
    template <int N>
    static INLINE Steps<N> load(const uint32_t* p) { return load_ints<N>(p); }
    template <int N>
    static INLINE Steps<N> spread(const bf16* p) {
        int32_t bits;
        memcpy(&bits, p, 4);
        return splat_int<N>(bits);
    }
    template <int N>
    static INLINE Floats<N> mac(Floats<N> acc, Steps<N> x, Steps<N> w) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
        if constexpr (N == 16)
            acc.v[0] = (typename Floats<N>::V)_mm512_dpbf16_ps((__m512)acc.v[0], (__m512bh)x.v[0], (__m512bh)w.v[0]);
        else
            acc.v[0] = (typename Floats<N>::V)_mm256_dpbf16_ps((__m256)acc.v[0], (__m256bh)x.v[0], (__m256bh)w.v[0]);
        return acc;
#else
        return fma(odd(x), odd(w), fma(even(x), even(w), acc));
#endif
    }
};

// ------------------------------------------------------------------------------------------------------- functions

// exp to about 1e-7; 0 below -86.6 (so of -infinity), NaN of NaN, exp(88) above 88.
INLINE F exponential(F x) {
    const F magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    F clamped = x;
    for (int i = 0; i < F::C; ++i) {
        F::V low = (F::V){} - 86.6f, high = (F::V){} + 88.f;
        clamped.v[i] = x.v[i] < low ? low : x.v[i];
        clamped.v[i] = clamped.v[i] > high ? high : clamped.v[i];
    }
    F shifted = fma(clamped, set1(1.44269504088896341f), magic);
    F n = shifted - magic;
    F r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), clamped));
    F y = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
    y = fma(y, r, set1(8.3334519073e-3f));
    y = fma(y, r, set1(4.1665795894e-2f));
    y = fma(y, r, set1(1.6666665459e-1f));
    y = fma(y, r, set1(5.0000001201e-1f));
    y = fma(y, r * r, r) + set1(1.f);
    for (int i = 0; i < F::C; ++i) {
        I::V exponent = ((I::V)shifted.v[i] - (I::V)magic.v[i]) << 23;
        F::V scaled = (F::V)((I::V)y.v[i] + exponent);
        F::V low = (F::V){} - 86.6f;
        scaled = x.v[i] < low ? (F::V){} : scaled;
        y.v[i] = x.v[i] == x.v[i] ? scaled : x.v[i];
    }
    return y;
}
INLINE F negative(F x) { return set1(0.f) - x; }
INLINE F sigmoid(F x) { return set1(1.f) / (set1(1.f) + exponential(negative(x))); }
INLINE F silu(F x) { return x / (set1(1.f) + exponential(negative(x))); }

// --------------------------------------------------------------------------------------- transpositions, sums of lanes

#if NATIVE_LANES == 16
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
typedef Native<16>::I Row;
#define LOW_WORDS 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH_WORDS 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define LOW_TWINS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_TWINS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define EVEN_QUADS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_QUADS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define LOW_HALVES 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_HALVES 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31

static INLINE void transpose16(Row* m) {
    Row t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = SHUFFLE(m[i], m[i + 1], LOW_WORDS);
        t[i + 1] = SHUFFLE(m[i], m[i + 1], HIGH_WORDS);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            m[i + 2 * j] = SHUFFLE(t[i + j], t[i + j + 2], LOW_TWINS);
            m[i + 2 * j + 1] = SHUFFLE(t[i + j], t[i + j + 2], HIGH_TWINS);
        }
    // m[4 g + c] now has in its quads q the column 4 q + c of rows 4 g ... 4 g + 3.
    for (int c = 0; c < 4; ++c) {
        Row a = SHUFFLE(m[c], m[4 + c], EVEN_QUADS), b = SHUFFLE(m[c], m[4 + c], ODD_QUADS);
        Row d = SHUFFLE(m[8 + c], m[12 + c], EVEN_QUADS), e = SHUFFLE(m[8 + c], m[12 + c], ODD_QUADS);
        t[c] = SHUFFLE(a, d, EVEN_QUADS);
        t[8 + c] = SHUFFLE(a, d, ODD_QUADS);
        t[4 + c] = SHUFFLE(b, e, EVEN_QUADS);
        t[12 + c] = SHUFFLE(b, e, ODD_QUADS);
    }
    for (int i = 0; i < 16; ++i) m[i] = t[i];
}
#endif

// Rows of `n` 32-bit words of 16 tokens -> panel [n][16]. Lanes past `lanes` repeat the first row.
static inline void rows_to_panel(const void* const* rows, int lanes, int n, uint32_t* panel) {
    const uint32_t* from[LANES];
    for (int t = 0; t < LANES; ++t) from[t] = (const uint32_t*)rows[t < lanes ? t : 0];
    int k = 0;
#if NATIVE_LANES == 16
    for (; k + 16 <= n; k += 16) {
        Row m[16];
        for (int t = 0; t < 16; ++t) memcpy(&m[t], from[t] + k, 64);
        transpose16(m);
        memcpy(panel + (size_t)k * LANES, m, sizeof m);
    }
#endif
    for (; k < n; ++k)
        for (int t = 0; t < LANES; ++t) panel[(size_t)k * LANES + t] = from[t][k];
}

// Panel [n][16] -> rows of `n` words of the first `lanes` tokens.
static inline void panel_to_rows(const uint32_t* panel, void* const* rows, int lanes, int n) {
    int k = 0;
#if NATIVE_LANES == 16
    for (; k + 16 <= n; k += 16) {
        Row m[16];
        memcpy(m, panel + (size_t)k * LANES, sizeof m);
        transpose16(m);
        for (int t = 0; t < lanes; ++t) memcpy((uint32_t*)rows[t] + k, &m[t], 64);
    }
#endif
    for (; k < n; ++k)
        for (int t = 0; t < lanes; ++t) ((uint32_t*)rows[t])[k] = panel[(size_t)k * LANES + t];
}

// The sum of 16 numbers in one order everywhere: first those 8 apart, then 4, 2, 1. `f(l)` gives number l.
template <int STRIDE, int L, class Fn>
INLINE auto tree_of(const Fn& f) {
    if constexpr (STRIDE == LANES)
        return f(std::integral_constant<int, L>());
    else {
        auto a = tree_of<2 * STRIDE, L>(f), b = tree_of<2 * STRIDE, L + STRIDE>(f);
        return a + b;
    }
}

// The tree sums of 16 vectors: lane i is that of `m[i]`.
static INLINE F tree_sums(F* m) {
#if NATIVE_LANES == 16
    typedef F::V V;
    V a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i)  // keys i and i + 8
        a[i] = SHUFFLE(m[i].v[0], m[i + 8].v[0], LOW_HALVES) + SHUFFLE(m[i].v[0], m[i + 8].v[0], HIGH_HALVES);
    for (int i = 0; i < 4; ++i)  // quads: i, i + 8, i + 4, i + 12
        b[i] = SHUFFLE(a[i], a[i + 4], EVEN_QUADS) + SHUFFLE(a[i], a[i + 4], ODD_QUADS);
    for (int i = 0; i < 2; ++i)  // twins of each quad: i, i + 2
        c[i] = SHUFFLE(b[i], b[i + 2], LOW_TWINS) + SHUFFLE(b[i], b[i + 2], HIGH_TWINS);
    // words of each quad: 0, 2, 1, 3 of quads 0, 8, 4, 12
    V even = SHUFFLE(c[0], c[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
    V odd = SHUFFLE(c[0], c[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
    V sums = even + odd;
    F r;
    r.v[0] = SHUFFLE(sums, sums, 0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return r;
#else
    float x[LANES][LANES], r[LANES];
    for (int i = 0; i < LANES; ++i) {
        store(x[i], m[i]);
        for (int half = LANES / 2; half; half /= 2)
            for (int l = 0; l < half; ++l) x[i][l] += x[i][l + half];
        r[i] = x[i][0];
    }
    return load(r);
#endif
}

// The same for one vector, lane by lane: `f` joins lanes 8 apart, then 4, 2, 1.
template <class Fn>
static INLINE float tree_of_lanes(F x, const Fn& f) {
#if NATIVE_LANES == 16
    typedef Native<8>::F Half;
    typedef Native<4>::F Quad;
    const auto v = x.v[0];
    const Half h = f((Half)SHUFFLE(v, v, 0, 1, 2, 3, 4, 5, 6, 7), (Half)SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
    const Quad q = f((Quad)SHUFFLE(h, h, 0, 1, 2, 3), (Quad)SHUFFLE(h, h, 4, 5, 6, 7));
    return f(f(q[0], q[2]), f(q[1], q[3]));
#else
    float a[LANES];
    store(a, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) a[l] = f(a[l], a[l + half]);
    return a[0];
#endif
}
static INLINE float tree_sum(F x) {
    return tree_of_lanes(x, [](auto a, auto b) INLINE_LAMBDA { return a + b; });
}
static INLINE float max_of(F x) {
    return tree_of_lanes(x, [](auto a, auto b) INLINE_LAMBDA { return a > b ? a : b; });
}
