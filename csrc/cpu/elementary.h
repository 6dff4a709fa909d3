// exp and its relatives for vectors. exp(x) - 1 and log(1 + x) as written would be inaccurate near 0.
#pragma once

#include "simd.h"

namespace {

// exp(x) = p * 2^n with p in [0.707, 1.415] and p - 1 to relative accuracy.
struct Power {
    F p_minus_1;
    F two_n;
};

// For x in [-87.3365, 88]; a NaN gives a NaN p_minus_1.
HSD_INLINE Power power(F x) {
    // Adding 1.5 * 2^23 rounds to an integer, which the last bits then hold; with 127 they are the exponent of 2^n.
    const F shift = all(12582912.0f + 127.0f);
    const F shifted = fast_fma(x, all(1.44269504088896341f), shift);
    const F n = shifted - shift;
    // ln 2 in two parts, the first of 9 bits: n times it is exact also without FMA.
    const F r = fast_fma(n, all(2.12194440e-4f), fast_fma(n, all(-0.693359375f), x));
    // Weighted least-squares fit of (expm1(r) - r) / r^2: exp(r) to 4.4e-9 on [-ln 2 / 2, ln 2 / 2].
    const F r2 = r * r;
    F q = fast_fma(r, all(0.00836878084f), all(0.0416683927f));
    q = fast_fma(r2, all(0.00138144672f), q);
    q = fast_fma(r2, q, fast_fma(r, all(0.166665196f), all(0.49999994f)));
    return {fast_fma(r2, q, r), shifted_left_23(shifted)};
}

// exp(x) for x <= 88, 0 for x < -87.3365: results below 2^-126 would cost a trap into microcode in every product.
HSD_INLINE F exp(F x, M* not_zero) {
    const Power e = power(x);
    *not_zero = not_less(x, all(-87.3365f));
    return keep(*not_zero, fast_fma(e.p_minus_1, e.two_n, e.two_n));
}

HSD_INLINE F exp(F x) {
    M not_zero;
    return exp(x, &not_zero);
}

// exp(x) - 1 for x <= 88.
HSD_INLINE F expm1(F x) {
    const Power e = power(max(all(-87.0f), x));
    return fast_fma(e.p_minus_1, e.two_n, e.two_n - all(1.0f));
}

// log(1 + x) for -1 <= x <= 0, -87.3 at -1; does not keep a NaN.
HSD_INLINE F log1p(F x) {
    const F u = max(x + all(1.0f), all(1.17549435e-38f));
    F mantissa;
    const F k = split_exponent(u, 0x3f3504f3, &mantissa);  // mantissa in [sqrt 1/2, sqrt 2)
    const F f = select(not_zero(k), mantissa - all(1.0f), x);
    // log(1 + f) = 2 atanh(f / (2 + f)). The series' next term at |w| = 0.172 is 2e-9 of the result.
    const F w = f / (f + all(2.0f));
    const F w2 = w * w;
    F series = fast_fma(w2, all(1.0f / 9.0f), all(1.0f / 7.0f));
    series = fast_fma(series, w2, all(1.0f / 5.0f));
    series = fast_fma(series, w2, all(1.0f / 3.0f));
    const F log = all(2.0f) * fast_fma(series * w2, w, w);
    return fast_fma(k, all(0.693147180559945309f), log);
}

// -expm1(-2 |x|) / (2 + expm1(-2 |x|)) with the sign of x: relative accuracy also near 0.
HSD_INLINE F tanh(F x) {
    const F e = expm1(all(-2.0f) * abs(x));
    const F y = e / (e + all(2.0f));
    return select(less(x, all(0.0f)), y, all(0.0f) - y);
}

}  // namespace
