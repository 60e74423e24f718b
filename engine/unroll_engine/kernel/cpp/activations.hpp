// tanh and sigmoid: one fixed sequence of IEEE operations, so the bits are the same on every vector unit.
//
// At most 2 ulp from the true value over all of float32, monotonic, exact at saturation; NaN gives NaN. The
// coefficients are minimax fits (Lawson's algorithm) of this project; the argument reduction is Cody and Waite's (1980).
#pragma once

#include "vector.hpp"

namespace {

// e^y = scale + scale p, with scale = 2^(n - SHIFT). In two parts, so that the sum is rounded as late as possible.
template <int N>
struct Exponential {
    Pack<N> scale, p;
};

// y is from 0 to LIMIT, which is at most 104. SHIFT keeps the scale a normal number.
template <int LIMIT, int SHIFT, int N>
UNROLL_INLINE Exponential<N> exponential(const Pack<N>& y) {
    constexpr auto constant = Pack<N>::constant;
    const float log2e = 0x1.715476p+0f, ln2 = 0x1.62e43p-1f, ln2_rest = -0x1.05c61p-29f;
    // Adding 1.5 2^23 rounds to an integer and leaves it, plus the exponent's bias, in the low bits.
    const Pack<N> rounder = constant(0x1.8p23f + static_cast<float>(127 - SHIFT));
    const Pack<N> rounded = fma(y, constant(log2e), rounder);
    const Pack<N> n = rounded - rounder;
    Pack<N> r = fma(n, constant(-ln2), y);
    if (LIMIT > 32) r = fma(n, constant(-ln2_rest), r);  // for smaller limits 2^-29 n is negligible
    // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, to 2^-28 of e^r.
    Pack<N> q = constant(0x1.6a23cep-10f);
    q = fma(q, r, constant(0x1.123a2p-7f));
    q = fma(q, r, constant(0x1.5558f2p-5f));
    q = fma(q, r, constant(0x1.555492p-3f));
    q = fma(q, r, constant(0x1.fffffcp-2f));
    return {power_of_two(rounded), fma(r * r, q, r)};
}

// |x| < 0.55: an odd polynomial. Above: 1 - 2 / (e^(2|x|) + 1). From 9.011 on that rounds to 1.
struct Tanh {
    template <int N>
    UNROLL_INLINE Pack<N> operator()(const Pack<N>& x) const {
        constexpr auto constant = Pack<N>::constant;
        const Pack<N> size = magnitude(x), t = x * x;
        Pack<N> odd = constant(-0x1.8258560p-8f);
        odd = fma(odd, t, constant(0x1.54b8a0p-6f));
        odd = fma(odd, t, constant(-0x1.b898dep-5f));
        odd = fma(odd, t, constant(0x1.1109aep-3f));
        odd = fma(odd, t, constant(-0x1.55553ep-2f));
        odd = fma(size * t, odd, size);
        const Pack<N> clamped = least(size, constant(10.0f)), one = constant(1.0f);
        const Exponential<N> e = exponential<20, 0>(clamped + clamped);
        const Pack<N> large = one - constant(2.0f) / fma(e.scale, e.p, e.scale + one);
        return with_sign(select_less(size, constant(0.55f), odd, large), x);
    }
};

// q = 1 / (1 + e^|x|) where x < 0, else 1 - q. All scaled by 2^-64, so that e^|x| does not overflow where q is a denormal.
struct Sigmoid {
    template <int N>
    UNROLL_INLINE Pack<N> operator()(const Pack<N>& x) const {
        constexpr auto constant = Pack<N>::constant;
        const Pack<N> one = constant(0x1p-64f);
        const Exponential<N> e = exponential<104, 64>(least(magnitude(x), constant(104.0f)));
        const Pack<N> q = one / (fma(e.scale, e.p, one) + e.scale);
        return select_less(x, constant(0.0f), q, constant(1.0f) - q);
    }
};

struct Relu {
    template <int N>
    UNROLL_INLINE Pack<N> operator()(const Pack<N>& x) const {
        return select_less(x, Pack<N>::constant(0.0f), Pack<N>::constant(0.0f), x);
    }
};

}  // namespace
