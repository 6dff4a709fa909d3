// What the passes take, and the passes of each instruction set, for operators.cpp.
#pragma once

#include <stdint.h>

enum Divergence { FORWARD_KL, REVERSE_KL, JSD };  // in the order of hsd_kernels.divergence.DIVERGENCES

constexpr int64_t STATISTICS = 12;  // columns of hsd_kernels/row_stats.py

// (rows, columns), rows `stride` elements apart, in bf16 or fp32.
struct Matrix {
    void* x;
    int64_t stride;
    int64_t rows;
    int64_t columns;
    bool is_bf16;
};

// The raw head outputs of one side: (rows, vocab), rows `stride` elements apart.
struct Logits {
    const void* x;
    const void* bias;  // (vocab,), contiguous, or null
    int64_t stride;
    bool bias_is_bf16;
};

// A row pass: z = kappa * y with y = in_scale * (x + bias), or its tanh under a softcap.
struct Rows {
    Logits student;
    Logits teacher;
    int64_t rows;
    int64_t vocab;
    bool is_bf16;  // the logits of both sides, fp32 else
    Divergence divergence;
    bool has_softcap;
    bool is_bounded;      // by a clip or a floor
    bool is_nonnegative;  // the form of the clip
    bool is_linear;       // the student's logits are those of the teacher and these, added
    float in_scale;
    float kappa;
    float beta;
    float clip;       // infinite for none
    float log_floor;  // of the teacher's probability beside the student's, -infinite for none
};

struct Statistics {
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

// What the gradient reads per row, (rows,) each, and where it goes: (rows, vocab), apart from the logits.
struct Gradient {
    const float* student_top;
    const float* teacher_top;
    const float* student_log_sum;
    const float* teacher_log_sum;
    const float* grad_sum;
    const float* weights;
    double chain;  // d z / d x but for the softcap
    void* out;
    int64_t stride;
    bool out_is_bf16;
};

// A product of bf16 in fp32, rows `_stride` elements apart. No two rows of out have memory in common.
//   project_out: out (rows, vocab) = a (rows, dim) w (vocab, dim)^T
//   accumulate:  out (vocab, dim) = or, with `adds`, += a (rows, vocab)^T w (rows, dim)
struct Product {
    const void* a;
    const void* w;
    float* out;
    int64_t a_stride;
    int64_t w_stride;
    int64_t out_stride;
    int64_t rows;
    int64_t vocab;
    int64_t dim;
    bool adds;
};

struct Variant {
    void (*statistics_row)(const Rows&, const Statistics&, int64_t row);
    void (*gradient_row)(const Rows&, const Gradient&, int64_t row);
    // L1 norm and largest magnitude of each column of a block: NaN where one of its elements is.
    void (*norms_of_block)(const Matrix&, int64_t block, double* mass, float* largest);
    // For tests: function 0 exp, 1 expm1, 2 log1p, 3 tanh of n numbers.
    void (*elementary)(int64_t function, const float* x, float* out, int64_t n);
};

extern const Variant hsd_baseline;
extern const Variant hsd_avx2;
extern const Variant hsd_avx512;

constexpr int64_t hsd_norms_block = 2048;  // columns of dz

// Rows of the vocabulary in a block, and its part of the product.
extern const int64_t hsd_project_out_block;
void hsd_project_out_block_of(const Product& product, int64_t block);
extern const int64_t hsd_accumulate_block;
void hsd_accumulate_block_of(const Product& product, int64_t block);

// The same on AMX tiles: one side is packed once, `part` by part, the rest block by block.
enum Sum { LOGITS, DW };
bool hsd_has_tiles();
int64_t hsd_tiles_of(int64_t n, int64_t k);  // numbers of uint32_t that (n, k) take
void hsd_tiles_pack(const Product& product, Sum sum, int64_t part, uint32_t* to);
constexpr int64_t hsd_tiles_part = 32;
extern const int64_t hsd_tiles_block;
void hsd_tiles_project_out(const Product& product, const uint32_t* a, int64_t block);
void hsd_tiles_accumulate(const Product& product, const uint32_t* w, int64_t block);
