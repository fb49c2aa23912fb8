// The inner loops for processors with AVX2. Pairs of products of bytes are added in 16 bits, as far as they cannot
// overflow: the layer says after which items they must be widened.
#ifndef MULTIFIRE_KERNELS_AVX2_H
#define MULTIFIRE_KERNELS_AVX2_H

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "kernels_portable.h"

namespace multifire_engine_impl {
namespace avx2 {

// Without FMA, so that no compiler fuses a product and a sum.
#define MULTIFIRE_AVX2 __attribute__((target("avx2")))
#define MULTIFIRE_AVX2_INLINE MULTIFIRE_AVX2 __attribute__((always_inline)) inline

MULTIFIRE_AVX2_INLINE __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
MULTIFIRE_AVX2_INLINE void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

MULTIFIRE_AVX2_INLINE __m256i four_bytes(const uint8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return _mm256_set1_epi32(bytes);
}

// Adds the int16 sums of pairs to the int32 sums; starts them again.
template <int Pixels>
MULTIFIRE_AVX2_INLINE void widen(__m256i (&pairs)[Pixels][2], int32_t* sums, bool is_first) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int p = 0; p < Pixels; ++p) {
    for (int half = 0; half < 2; ++half) {
      int32_t* to = sums + p * kBlock + half * 8;
      const __m256i wide = _mm256_madd_epi16(pairs[p][half], ones);
      store(to, is_first ? wide : _mm256_add_epi32(wide, load(to)));
      pairs[p][half] = _mm256_setzero_si256();
    }
  }
}

// Sums of one block for some pixels. Stride is pixel_stride if it is known when this is compiled, else 0.
template <int Pixels, int Stride>
MULTIFIRE_AVX2_INLINE void dense_part(const SumsArgs& a, const uint8_t* x, const int8_t* weights, int32_t* sums) {
  const int64_t stride = Stride ? Stride : a.pixel_stride;
  __m256i pairs[Pixels][2];
  for (int p = 0; p < Pixels; ++p) pairs[p][0] = pairs[p][1] = _mm256_setzero_si256();
  const int32_t* end = a.ends;
  for (int item = 0; item < a.items; ++end) {
    for (; item < *end; ++item, weights += kItemBytes) {
      const uint8_t* at = x + a.offsets[item];
      const __m256i low = load(weights), high = load(weights + kItemBytes / 2);
      for (int p = 0; p < Pixels; ++p) {
        const __m256i bytes = four_bytes(at + p * stride);
        pairs[p][0] = _mm256_add_epi16(pairs[p][0], _mm256_maddubs_epi16(bytes, low));
        pairs[p][1] = _mm256_add_epi16(pairs[p][1], _mm256_maddubs_epi16(bytes, high));
      }
    }
    widen<Pixels>(pairs, sums, end == a.ends);
  }
}

template <int Stride>
MULTIFIRE_AVX2 void dense_of(const SumsArgs& a, const uint8_t* x, const int8_t* weights, int32_t* sums) {
  int pixel = 0;
  for (; pixel + 4 <= a.pixels; pixel += 4)
    dense_part<4, Stride>(a, x + pixel * a.pixel_stride, weights, sums + pixel * kBlock);
  for (; pixel < a.pixels; ++pixel) dense_part<1, Stride>(a, x + pixel * a.pixel_stride, weights, sums + pixel * kBlock);
}

inline void dense_sums(const SumsArgs& a) {
  for (int frame = 0; frame < a.frames; ++frame) {
    for (int block = 0; block < a.blocks; ++block) {
      const uint8_t* x = a.x + frame * a.frame_stride;
      const int8_t* weights = a.weights + block * a.block_stride;
      if (a.pixel_stride == kBlock)
        dense_of<kBlock>(a, x, weights, a.part(frame, block));
      else
        dense_of<0>(a, x, weights, a.part(frame, block));
    }
  }
}

// Adds the int16 sums of 16 output channels to their int32 sums; starts them again.
MULTIFIRE_AVX2_INLINE void widen_block(__m256i& sums, int32_t* to) {
  store(to, _mm256_add_epi32(load(to), _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums))));
  store(to + 8, _mm256_add_epi32(load(to + 8), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sums, 1))));
  sums = _mm256_setzero_si256();
}

