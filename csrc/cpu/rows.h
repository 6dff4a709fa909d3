// The two row passes, for the vector of this translation unit. Mathematics: hsd_kernels/divergence.py.
//
// A row is read in blocks of columns that stay in the first-level cache. A logit becomes y with z = kappa * y: y minus
// its maximum is exact for large probabilities, and the temperature multiplies that difference, not a large logit.
// Sums over the vocabulary are fp32 within a lane, of at most TERMS terms where a log-sum comes from them, and double
// from there.
#pragma once

#include "elementary.h"
#include "passes.h"

namespace {

constexpr int64_t BLOCK = 2048;
constexpr int64_t TERMS = 128;  // the rounding error of a log-sum grows with it
// Each loop asks for the next block while it computes on one, since the hardware's own prefetching stops at a page.
constexpr float INF = __builtin_inff();
// Where a running maximum starts: finite, since a whole block may be -inf and exp(-inf - -inf) is NaN.
constexpr float LOWEST = -3.0e38f;

HSD_INLINE int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// The first n < LANES elements, zeros behind them.
template <class T>
HSD_INLINE F load_some(const T* p, int64_t n) {
    T some[LANES] = {};
    memcpy(some, p, n * sizeof(T));
    return load(some);
}

template <class T>
HSD_INLINE void store_some(T* p, F a, int64_t n) {
    T some[LANES];
    store(some, a);
    memcpy(p, some, n * sizeof(T));
}

// Reading: y of a block of columns.

template <class X, class B>
static void read_as(const X* x, const X* plus, const B* bias, int64_t n, const Rows& p, float* y) {
    const F in_scale = all(p.in_scale);
    const auto formed = [&](F a) __attribute__((always_inline)) {
        a = a * in_scale;
        return p.has_softcap ? tanh(a) : a;
    };
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        F a = load(x + i);
        if (plus) a = a + load(plus + i);
        if (bias) a = a + load(bias + i);
        store(y + i, formed(a));
    }
    if (i < n) {
        F a = load_some(x + i, n - i);
        if (plus) a = a + load_some(plus + i, n - i);
        if (bias) a = a + load_some(bias + i, n - i);
        store(y + i, formed(a));
        // A probability of zero on both sides, which no sum sees.
        for (int64_t k = n; k < round_up(n); k++) y[k] = -INF;
    }
}

// y of the columns [start, start + n) of a side, -inf behind them up to a multiple of LANES: the logits themselves
// where that is what y is, `buffer` else. `plus` is another side to add, or null.
template <class X>
static const float* read_of(
    const Rows& p, const Logits& side, const Logits* plus, int64_t row, int64_t start, int64_t n, float* buffer
) {
    const X* x = (const X*)side.x + row * side.stride + start;
    const X* other = plus ? (const X*)plus->x + row * plus->stride + start : nullptr;
    const bool formed = side.bias || plus || p.has_softcap || p.in_scale != 1.0f || n % LANES;
    if (!p.is_bf16 && !formed) return (const float*)x;
    if (!side.bias) {
        read_as<X, float>(x, other, nullptr, n, p, buffer);
    } else if (side.bias_is_bf16) {
        read_as(x, other, (const bf16*)side.bias + start, n, p, buffer);
    } else {
        read_as(x, other, (const float*)side.bias + start, n, p, buffer);
    }
    return buffer;
}

static const float* read_student(const Rows& p, int64_t row, int64_t start, int64_t n, float* buffer) {
    const Logits* plus = p.is_linear ? &p.teacher : nullptr;
    return p.is_bf16 ? read_of<bf16>(p, p.student, plus, row, start, n, buffer)
                     : read_of<float>(p, p.student, plus, row, start, n, buffer);
}

static const float* read_teacher(const Rows& p, int64_t row, int64_t start, int64_t n, float* buffer) {
    return p.is_bf16 ? read_of<bf16>(p, p.teacher, nullptr, row, start, n, buffer)
                     : read_of<float>(p, p.teacher, nullptr, row, start, n, buffer);
}

