// The compiler's portable vectors, and the few operations for which intrinsics are faster.
//
// MULTIFIRE_ISA names the build, MULTIFIRE_LANES is its number of floats in a register (see CMakeLists.txt).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

// For what lies in the inner loops: a call would move tiles from registers to memory.
#define MULTIFIRE_INLINE inline __attribute__((always_inline))

constexpr int kLanes = MULTIFIRE_LANES;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef float Narrow __attribute__((vector_size(2 * kLanes)));  // as many floats as doubles fit into a register
typedef double Wide __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline Vec splat(float value) { return Vec{} + value; }

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The compiler splits these conversions in two on AVX-512, hence the intrinsics.
inline Bits widen(HalfBits half) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)half);
#else
  return __builtin_convertvector(half, Bits);
#endif
}

inline Mask widen(Bytes bytes) {
#if defined(__AVX512F__)
  return (Mask)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  return (Mask)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
#else
  return __builtin_convertvector(bytes, Mask);
#endif
}

inline HalfBits narrow(Bits bits) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, HalfBits);
#endif
}

// The low bytes of integers.
inline Bytes narrow(Mask whole) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)whole);
#else
  return __builtin_convertvector(whole, Bytes);
#endif
}

inline bool any(Mask lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
  for (int lane = 0; lane < kLanes; ++lane)
    if (lanes[lane]) return true;
  return false;
#endif
}

// a·b + c, rounded once if the processor can. For gradients and sums only: spikes must round like the reference.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Wide fused(Wide a, Wide b, Wide c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec load(const bf16* from) {
  HalfBits half;
  std::memcpy(&half, from, sizeof half);
  return (Vec)(widen(half) << 16);
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// Rounds to nearest even. A NaN stays a NaN: its quiet bit is set, and the carry of the rounding stops below it.
inline void store(bf16* to, Vec value) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(value);
#else
  const Bits bits = (Bits)value;
  const HalfBits half = narrow((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
  std::memcpy(to, &half, sizeof half);
}

inline Vec magnitude(Vec v) { return (Vec)((Mask)v & 0x7fffffff); }

// e^x for x <= 0, with a relative error below 2e-7, and 0 below -86: for gradients. Cephes' polynomial for expf.
inline Vec exp_of(Vec x) {
  const Vec clamped = x < -86 ? splat(-86) : x;
  const Vec shifter = splat(12582912.0f);  // 1.5·2^23: adding it rounds to an integer, which stays in the low bits
  const Vec shifted = clamped * 1.44269504f + shifter, n = shifted - shifter;
  const Vec r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), clamped));
  Vec p = splat(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fused(p, r, splat(next));
  p = fused(p, r * r, r) + 1;
  const Vec result = (Vec)((Mask)p + (((Mask)shifted - (Mask)shifter) << 23));
  return x < -86 ? splat(0) : x == x ? result : x;
}

inline float as_float(float value) { return value; }
inline float as_float(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline Narrow load_narrow(const float* from) {
  Narrow value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Narrow load_narrow(const bf16* from) {
  typedef uint16_t In __attribute__((vector_size(kLanes)));
  typedef uint32_t Out __attribute__((vector_size(2 * kLanes)));
  In half;
  std::memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
  return (Narrow)((Out)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
  return (Narrow)(__builtin_convertvector(half, Out) << 16);
#endif
}

inline Wide widen(Narrow value) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(value);
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(value);
#else
  return __builtin_convertvector(value, Wide);
#endif
}

inline Wide load_wide(const double* from) {
  Wide value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace
}  // namespace MULTIFIRE_ISA
}  // namespace multifire
