// The operators of hsd_kernels/native.py on a CPU, by torch's stable ABI: one library serves every torch from 2.9 on.
// The schemas are in native.py; a function here has the arguments of its schema in the same order (change HSD_CPU_ABI
// here and ABI there with them). What is checked here is what the library would read or write wrongly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>

#include "passes.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> MaybeTensor;
typedef std::optional<double> MaybeFloat;

#define HSD_CPU_ABI 8

// Parts of the schemas, by their names in native.py.
#define ROWS Tensor x_student, Tensor x_teacher, MaybeTensor bias, MaybeTensor teacher_bias
#define FORM                                                                                               \
    int64_t divergence, double beta, MaybeFloat clip, bool is_nonnegative, MaybeFloat log_floor, \
        bool is_linear, bool has_softcap, double in_scale, double kappa
#define RUN int64_t variant, int64_t threads

namespace {

constexpr double INF = __builtin_inf();

// The number of the fastest variant that this machine runs. Every smaller one runs.
int64_t fastest() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

bool has_products() {
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#else
    return false;
#endif
}

bool has_tiles() {
#ifdef __x86_64__
    static const bool has = hsd_has_tiles();
    return has;
#else
    return false;
#endif
}

std::tuple<int64_t, int64_t, bool, bool> facts() { return {HSD_CPU_ABI, fastest(), has_products(), has_tiles()}; }

const Variant& numbered(int64_t variant) {
    STD_TORCH_CHECK(0 <= variant && variant <= fastest(), "variant: expected at most ", fastest(), ", got ", variant);
#ifdef __x86_64__
    if (variant == 2) return hsd_avx512;
    if (variant == 1) return hsd_avx2;
#endif
    return hsd_baseline;
}

// Rows, or blocks of the vocabulary, one at a time to whichever thread is free: the machine may have other work. A
// result does not depend on which thread makes it. `each` must not throw.
template <class Each>
void for_each(int64_t count, int64_t threads, const Each& each) {
    if (threads > count) threads = count;
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) each(i);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t i = 0; i < count; i++) each(i);
}

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

bool is_bf16(const char* name, const Tensor& t) {
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name,
                    ": expected float32 or bfloat16, got ", toString(dtype));
    return dtype == ScalarType::BFloat16;
}

Matrix matrix(const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
    STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": expected columns side by side, got stride ",
                    t.stride(1));
    return {t.data_ptr(), t.stride(0), t.size(0), t.size(1), is_bf16(name, t)};
}

Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    const Matrix m = matrix(name, t);
    STD_TORCH_CHECK(m.rows == rows && m.columns == columns, name, ": expected shape (", rows, ", ", columns, "), got (",
                    m.rows, ", ", m.columns, ")");
    return m;
}

template <class T>
T* vector(const char* name, const Tensor& t, ScalarType dtype, int64_t size) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == size, name, ": expected ", size,
                    " contiguous numbers of ", toString(dtype), ", got ", t.numel(), " of ", toString(t.scalar_type()));
    return (T*)t.data_ptr();
}

Logits logits(const char* name, const Matrix& x, const MaybeTensor& bias) {
    if (!bias) return {x.x, nullptr, x.stride, false};
    const bool narrow = is_bf16(name, *bias);
    const ScalarType dtype = narrow ? ScalarType::BFloat16 : ScalarType::Float;
    return {x.x, vector<void>(name, *bias, dtype, x.columns), x.stride, narrow};
}

Rows rows_of(ROWS, FORM) {
    const Matrix s = matrix("x_student", x_student), t = matrix("x_teacher", x_teacher, s.rows, s.columns);
    STD_TORCH_CHECK(s.is_bf16 == t.is_bf16, "x_teacher: expected the dtype of x_student, got another");
    return {logits("bias", s, bias), logits("teacher_bias", t, teacher_bias), s.rows, s.columns, s.is_bf16,
            (Divergence)divergence, has_softcap, clip || log_floor, clip && is_nonnegative, is_linear,
            (float)in_scale, (float)kappa, (float)beta, (float)clip.value_or(INF), (float)log_floor.value_or(-INF)};
}

#define ROWS_OF                                                                                             \
    rows_of(x_student, x_teacher, bias, teacher_bias, divergence, beta, clip, is_nonnegative, log_floor, \
            is_linear, has_softcap, in_scale, kappa)

void statistics(Tensor out, ROWS, MaybeTensor target_ids, FORM, RUN) {
    const Rows rows = ROWS_OF;
    const Variant& v = numbered(variant);
    const int64_t n = rows.rows;
    float* to = vector<float>("out", out, ScalarType::Float, STATISTICS * n);
    const auto column = [&] { return (to += n) - n; };
    const Statistics s = {
        target_ids ? vector<const int64_t>("target_ids", *target_ids, ScalarType::Long, n) : nullptr,
        column(), column(), column(), column(), column(), column(),
        column(), column(), column(), column(), column(), column(),
    };
    for_each(n, threads, [&](int64_t row) { v.statistics_row(rows, s, row); });
}

void gradient(Tensor out, ROWS, Tensor student_top, Tensor teacher_top, Tensor student_log_sum, Tensor teacher_log_sum,
              Tensor grad_sum, Tensor weights, FORM, double chain, RUN) {
    const Rows rows = ROWS_OF;
    const Variant& v = numbered(variant);
    const int64_t n = rows.rows;
    const Matrix to = matrix("out", out, n, rows.vocab);
    const auto per_row = [&](const char* name, const Tensor& t) {
        return vector<const float>(name, t, ScalarType::Float, n);
    };
    const Gradient g = {per_row("student_top", student_top),
                        per_row("teacher_top", teacher_top),
                        per_row("student_log_sum", student_log_sum),
                        per_row("teacher_log_sum", teacher_log_sum),
                        per_row("grad_sum", grad_sum),
                        per_row("weights", weights),
                        chain,
                        to.x,
                        to.stride,
                        to.is_bf16};
    for_each(n, threads, [&](int64_t row) { v.gradient_row(rows, g, row); });
}

