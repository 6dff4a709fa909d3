// A vector of LANES floats in the instruction set that this translation unit is compiled for (-mavx512f, -mavx2 -mfma,
// or neither). Everything is in an unnamed namespace: a function of one variant must not stand in for another's.
//
// Compiled with -ffp-contract=off: where a rounding matters it is written as fma, and no compiler's choice of what else
// to fuse changes a result.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the header of GCC 12 itself, GCC bug 105593
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace {

#define HSD_INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

#if defined(__AVX512F__)

constexpr int LANES = 16;
struct F {
    __m512 v;
};
typedef __mmask16 M;

HSD_INLINE F all(float a) { return {_mm512_set1_ps(a)}; }
HSD_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
HSD_INLINE F load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
HSD_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
HSD_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
HSD_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
HSD_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
HSD_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
HSD_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HSD_INLINE F fast_fma(F a, F b, F c) { return fma(a, b, c); }
HSD_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
HSD_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
HSD_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
HSD_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
HSD_INLINE M not_less(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }
HSD_INLINE M not_zero(F a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
HSD_INLINE F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
HSD_INLINE F keep(M m, F a) { return {_mm512_maskz_mov_ps(m, a.v)}; }
HSD_INLINE F add_product_where(M m, F a, F b, F c) { return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, m)}; }
HSD_INLINE F shifted_left_23(F a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
HSD_INLINE F split_exponent(F a, int32_t from, F* mantissa) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i k = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(from)), 23);
    mantissa->v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(k, 23)));
    return {_mm512_cvtepi32_ps(k)};
}
HSD_INLINE void store(bf16* p, F a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    near = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int LANES = 8;
struct F {
    __m256 v;
};
struct M {
    __m256 v;
};

HSD_INLINE F all(float a) { return {_mm256_set1_ps(a)}; }
HSD_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
HSD_INLINE F load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
HSD_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
HSD_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
HSD_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
HSD_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
HSD_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
HSD_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
HSD_INLINE F fast_fma(F a, F b, F c) { return fma(a, b, c); }
HSD_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
HSD_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
HSD_INLINE F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
HSD_INLINE M less(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
HSD_INLINE M not_less(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)}; }
HSD_INLINE M not_zero(F a) { return {_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NEQ_UQ)}; }
HSD_INLINE F select(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
HSD_INLINE F keep(M m, F a) { return {_mm256_and_ps(m.v, a.v)}; }
HSD_INLINE F add_product_where(M m, F a, F b, F c) { return c + keep(m, a * b); }
HSD_INLINE F shifted_left_23(F a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
HSD_INLINE F split_exponent(F a, int32_t from, F* mantissa) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i k = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(from)), 23);
    mantissa->v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(k, 23)));
    return {_mm256_cvtepi32_ps(k)};
}
HSD_INLINE void store(bf16* p, F a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    near = _mm256_srli_epi32(_mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(near, near), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}

#else

// Vector extensions of GCC and Clang, on any machine: SSE2 or NEON registers.
constexpr int LANES = 4;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
struct F {
    floats v;
};
struct M {
    ints v;
};

HSD_INLINE F all(float a) { return {floats{} + a}; }
HSD_INLINE F load(const float* p) {
    F a;
    memcpy(&a.v, p, sizeof a.v);
    return a;
}
HSD_INLINE F load(const bf16* p) {
    bf16 narrow __attribute__((vector_size(2 * LANES)));
    memcpy(&narrow, p, sizeof narrow);
    return {(floats)(__builtin_convertvector(narrow, ints) << 16)};
}
HSD_INLINE void store(float* p, F a) { memcpy(p, &a.v, sizeof a.v); }
HSD_INLINE F operator+(F a, F b) { return {a.v + b.v}; }
HSD_INLINE F operator-(F a, F b) { return {a.v - b.v}; }
HSD_INLINE F operator*(F a, F b) { return {a.v * b.v}; }
HSD_INLINE F operator/(F a, F b) { return {a.v / b.v}; }
HSD_INLINE F select(M m, F a, F b) { return {(floats)(((ints)a.v & m.v) | ((ints)b.v & ~m.v))}; }
HSD_INLINE F keep(M m, F a) { return {(floats)((ints)a.v & m.v)}; }
HSD_INLINE M less(F a, F b) { return {a.v < b.v}; }
HSD_INLINE M not_less(F a, F b) { return {~(a.v < b.v)}; }
HSD_INLINE M not_zero(F a) { return {a.v != floats{}}; }
HSD_INLINE F max(F a, F b) { return select({a.v > b.v}, a, b); }
HSD_INLINE F min(F a, F b) { return select({a.v < b.v}, a, b); }
HSD_INLINE F abs(F a) { return {(floats)((ints)a.v & 0x7fffffff)}; }
// The product of two floats is exact in double. Rounding to double first is seen once in 2^28 results.
HSD_INLINE F fma(F a, F b, F c) {
    typedef double doubles __attribute__((vector_size(8 * LANES)));
    const doubles product = __builtin_convertvector(a.v, doubles) * __builtin_convertvector(b.v, doubles);
    return {__builtin_convertvector(product + __builtin_convertvector(c.v, doubles), floats)};
}
HSD_INLINE F fast_fma(F a, F b, F c) { return a * b + c; }
HSD_INLINE F add_product_where(M m, F a, F b, F c) { return c + keep(m, a * b); }
HSD_INLINE F shifted_left_23(F a) { return {(floats)((ints)a.v << 23)}; }
HSD_INLINE F split_exponent(F a, int32_t from, F* mantissa) {
    const ints k = ((ints)a.v - from) >> 23;
    mantissa->v = (floats)((ints)a.v - (k << 23));
    return {__builtin_convertvector(k, floats)};
}
HSD_INLINE void store(bf16* p, F a) {
    for (int i = 0; i < LANES; i++) {
        uint32_t bits;
        const float one = a.v[i];
        memcpy(&bits, &one, sizeof bits);
        p[i] = one != one ? 0x7fc0 : (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

#endif

// Which all variants have in common: max and min give b where either is NaN, not_less and not_zero are true for NaN,
// fma rounds once, fast_fma once or twice, add_product_where leaves c in the other lanes, split_exponent gives k and
// a / 2^k >= the float with the bits `from`.


HSD_INLINE double sum(F a) {
    float lanes[LANES];
    store(lanes, a);
    double total = 0.0;
    for (int i = 0; i < LANES; i++) total += lanes[i];
    return total;
}

HSD_INLINE float max_of(F a) {
    float lanes[LANES];
    store(lanes, a);
    float top = lanes[0];
    for (int i = 1; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

}  // namespace
