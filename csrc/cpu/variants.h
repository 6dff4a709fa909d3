// The row passes of each instruction set and the products, for dispatch.cpp.
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

// Rows of the vocabulary in a block, and its part of the product.
extern const int64_t hsd_project_out_block;
void hsd_project_out_block_of(const hsd_product& product, int64_t block);
extern const int64_t hsd_accumulate_block;
void hsd_accumulate_block_of(const hsd_product& product, int64_t block);