// An entry is a pair of channels, and a register holds one int16 sum for each of 16 output channels.
template <int Blocks>
MULTIFIRE_AVX2 void sparse_pixel(const SparseArgs& a, int pixel, int32_t* to) {
  __m256i sums[Blocks];
  for (int b = 0; b < Blocks; ++b) {
    sums[b] = _mm256_setzero_si256();
    store(to + b * kTile * kBlock, sums[b]);
    store(to + b * kTile * kBlock + 8, sums[b]);
  }
  for (int row = 0; row < a.kernel; ++row) {
    const int32_t* starts = a.starts + row * a.row_starts + pixel * a.stride;
    const int8_t* weights = a.weights + (row * a.kernel - a.column - pixel * a.stride) * a.column_size;
    for (int column = 0; column < a.kernel; column += a.span) {
      for (const Entry *entry = a.entries + starts[column], *end = a.entries + starts[column + a.span]; entry < end;
           ++entry) {
        const __m256i bytes = _mm256_set1_epi32(static_cast<int32_t>(entry->bytes));
        for (int b = 0; b < Blocks; ++b)
          sums[b] = _mm256_add_epi16(sums[b], _mm256_maddubs_epi16(bytes, load(weights + entry->weights + b * kBlock * 2)));
      }
      if (!a.widens[row * a.kernel + column + a.span - 1]) continue;
      for (int b = 0; b < Blocks; ++b) widen_block(sums[b], to + b * kTile * kBlock);
    }
  }
}

inline void sparse_sums(const SparseArgs& a) {
  const auto sum = a.blocks == 4 ? sparse_pixel<4> : sparse_pixel<2>;
  for (int pixel = 0; pixel < a.pixels; ++pixel) sum(a, pixel, a.sums + pixel * kBlock);
}

// Fires eight neurons; returns how many levels fire, in eight int32.
MULTIFIRE_AVX2_INLINE __m256i fire_eight(const FireArgs& a, int levels, const char* sums, __m256 scale, __m256 bias,
                                         __m256 decay, const __m256* thresholds, float* membranes) {
  const __m256 sum = a.has_floats ? _mm256_loadu_ps(reinterpret_cast<const float*>(sums)) : _mm256_cvtepi32_ps(load(sums));
  const __m256 current = _mm256_add_ps(_mm256_mul_ps(sum, scale), bias);
  __m256i fired = _mm256_setzero_si256();
  for (int k = 0; k < levels; ++k, membranes += kBlock) {
    const __m256 u = _mm256_add_ps(_mm256_mul_ps(decay, _mm256_loadu_ps(membranes)), current);
    const __m256 fires = _mm256_cmp_ps(u, thresholds[k], _CMP_GT_OQ);
    _mm256_storeu_ps(membranes, _mm256_andnot_ps(fires, u));
    fired = _mm256_sub_epi32(fired, _mm256_castps_si256(fires));
  }
  return fired;
}

template <int Levels>
MULTIFIRE_AVX2 void fire_mlf(const FireArgs& a) {
  const int levels = Levels ? Levels : a.neuron->levels;
  const __m256 decay = _mm256_set1_ps(a.neuron->decay);
  const __m256 scale[2] = {_mm256_loadu_ps(a.scale), _mm256_loadu_ps(a.scale + 8)};
  const __m256 bias[2] = {_mm256_loadu_ps(a.bias), _mm256_loadu_ps(a.bias + 8)};
  __m256 thresholds[Levels ? Levels : kMaxLevels];
  for (int k = 0; k < levels; ++k) thresholds[k] = _mm256_set1_ps(a.neuron->thresholds[k]);
  for (int pixel = 0; pixel < a.pixels; ++pixel) {
    const auto* sums = static_cast<const char*>(a.sums) + pixel * kBlock * 4;
    float* membranes = a.membranes + pixel * levels * kBlock;
    const __m256i low = fire_eight(a, levels, sums, scale[0], bias[0], decay, thresholds, membranes);
    const __m256i high = fire_eight(a, levels, sums + 32, scale[1], bias[1], decay, thresholds, membranes + 8);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    __m128i spikes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    auto* out = reinterpret_cast<__m128i*>(a.out + pixel * a.out_stride);
    if (a.adds) spikes = _mm_add_epi8(spikes, _mm_loadu_si128(out));
    _mm_storeu_si128(out, spikes);
  }
}

inline void fire(const FireArgs& a) { portable::fire_by_levels(a, fire_mlf<1>, fire_mlf<3>, fire_mlf<0>); }

MULTIFIRE_AVX2 inline void image_sums(const ImageArgs& a) { portable::image_loop<2>(a); }

inline bool runs_here() { return __builtin_cpu_supports("avx2"); }

inline int blocks_at_once(int) { return 1; }

constexpr Kernels kKernels = {"avx2",     runs_here, kLargestActivation, dense_sums, sparse_sums,
                              image_sums, fire,      blocks_at_once,     2,          0.25f, 0.5f};

}  // namespace avx2
}  // namespace multifire_engine_impl

#endif
#endif