// The columns [start, start + n) of both sides, as read.
struct Block {
    const float* y_s;
    const float* y_t;
    int64_t start;
    int64_t n;
    const char* next_s;  // the logits of the next block
    const char* next_t;
    int64_t itemsize;

    inline __attribute__((always_inline)) void prefetch(int64_t i) const {
        __builtin_prefetch(next_s + i * itemsize);
        __builtin_prefetch(next_t + i * itemsize);
    }
};

template <class Each>
HSD_INLINE void for_blocks(const Rows& p, int64_t row, const Each& each) {
    alignas(64) float buffer_s[BLOCK], buffer_t[BLOCK];
    const int64_t itemsize = p.is_bf16 ? sizeof(bf16) : sizeof(float);
    const char* x_s = (const char*)p.student.x + row * p.student.stride * itemsize;
    const char* x_t = (const char*)p.teacher.x + row * p.teacher.stride * itemsize;
    for (int64_t start = 0; start < p.vocab; start += BLOCK) {
        const int64_t n = p.vocab - start < BLOCK ? p.vocab - start : BLOCK;
        const int64_t next = (start + BLOCK) * itemsize;
        const float* y_s = read_student(p, row, start, n, buffer_s);
        const float* y_t = read_teacher(p, row, start, n, buffer_t);
        each(Block{y_s, y_t, start, n, x_s + next, x_t + next, itemsize});
    }
}

// 0 log 0 = 0: a probability of exactly zero may meet an undefined ratio. A NaN stays.
HSD_INLINE F times(F p, F log_ratio) { return keep(not_zero(p), p * log_ratio); }

// (f, g) of the table in divergence.py. BOUND: with a clip or a floor, either of which may be infinitely far.
template <Divergence D, bool BOUND>
HSD_INLINE void summands(F ls, F lt, F ps, const Rows& p, F* f, F* g) {
    if (BOUND) {
        const F least = ls + all(p.log_floor);
        lt = select(less(lt, least), least, lt);  // keeps a NaN of lt
    }
    const F pt = exp(lt);
    F clipped_g = all(0.0f);
    if (D == FORWARD_KL) {
        *f = BOUND ? times(pt, lt - ls) : all(0.0f);  // without a bound only g is asked for
        *g = ps - pt;
        clipped_g = ps;
    } else if (D == REVERSE_KL) {
        *f = *g = times(ps, ls - lt);
        clipped_g = all(0.0f) - ps;
    } else {
        const F d = lt - ls;
        const F share = select(less(all(0.0f), d), all(1.0f - p.beta), all(p.beta));
        const F mixed = log1p(share * expm1(all(0.0f) - abs(d)));
        // min(0, a) keeps a NaN of a, which log1p does not.
        *g = all(1.0f - p.beta) * times(ps, min(all(0.0f), all(0.0f) - d) - mixed);
        *f = *g + all(p.beta) * times(pt, min(all(0.0f), d) - mixed);
    }
    if (BOUND && p.is_nonnegative) {
        if (D != JSD) *f = *f + (D == FORWARD_KL ? ps - pt : pt - ps);
        clipped_g = all(0.0f);
    }
    if (BOUND) {
        const M clipped = less(all(p.clip), *f);
        *f = select(clipped, all(p.clip), *f);
        *g = select(clipped, clipped_g, *g);
    }
}

// Statistics.

struct Side {
    float m = LOWEST;  // running maximum of y
    double l = 0.0;    // sum of e = exp(kappa (y - m))
    double a = 0.0;    // sum of e (y - m), for the entropy
};

struct Sums {
    Side s;
    Side t;
    double d = 0.0;  // sum of e_p ((y_p - m_p) - (y_q - m_q)) for KL(p || q)
};

HSD_INLINE float block_max(const float* y, int64_t n) {
    F top[4] = {all(-INF), all(-INF), all(-INF), all(-INF)};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; k++) top[k] = max(load(y + i + k * LANES), top[k]);
    for (; i < n; i += LANES) top[0] = max(load(y + i), top[0]);
    return max_of(max(max(top[0], top[1]), max(top[2], top[3])));
}

