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
// a < b ? yes : no; `no` if a or b is NaN.
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

namespace {

typedef int Bits __attribute__((vector_size(width * 4)));

inline Vector magnitude(Vector x) { return (Vector)((Bits)x & 0x7fffffff); }
// `value`, which is not negative, with the sign of `sign`.
inline Vector with_sign(Vector value, Vector sign) {
    return (Vector)((Bits)value | ((Bits)sign & static_cast<int>(0x80000000u)));
}
inline Vector least(Vector x, Vector limit) { return select_less(limit, x, limit, x); }
inline Vector most(Vector x, Vector limit) { return select_less(x, limit, limit, x); }

}  // namespace
