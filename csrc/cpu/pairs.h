// Packing of bf16 for products: two numbers that are neighbours in the summed index k are a pair, one uint32_t.
#pragma once

#include <stdint.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the header of GCC 12 itself, GCC bug 105593
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace {

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// The first n of 32 lanes; n may be past either end.
inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// 16 rows of 16 pairs into 16 pairs of 16 rows, STEP apart.
template <int STEP>
inline void transpose(__m512i r[16], uint32_t* to) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    }
    for (int c = 0; c < 4; c++) {  // quarter q of r[i + c] holds rows i to i + 3 of pair 4 q + c
        const __m512i even_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        _mm512_store_si512(to + c * STEP, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_store_si512(to + (4 + c) * STEP, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_store_si512(to + (8 + c) * STEP, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        _mm512_store_si512(to + (12 + c) * STEP, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}

// 32 pairs of a row and the next, 0 where the mask is and where `both` says there is no next; 16 of them STEP from the
// other 16.
template <int STEP>
inline void pair(const uint16_t* row, int64_t stride, bool both, __mmask32 mask, uint32_t* to) {
    const __m512i even = _mm512_maskz_loadu_epi16(mask, row);
    const __m512i odd = _mm512_maskz_loadu_epi16(both ? mask : 0u, row + stride);
    const __m256i halves[2][2] = {{_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)},
                                  {_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1)}};
    for (int i = 0; i < 2; i++) {
        const __m512i low = _mm512_cvtepu16_epi32(halves[i][0]), high = _mm512_cvtepu16_epi32(halves[i][1]);
        _mm512_storeu_si512(to + STEP * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

}  // namespace
