// The C interface of the CPU row backend: plain data, so that one library works beside every torch version. It is
// loaded by hsd_kernels/rows/cpp.py, which mirrors these structs (hsd_kernels/gemm.py the products', vocab_filter.py
// the matrix): change HSD_CPU_ABI here and there with them.
#pragma once

#include <stdint.h>

#define HSD_CPU_ABI 5

extern "C" {

// The logits of one side: (rows, vocab), rows `stride` elements apart.
struct hsd_side {
    const void* x;
    const void* bias;  // (vocab,), contiguous, or null
    int64_t stride;
    int64_t bias_is_bf16;
};

// A row pass: z = kappa * y with y = in_scale * (x + bias), or its tanh under a softcap.
struct hsd_rows {
    hsd_side student;
    hsd_side teacher;
    int64_t rows;
    int64_t vocab;
    int32_t is_bf16;  // the logits of both sides, fp32 else
    int32_t divergence;  // index in hsd_kernels.divergence.DIVERGENCES
    int32_t has_softcap;
    int32_t has_clip;
    int32_t is_nonnegative;  // the form of the clip
    int32_t is_linear;       // the student's logits are those of the teacher and these, added
    float in_scale;
    float kappa;
    float beta;
    float clip;
};

struct hsd_statistics {
    const int64_t* targets;  // (rows,) or null; the log-probs of a target outside the vocabulary are NaN
    // The columns of hsd_kernels/row_stats.py, (rows,) each.
    float* kl;
    float* student_logps;
    float* teacher_logps;
    float* student_entropy;
    float* teacher_entropy;
    float* student_lse;
    float* teacher_lse;
    float* student_top;
    float* teacher_top;
    float* student_log_sum;
    float* teacher_log_sum;
    float* grad_sum;
};

// What the gradient reads per row, (rows,) each, and where it goes: (rows, vocab), possibly over the logits of
// either side, element 0 of a row on element 0, if no wider than they are.
struct hsd_gradient {
    const float* student_top;
    const float* teacher_top;
    const float* student_log_sum;
    const float* teacher_log_sum;
    const float* grad_sum;
    const float* weights;
    double chain;  // d z / d x but for the softcap
    void* out;
    int64_t stride;
    int32_t out_is_bf16;
};

// A product of bf16 in fp32, rows `_stride` elements apart. No two rows of out have memory in common.
//   project_out: out (rows, vocab) = a (rows, dim) w (vocab, dim)^T
//   accumulate:  out (vocab, dim) = or, with `adds`, += a (rows, vocab)^T w (rows, dim)
struct hsd_product {
    const void* a;
    const void* w;
    float* out;
    int64_t a_stride;
    int64_t w_stride;
    int64_t out_stride;
    int64_t rows;
    int64_t vocab;
    int64_t dim;
    int64_t adds;
};

// (rows, columns), rows `stride` elements apart.
struct hsd_matrix {
    void* x;
    int64_t stride;
    int64_t rows;
    int64_t columns;
    int64_t is_bf16;  // fp32 else
};

int hsd_cpu_abi(void);
// The number of the fastest variant this machine runs: 0 baseline, 1 AVX2 with FMA, 2 AVX-512. Every smaller one runs.
int hsd_cpu_best(void);
// 0, or 1 where the machine does not run the variant.
int hsd_cpu_statistics(int variant, int threads, const hsd_rows* rows, const hsd_statistics* statistics);
int hsd_cpu_gradient(int variant, int threads, const hsd_rows* rows, const hsd_gradient* gradient);
// Whether the machine runs the products (AVX-512 with BF16). They return 1 where it does not.
int hsd_cpu_has_products(void);
int hsd_cpu_project_out(int threads, const hsd_product* product);
int hsd_cpu_accumulate(int threads, const hsd_product* product);
// The filter of the vocabulary. L1 norm and largest magnitude of each column: NaN where one of its elements is.
int hsd_cpu_column_norms(int variant, int threads, const hsd_matrix* dz, double* mass, float* largest);
// x[:, i] = x[:, columns[i]] for i in [0, n), columns ascending.
void hsd_cpu_take_columns(int threads, const hsd_matrix* x, const int64_t* columns, int64_t n);
// For tests: function 0 exp, 1 expm1, 2 log1p, 3 tanh of n numbers.
int hsd_cpu_elementary(int variant, int function, const float* x, float* out, int64_t n);
}