// exp(-kappa * rise), zero where a vector's exp is: a mass that one lane would not see is not seen here.
static double shrink(double rise, double kappa) {
    const double x = -kappa * rise;
    return x < -87.3365 ? 0.0 : __builtin_exp(x);
}

// The running sums after the maxima of a block, if one rose.
template <bool ONE_PASS, Divergence D>
static void raise_maxima(Sums& sums, float top_s, float top_t, double kappa) {
    if (!(top_s > sums.s.m)) top_s = sums.s.m;
    if (!(top_t > sums.t.m)) top_t = sums.t.m;
    const double rise_s = (double)top_s - sums.s.m, rise_t = (double)top_t - sums.t.m;
    if (rise_s == 0.0 && rise_t == 0.0) return;
    const double w_s = shrink(rise_s, kappa), w_t = shrink(rise_t, kappa);
    if (ONE_PASS) {
        // d is infinite where q is -inf and p is not: zero when a later maximum makes p negligible.
        const double w = D == FORWARD_KL ? w_t : w_s;
        const double shift = D == FORWARD_KL ? (rise_s - rise_t) * sums.t.l : (rise_t - rise_s) * sums.s.l;
        sums.d = w == 0.0 ? 0.0 : w * (sums.d + shift);
    }
    sums.s = {top_s, w_s * sums.s.l, w_s * (sums.s.a - rise_s * sums.s.l)};
    sums.t = {top_t, w_t * sums.t.l, w_t * (sums.t.a - rise_t * sums.t.l)};
}

// The sum of all from a rounded one and that of all but the maxima, which add 1 each.
static double with_tops(float rounded, float rest) {
    return __builtin_nearbyint((double)rounded - (double)rest) + (double)rest;
}

// One read: maxima, sums of exponentials, entropies and, with ONE_PASS, the KL, which needs only E[z_p - z_q] and both
// log-sum-exps.
template <bool ONE_PASS, Divergence D>
static Sums first_pass(const Rows& p, int64_t row) {
    Sums sums;
    const F kappa = all(p.kappa);
    for_blocks(p, row, [&](const Block& b) __attribute__((always_inline)) {
        const int64_t n = round_up(b.n);
        const float highest_s = block_max(b.y_s, n), highest_t = block_max(b.y_t, n);
        raise_maxima<ONE_PASS, D>(sums, highest_s, highest_t, p.kappa);
        // The maximum adds 1. In one lane with it, all that is below 6e-8 would be lost: its block is summed apart.
        const bool has_top = highest_s == sums.s.m || highest_t == sums.t.m;
        const F m_s = all(sums.s.m), m_t = all(sums.t.m);
        for (int64_t start = 0; start < n; start += TERMS * LANES) {
            const int64_t stop = n - start < TERMS * LANES ? n : start + TERMS * LANES;
            F l_s = all(0.0f), l_t = l_s, a_s = l_s, a_t = l_s, d = l_s, rest_s = l_s, rest_t = l_s;
            for (int64_t i = start; i < stop; i += LANES) {
                b.prefetch(i);
                const F u_s = load(b.y_s + i) - m_s, u_t = load(b.y_t + i) - m_t;
                M some_s, some_t;
                const F e_s = exp(kappa * u_s, &some_s), e_t = exp(kappa * u_t, &some_t);
                l_s = l_s + e_s;
                l_t = l_t + e_t;
                if (has_top) {
                    rest_s = rest_s + keep(not_zero(u_s), e_s);
                    rest_t = rest_t + keep(not_zero(u_t), e_t);
                }
                a_s = add_product_where(some_s, e_s, u_s, a_s);
                a_t = add_product_where(some_t, e_t, u_t, a_t);
                if (ONE_PASS && D == FORWARD_KL) d = add_product_where(some_t, e_t, u_t - u_s, d);
                if (ONE_PASS && D == REVERSE_KL) d = add_product_where(some_s, e_s, u_s - u_t, d);
            }
            sums.s.l += has_top ? with_tops(sum(l_s), sum(rest_s)) : sum(l_s);
            sums.t.l += has_top ? with_tops(sum(l_t), sum(rest_t)) : sum(l_t);
            sums.s.a += sum(a_s);
            sums.t.a += sum(a_t);
            if (ONE_PASS) sums.d += sum(d);
        }
    });
    return sums;
}

