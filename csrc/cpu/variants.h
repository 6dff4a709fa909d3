// The row passes of each instruction set and the product, for dispatch.cpp.
#pragma once

#include "hsd_cpu.h"

struct Variant {
    void (*statistics_row)(const hsd_rows&, const hsd_statistics&, int64_t row);
    void (*gradient_row)(const hsd_rows&, const hsd_gradient&, int64_t row);
    void (*elementary)(int function, const float* x, float* out, int64_t n);
    void (*norms_of_block)(const hsd_matrix&, int64_t block, double* mass, float* largest);
};

extern const Variant hsd_baseline;
extern const Variant hsd_avx2;
extern const Variant hsd_avx512;

constexpr int64_t hsd_norms_block = 2048;  // columns of dz
extern const int64_t hsd_product_block;  // columns of out
void hsd_product_of_block(const hsd_product& product, int64_t block);
