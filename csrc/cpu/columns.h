// The norms of dz's columns, for the vector of this translation unit.
#pragma once

#include "rows.h"

namespace {

// Of dz[:, start : start + n], n <= hsd_norms_block. Sums are fp32 over 32 rows and double from there. The next row is
// asked for while one is read: the hardware does not foresee a step of a whole row.
template <class T>
static void norms_as(const Matrix& dz, int64_t start, int64_t n, double* mass, float* largest) {
    alignas(64) float sum[hsd_norms_block], top[hsd_norms_block] = {};
    memset(mass, 0, n * sizeof(double));
    for (int64_t first = 0; first < dz.rows; first += 32) {
        const int64_t last = first + 32 < dz.rows ? first + 32 : dz.rows;
        memset(sum, 0, sizeof sum);
        for (int64_t row = first; row < last; row++) {
            const T* x = (const T*)dz.x + row * dz.stride + start;
            const auto take = [&](int64_t i, F a) __attribute__((always_inline)) {
                store(sum + i, load(sum + i) + abs(a));
                store(top + i, max(abs(a), load(top + i)));  // a NaN leaves it
            };
            int64_t i = 0;
            for (; i + LANES <= n; i += LANES) {
                __builtin_prefetch(x + dz.stride + i);
                take(i, load(x + i));
            }
            if (i < n) take(i, load_some(x + i, n - i));
        }
        for (int64_t i = 0; i < n; i++) mass[i] += sum[i];
    }
    for (int64_t i = 0; i < n; i++) largest[i] = mass[i] == mass[i] ? top[i] : __builtin_nanf("");
}

static void norms_of_block(const Matrix& dz, int64_t block, double* mass, float* largest) {
    const int64_t start = block * hsd_norms_block, left = dz.columns - start;
    const int64_t n = left < hsd_norms_block ? left : hsd_norms_block;
    dz.is_bf16 ? norms_as<bf16>(dz, start, n, mass + start, largest + start)
               : norms_as<float>(dz, start, n, mass + start, largest + start);
}

}  // namespace