// log p = kappa (y - top) - log_sum. The difference is exact where p is large; kappa top + log_sum as one number would
// be rounded at its own size.
struct Normalizer {
    float top;
    float log_sum;
};

struct LogProbs {
    F kappa, top, minus_log_sum;
    LogProbs(const Rows& p, Normalizer n) : kappa(all(p.kappa)), top(all(n.top)), minus_log_sum(all(-n.log_sum)) {}
    inline __attribute__((always_inline)) F operator()(F y) const { return fma(y - top, kappa, minus_log_sum); }
};

struct Summed {
    double f = 0.0;
    double g = 0.0;
    double ps = 0.0;
};

// The second read of the JSD, a clip and a floor, whose summands need both normalizers.
template <Divergence D, bool BOUND>
static Summed second_pass(const Rows& p, int64_t row, Normalizer student, Normalizer teacher) {
    Summed sums;
    const LogProbs log_s(p, student), log_t(p, teacher);
    for_blocks(p, row, [&](const Block& b) __attribute__((always_inline)) {
        F f_sum = all(0.0f), g_sum = f_sum, ps_sum = f_sum;
        for (int64_t i = 0; i < b.n; i += LANES) {
            b.prefetch(i);
            const F ls = log_s(load(b.y_s + i)), lt = log_t(load(b.y_t + i));
            const F ps = exp(ls);
            F f, g;
            summands<D, BOUND>(ls, lt, ps, p, &f, &g);
            f_sum = f_sum + f;
            g_sum = g_sum + g;
            ps_sum = ps_sum + ps;
        }
        sums.f += sum(f_sum);
        sums.g += sum(g_sum);
        sums.ps += sum(ps_sum);
    });
    return sums;
}

static void statistics_row(const Rows& p, const Statistics& s, int64_t row) {
    const bool one_pass = p.divergence != JSD && !p.is_bounded;
    const Sums sums = !one_pass                       ? first_pass<false, FORWARD_KL>(p, row)
                      : p.divergence == FORWARD_KL ? first_pass<true, FORWARD_KL>(p, row)
                                                   : first_pass<true, REVERSE_KL>(p, row);
    const double kappa = p.kappa;
    const double l_s = sums.s.l, l_t = sums.t.l, log_s = __builtin_log(l_s), log_t = __builtin_log(l_t);
    const Normalizer student{sums.s.m, (float)log_s}, teacher{sums.t.m, (float)log_t};

    double kl, grad_sum = 0.0;
    if (one_pass && p.divergence == FORWARD_KL) {
        kl = kappa * sums.d / l_t - __builtin_log1p((l_t - l_s) / l_s);
    } else if (one_pass) {
        kl = kappa * sums.d / l_s - __builtin_log1p((l_s - l_t) / l_t);
        // G with the rounded log-sums that the gradient will use: ps (ls - lt - G) does not see an error that is in
        // both ls - lt and G.
        grad_sum = kappa * sums.d / l_s - ((double)student.log_sum - teacher.log_sum);
    } else {
        const Summed summed = p.divergence == FORWARD_KL   ? second_pass<FORWARD_KL, true>(p, row, student, teacher)
                              : p.divergence == REVERSE_KL ? second_pass<REVERSE_KL, true>(p, row, student, teacher)
                              : p.is_bounded                 ? second_pass<JSD, true>(p, row, student, teacher)
                                                           : second_pass<JSD, false>(p, row, student, teacher);
        kl = summed.f;
        grad_sum = summed.g / summed.ps;  // ps sums to 1 but for the rounding of the log-sum
    }

    s.kl[row] = (float)kl;
    if (s.targets) {
        const int64_t target = s.targets[row];
        const bool inside = 0 <= target && target < p.vocab;
        float buffer[LANES];
        const float y_s = inside ? read_student(p, row, target, 1, buffer)[0] : __builtin_nanf("");
        const float y_t = inside ? read_teacher(p, row, target, 1, buffer)[0] : __builtin_nanf("");
        s.student_logps[row] = (float)(kappa * ((double)y_s - sums.s.m) - log_s);
        s.teacher_logps[row] = (float)(kappa * ((double)y_t - sums.t.m) - log_t);
    }
    s.student_entropy[row] = (float)(log_s - kappa * sums.s.a / l_s);
    s.teacher_entropy[row] = (float)(log_t - kappa * sums.t.a / l_t);
    s.student_lse[row] = (float)(kappa * sums.s.m + log_s);
    s.teacher_lse[row] = (float)(kappa * sums.t.m + log_t);
    s.student_top[row] = student.top;
    s.teacher_top[row] = teacher.top;
    s.student_log_sum[row] = student.log_sum;
    s.teacher_log_sum[row] = teacher.log_sum;
    s.grad_sum[row] = (float)grad_sum;
}

