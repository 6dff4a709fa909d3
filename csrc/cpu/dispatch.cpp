#include "variants.h"

#define HSD_EXPORT extern "C" __attribute__((visibility("default")))

static const Variant* runnable(int variant) {
    if (variant < 0 || variant > hsd_cpu_best()) return nullptr;
#ifdef __x86_64__
    if (variant == 2) return &hsd_avx512;
    if (variant == 1) return &hsd_avx2;
#endif
    return &hsd_baseline;
}

// Rows, or blocks of the vocabulary, one at a time to whichever thread is free: the machine may have other work. A
// result does not depend on which thread makes it.
template <class Row>
static void for_rows(int64_t rows, int threads, const Row& row) {
    if (threads > rows) threads = (int)rows;
    if (threads <= 1) {
        for (int64_t i = 0; i < rows; i++) row(i);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) row(i);
}

HSD_EXPORT int hsd_cpu_abi(void) { return HSD_CPU_ABI; }

HSD_EXPORT int hsd_cpu_best(void) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

HSD_EXPORT int hsd_cpu_statistics(int variant, int threads, const hsd_rows* rows, const hsd_statistics* statistics) {
    const Variant* v = runnable(variant);
    if (!v) return 1;
    for_rows(rows->rows, threads, [&](int64_t row) { v->statistics_row(*rows, *statistics, row); });
    return 0;
}

HSD_EXPORT int hsd_cpu_gradient(int variant, int threads, const hsd_rows* rows, const hsd_gradient* gradient) {
    const Variant* v = runnable(variant);
    if (!v) return 1;
    for_rows(rows->rows, threads, [&](int64_t row) { v->gradient_row(*rows, *gradient, row); });
    return 0;
}

HSD_EXPORT int hsd_cpu_has_products(void) {
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#else
    return 0;
#endif
}

HSD_EXPORT int hsd_cpu_project_out(int threads, const hsd_product* product) {
    if (!hsd_cpu_has_products()) return 1;
#ifdef __x86_64__
    const int64_t blocks = (product->vocab + hsd_project_out_block - 1) / hsd_project_out_block;
    for_rows(blocks, threads, [&](int64_t block) { hsd_project_out_block_of(*product, block); });
#endif
    return 0;
}

HSD_EXPORT int hsd_cpu_accumulate(int threads, const hsd_product* product) {
    if (!hsd_cpu_has_products()) return 1;
#ifdef __x86_64__
    const int64_t blocks = (product->vocab + hsd_accumulate_block - 1) / hsd_accumulate_block;
    for_rows(blocks, threads, [&](int64_t block) { hsd_accumulate_block_of(*product, block); });
#endif
    return 0;
}

HSD_EXPORT int hsd_cpu_column_norms(int variant, int threads, const hsd_matrix* dz, double* mass, float* largest) {
    const Variant* v = runnable(variant);
    if (!v) return 1;
    const int64_t blocks = (dz->columns + hsd_norms_block - 1) / hsd_norms_block;
    for_rows(blocks, threads, [&](int64_t block) { v->norms_of_block(*dz, block, mass, largest); });
    return 0;
}

template <class T>
static void take_columns(T* row, const int64_t* columns, int64_t n) {
    for (int64_t i = 0; i < n; i++) row[i] = row[columns[i]];
}

HSD_EXPORT void hsd_cpu_take_columns(int threads, const hsd_matrix* x, const int64_t* columns, int64_t n) {
    for_rows(x->rows, threads, [&](int64_t row) {
        x->is_bf16 ? take_columns((uint16_t*)x->x + row * x->stride, columns, n)
                   : take_columns((uint32_t*)x->x + row * x->stride, columns, n);
    });
}

HSD_EXPORT int hsd_cpu_elementary(int variant, int function, const float* x, float* out, int64_t n) {
    const Variant* v = runnable(variant);
    if (!v) return 1;
    v->elementary(function, x, out, n);
    return 0;
}