// `tiles`: on AMX tiles.
Product product(const Matrix& a, const Matrix& w, const Tensor& out, int64_t vocab, int64_t rows, int64_t columns,
                bool tiles) {
    STD_TORCH_CHECK(tiles ? has_tiles() : has_products(), "products: expected a CPU with ",
                    tiles ? "AMX_BF16" : "AVX512_BF16", ", got one without");
    const Matrix o = matrix("out", out, rows, columns);
    STD_TORCH_CHECK(a.is_bf16 && w.is_bf16 && !o.is_bf16, "products: expected bfloat16 into float32, got other dtypes");
    return {a.x, w.x, (float*)o.x, a.stride, w.stride, o.stride, a.rows, vocab, w.columns, false};
}

struct Free {
    void operator()(uint32_t* x) const { std::free(x); }
};

// The side of a product that each block reads, in tiles.
std::unique_ptr<uint32_t, Free> packed(const Product& p, Sum sum, int64_t n, int64_t k, int64_t threads) {
    std::unique_ptr<uint32_t, Free> to;
#ifdef __x86_64__
    to.reset((uint32_t*)std::aligned_alloc(64, (size_t)hsd_tiles_of(n, k) * 4 + 64));
    STD_TORCH_CHECK(to, "products: expected memory for ", hsd_tiles_of(n, k) * 4, " bytes, got none");
    for_each(blocks_of(n, hsd_tiles_part), threads, [&](int64_t i) { hsd_tiles_pack(p, sum, i, to.get()); });
#endif
    return to;
}

void project_out(Tensor out, Tensor a, Tensor w, bool tiles, int64_t threads) {
    const Matrix am = matrix("a", a), wm = matrix("w", w, w.size(0), am.columns);
    const Product p = product(am, wm, out, wm.rows, am.rows, wm.rows, tiles);
#ifdef __x86_64__
    if (tiles) {
        const auto rows = packed(p, LOGITS, p.rows, p.dim, threads);
        for_each(blocks_of(p.vocab, hsd_tiles_block), threads,
                 [&](int64_t block) { hsd_tiles_project_out(p, rows.get(), block); });
        return;
    }
    const int64_t blocks = blocks_of(p.vocab, hsd_project_out_block);
    for_each(blocks, threads, [&](int64_t block) { hsd_project_out_block_of(p, block); });
#endif
}

void accumulate(Tensor out, Tensor a, Tensor w, bool adds, bool tiles, int64_t threads) {
    const Matrix am = matrix("a", a), wm = matrix("w", w, am.rows, w.size(1));
    Product p = product(am, wm, out, am.columns, am.columns, wm.columns, tiles);
    p.adds = adds;
#ifdef __x86_64__
    if (tiles) {
        const auto columns = packed(p, DW, p.dim, p.rows, threads);
        for_each(blocks_of(p.vocab, hsd_tiles_block), threads,
                 [&](int64_t block) { hsd_tiles_accumulate(p, columns.get(), block); });
        return;
    }
    const int64_t blocks = blocks_of(p.vocab, hsd_accumulate_block);
    for_each(blocks, threads, [&](int64_t block) { hsd_accumulate_block_of(p, block); });
#endif
}

void column_norms(Tensor mass, Tensor largest, Tensor dz, RUN) {
    const Matrix m = matrix("dz", dz);
    double* to_mass = vector<double>("mass", mass, ScalarType::Double, m.columns);
    float* to_largest = vector<float>("largest", largest, ScalarType::Float, m.columns);
    const Variant& v = numbered(variant);
    const int64_t blocks = blocks_of(m.columns, hsd_norms_block);
    for_each(blocks, threads, [&](int64_t block) { v.norms_of_block(m, block, to_mass, to_largest); });
}

template <class T>
void take(T* row, const int64_t* columns, int64_t n) {
    for (int64_t i = 0; i < n; i++) row[i] = row[columns[i]];
}

void take_columns(Tensor x, Tensor columns, int64_t threads) {
    const Matrix m = matrix("x", x);
    const int64_t n = columns.numel();
    const int64_t* from = vector<const int64_t>("columns", columns, ScalarType::Long, n);
    for_each(m.rows, threads, [&](int64_t row) {
        m.is_bf16 ? take((uint16_t*)m.x + row * m.stride, from, n) : take((uint32_t*)m.x + row * m.stride, from, n);
    });
}

void elementary(Tensor out, Tensor x, int64_t function, int64_t variant) {
    const int64_t n = x.numel();
    float* to = vector<float>("out", out, ScalarType::Float, n);
    numbered(variant).elementary(function, vector<const float>("x", x, ScalarType::Float, n), to, n);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hsd_cpu, CompositeExplicitAutograd, m) { m.impl("facts", TORCH_BOX(&facts)); }

STABLE_TORCH_LIBRARY_IMPL(hsd_cpu, CPU, m) {
    m.impl("statistics", TORCH_BOX(&statistics));
    m.impl("gradient", TORCH_BOX(&gradient));
    m.impl("project_out", TORCH_BOX(&project_out));
    m.impl("accumulate", TORCH_BOX(&accumulate));
    m.impl("column_norms", TORCH_BOX(&column_norms));
    m.impl("take_columns", TORCH_BOX(&take_columns));
    m.impl("elementary", TORCH_BOX(&elementary));
}