// Gradient.

template <Divergence D, bool BOUND, bool SOFTCAP, class OUT>
static void gradient_row_as(const Rows& p, const Gradient& g, int64_t row) {
    const LogProbs log_s(p, {g.student_top[row], g.student_log_sum[row]});
    const LogProbs log_t(p, {g.teacher_top[row], g.teacher_log_sum[row]});
    const F grad_sum = all(g.grad_sum[row]), scale = all((float)(g.weights[row] * g.chain));
    OUT* out = (OUT*)g.out + row * g.stride;
    for_blocks(p, row, [&](const Block& b) __attribute__((always_inline)) {
        const auto gradient = [&](int64_t i) __attribute__((always_inline)) {
            b.prefetch(i);
            const F y_s = load(b.y_s + i);
            const F ls = log_s(y_s), lt = log_t(load(b.y_t + i));
            const F ps = exp(ls);
            F f, dz;
            summands<D, BOUND>(ls, lt, ps, p, &f, &dz);
            if (BOUND || D != FORWARD_KL) dz = dz - ps * grad_sum;
            dz = dz * scale;
            return SOFTCAP ? dz * (all(1.0f) - y_s * y_s) : dz;
        };
        int64_t i = 0;
        for (; i + LANES <= b.n; i += LANES) store(out + b.start + i, gradient(i));
        if (i < b.n) store_some(out + b.start + i, gradient(i), b.n - i);
    });
}

template <Divergence D, bool BOUND>
static void gradient_row_of(const Rows& p, const Gradient& g, int64_t row) {
    if (p.has_softcap) {
        g.out_is_bf16 ? gradient_row_as<D, BOUND, true, bf16>(p, g, row)
                      : gradient_row_as<D, BOUND, true, float>(p, g, row);
    } else {
        g.out_is_bf16 ? gradient_row_as<D, BOUND, false, bf16>(p, g, row)
                      : gradient_row_as<D, BOUND, false, float>(p, g, row);
    }
}

static void gradient_row(const Rows& p, const Gradient& g, int64_t row) {
    if (g.weights[row] == 0.0f) {  // also where 0 times the gradient would be NaN
        const int64_t itemsize = g.out_is_bf16 ? sizeof(bf16) : sizeof(float);
        memset((char*)g.out + row * g.stride * itemsize, 0, p.vocab * itemsize);
        return;
    }
    if (p.divergence == FORWARD_KL) {
        p.is_bounded ? gradient_row_of<FORWARD_KL, true>(p, g, row) : gradient_row_of<FORWARD_KL, false>(p, g, row);
    } else if (p.divergence == REVERSE_KL) {
        p.is_bounded ? gradient_row_of<REVERSE_KL, true>(p, g, row) : gradient_row_of<REVERSE_KL, false>(p, g, row);
    } else {
        p.is_bounded ? gradient_row_of<JSD, true>(p, g, row) : gradient_row_of<JSD, false>(p, g, row);
    }
}

static void elementary(int64_t function, const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t some = n - i < LANES ? n - i : LANES;
        const F a = load_some(x + i, some);
        const F b = function == 0 ? exp(a) : function == 1 ? expm1(a) : function == 2 ? log1p(a) : tanh(a);
        store_some(out + i, b, some);
    }
}

}  // namespace
