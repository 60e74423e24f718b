// The few operations that differ between vector units. Arithmetic is the compilers' own, on vector types.
#pragma once

#if defined(__AVX512F__)

#include <immintrin.h>
#define UNROLL_ISA isa_v4
#define UNROLL_ISA_NAME "x86-64-v4"
namespace {
using Vector = __m512;
constexpr int width = 16;
constexpr int registers = 32;
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vector load_first(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }
inline void store_first(float* to, Vector value, int64_t count) { _mm512_mask_storeu_ps(to, first(count), value); }
inline Vector splat(float value) { return _mm512_set1_ps(value); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
}  // namespace

#elif defined(__AVX2__)

#include <immintrin.h>
#define UNROLL_ISA isa_v3
#define UNROLL_ISA_NAME "x86-64-v3"
namespace {
using Vector = __m256;
constexpr int width = 8;
constexpr int registers = 16;
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load_first(const float* from, int64_t count) { return _mm256_maskload_ps(from, first(count)); }
inline void store_first(float* to, Vector value, int64_t count) { _mm256_maskstore_ps(to, first(count), value); }
inline Vector splat(float value) { return _mm256_set1_ps(value); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
}  // namespace

#elif defined(__aarch64__)

#include <arm_neon.h>
#define UNROLL_ISA isa_neon
#define UNROLL_ISA_NAME "aarch64"
namespace {
using Vector = float32x4_t;
constexpr int width = 4;
constexpr int registers = 32;
inline Vector load(const float* from) { return vld1q_f32(from); }
inline void store(float* to, Vector value) { vst1q_f32(to, value); }
inline Vector load_first(const float* from, int64_t count) {
    float values[width] = {};
    for (int64_t index = 0; index < count; index++) values[index] = from[index];
    return load(values);
}
inline void store_first(float* to, Vector value, int64_t count) {
    float values[width];
    store(values, value);
    for (int64_t index = 0; index < count; index++) to[index] = values[index];
}
inline Vector splat(float value) { return vdupq_n_f32(value); }
inline Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
}  // namespace

#else
#error "step.cpp needs AVX2 with FMA, AVX-512 or NEON"
#endif

#define UNROLL_INLINE inline __attribute__((always_inline))

namespace {

typedef int Bits __attribute__((vector_size(width * 4)));

// COUNT vectors that go through the same operations in lockstep. Each operation on one vector waits for the one before,
// and a CPU's scheduler does not look far enough ahead to overlap two vectors, so the code interleaves them.
template <int COUNT>
struct Pack {
    Vector of[COUNT];

    template <class Function>
    static UNROLL_INLINE Pack map(Function function) {
        Pack result;
#pragma GCC unroll 8
        for (int index = 0; index < COUNT; index++) result.of[index] = function(index);
        return result;
    }
    friend UNROLL_INLINE Pack operator+(const Pack& a, const Pack& b) {
        return map([&](int i) { return a.of[i] + b.of[i]; });
    }
    friend UNROLL_INLINE Pack operator-(const Pack& a, const Pack& b) {
        return map([&](int i) { return a.of[i] - b.of[i]; });
    }
    friend UNROLL_INLINE Pack operator*(const Pack& a, const Pack& b) {
        return map([&](int i) { return a.of[i] * b.of[i]; });
    }
    friend UNROLL_INLINE Pack operator/(const Pack& a, const Pack& b) {
        return map([&](int i) { return a.of[i] / b.of[i]; });
    }
    static UNROLL_INLINE Pack constant(float value) {
        return map([&](int) { return splat(value); });
    }
};

template <int N>
UNROLL_INLINE Pack<N> fma(const Pack<N>& a, const Pack<N>& b, const Pack<N>& c) {
    return Pack<N>::map([&](int i) { return fma(a.of[i], b.of[i], c.of[i]); });
}

// a < b ? yes : no; `no` if a or b is NaN.
template <int N>
UNROLL_INLINE Pack<N> select_less(const Pack<N>& a, const Pack<N>& b, const Pack<N>& yes, const Pack<N>& no) {
    return Pack<N>::map([&](int i) { return select_less(a.of[i], b.of[i], yes.of[i], no.of[i]); });
}

template <int N>
UNROLL_INLINE Pack<N> magnitude(const Pack<N>& x) {
    return Pack<N>::map([&](int i) { return (Vector)((Bits)x.of[i] & 0x7fffffff); });
}

// `value`, which is not negative, with the sign of `sign`.
template <int N>
UNROLL_INLINE Pack<N> with_sign(const Pack<N>& value, const Pack<N>& sign) {
    return Pack<N>::map([&](int i) {
        return (Vector)((Bits)value.of[i] | ((Bits)sign.of[i] & static_cast<int>(0x80000000u)));
    });
}

// 2^n, of floats that hold n + 127 in their low bits.
template <int N>
UNROLL_INLINE Pack<N> power_of_two(const Pack<N>& biased) {
    return Pack<N>::map([&](int i) { return (Vector)((Bits)biased.of[i] << 23); });
}

template <int N>
UNROLL_INLINE Pack<N> least(const Pack<N>& x, const Pack<N>& limit) {
    return select_less(limit, x, limit, x);
}

}  // namespace
