// The inner loops for processors with AVX-512 and VNNI, whose dot product adds four products of bytes to an int32.
#ifndef MULTIFIRE_KERNELS_AVX512_H
#define MULTIFIRE_KERNELS_AVX512_H

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "kernels_portable.h"

namespace multifire_engine_impl {
namespace avx512 {

#define MULTIFIRE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define MULTIFIRE_AVX512_INLINE MULTIFIRE_AVX512 __attribute__((always_inline)) inline

MULTIFIRE_AVX512_INLINE __m512i four_bytes(const uint8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// Sums of some pixels. Stride is pixel_stride if it is known when this is compiled, else 0.
template <int Blocks, int Pixels, int Stride>
MULTIFIRE_AVX512_INLINE void dense_part(const SumsArgs& a, int pixel) {
  const int64_t stride = Stride ? Stride : a.pixel_stride;
  const uint8_t* x = a.x + pixel * stride;
  const int8_t* weights = a.weights;
  __m512i sums[Blocks][Pixels];
  for (int b = 0; b < Blocks; ++b)
    for (int p = 0; p < Pixels; ++p) sums[b][p] = _mm512_setzero_si512();
  for (int item = 0; item < a.items; ++item, weights += kItemBytes) {
    const uint8_t* at = x + a.offsets[item];
    __m512i w[Blocks];
    for (int b = 0; b < Blocks; ++b) w[b] = _mm512_load_si512(weights + b * a.block_stride);
    for (int p = 0; p < Pixels; ++p) {
      const __m512i bytes = four_bytes(at + p * stride);
      for (int b = 0; b < Blocks; ++b) sums[b][p] = _mm512_dpbusd_epi32(sums[b][p], bytes, w[b]);
    }
  }
  for (int b = 0; b < Blocks; ++b)
    for (int p = 0; p < Pixels; ++p) _mm512_store_si512(a.sums + (b * kTile + pixel + p) * kBlock, sums[b][p]);
}

template <int Blocks, int Pixels, int Stride>
MULTIFIRE_AVX512_INLINE int dense_parts(const SumsArgs& a, int pixel) {
  for (; pixel + Pixels <= a.pixels; pixel += Pixels) dense_part<Blocks, Pixels, Stride>(a, pixel);
  return pixel;
}

// The widest part has 16 accumulators: enough to hide the latency of the dot products.
template <int Blocks, int Stride>
MULTIFIRE_AVX512 void dense_of(const SumsArgs& a) {
  int pixel = dense_parts<Blocks, 16 / Blocks, Stride>(a, 0);
  if (Blocks < 4) pixel = dense_parts < Blocks, Blocks<4 ? 4 : 1, Stride>(a, pixel);
  dense_parts<Blocks, 1, Stride>(a, pixel);
}

inline void dense_sums(const SumsArgs& a) {
  SumsArgs frame = a;
  for (int i = 0; i < a.frames; ++i, frame.x += a.frame_stride) {
    frame.sums = a.part(i, 0);
    if (a.blocks == 4)
      dense_of<4, 0>(frame);
    else if (a.blocks == 2)
      dense_of<2, 0>(frame);
    else if (a.pixel_stride == kBlock)
      dense_of<1, kBlock>(frame);
    else
      dense_of<1, 0>(frame);
  }
}

constexpr int kListBlocks = 4;  // two at a time are no faster than dense sums

MULTIFIRE_AVX512_INLINE void add_entry(const SparseArgs& a, const Entry& entry, const int8_t* weights,
                                       __m512i (&sums)[kListBlocks]) {
  const __m512i bytes = _mm512_set1_epi32(static_cast<int32_t>(entry.bytes));
  for (int b = 0; b < kListBlocks; ++b)
    sums[b] = _mm512_dpbusd_epi32(sums[b], bytes, _mm512_load_si512(weights + entry.weights + b * a.block_stride));
}

// Two sets of sums hide the latency of the dot products.
MULTIFIRE_AVX512 inline void sparse_sums(const SparseArgs& a) {
  for (int pixel = 0; pixel < a.pixels; ++pixel) {
    __m512i even[kListBlocks], odd[kListBlocks];
    for (int b = 0; b < kListBlocks; ++b) even[b] = odd[b] = _mm512_setzero_si512();
    for (int row = 0; row < a.kernel; ++row) {
      const int32_t* starts = a.starts + row * a.row_starts + pixel * a.stride;
      const int8_t* weights = a.weights + (row * a.kernel - a.column - pixel * a.stride) * a.column_size;
      const Entry *entry = a.entries + starts[0], *end = a.entries + starts[a.kernel];
      for (; entry + 1 < end; entry += 2) {
        add_entry(a, entry[0], weights, even);
        add_entry(a, entry[1], weights, odd);
      }
      if (entry < end) add_entry(a, *entry, weights, even);
    }
    for (int b = 0; b < kListBlocks; ++b)
      _mm512_store_si512(a.sums + (b * kTile + pixel) * kBlock, _mm512_add_epi32(even[b], odd[b]));
  }
}

// The forms with a mask are used for all lanes, because headers of GCC 12 warn where the others leave lanes undefined.
constexpr __mmask16 kAll = 0xffff;

// Rounded: with a rounding mode in the instruction, no compiler fuses it with the addition that follows.
MULTIFIRE_AVX512_INLINE __m512 times(__m512 a, __m512 b) {
  return _mm512_maskz_mul_round_ps(kAll, a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Fires one level with a membrane of its own, which is set to zero by a spike.
MULTIFIRE_AVX512_INLINE __m512i fire_level(float* membrane, __m512 decay, __m512 current, __m512 threshold, __m512i fired) {
  const __m512 u = _mm512_add_ps(times(decay, _mm512_loadu_ps(membrane)), current);
  const __mmask16 silent = _mm512_cmp_ps_mask(u, threshold, _CMP_NGT_UQ);
  _mm512_storeu_ps(membrane, _mm512_maskz_mov_ps(silent, u));
  return _mm512_mask_sub_epi32(fired, silent, fired, _mm512_set1_epi32(1));
}

template <int Levels>
MULTIFIRE_AVX512 void fire_mlf(const FireArgs& a) {
  const int levels = Levels ? Levels : a.neuron->levels;
  const __m512 scale = _mm512_loadu_ps(a.scale), bias = _mm512_loadu_ps(a.bias), decay = _mm512_set1_ps(a.neuron->decay);
  __m512 thresholds[Levels ? Levels : kMaxLevels];
  for (int k = 0; k < levels; ++k) thresholds[k] = _mm512_set1_ps(a.neuron->thresholds[k]);
  for (int pixel = 0; pixel < a.pixels; ++pixel) {
    const auto* sums = static_cast<const char*>(a.sums) + pixel * kBlock * 4;
    const __m512 sum = a.has_floats ? _mm512_loadu_ps(sums) : _mm512_maskz_cvtepi32_ps(kAll, _mm512_loadu_si512(sums));
    const __m512 current = _mm512_add_ps(times(sum, scale), bias);
    __m512i fired = _mm512_set1_epi32(levels);
    float* membranes = a.membranes + pixel * levels * kBlock;
    for (int k = 0; k < levels; ++k) fired = fire_level(membranes + k * kBlock, decay, current, thresholds[k], fired);
    uint8_t* out = a.out + pixel * a.out_stride;
    __m128i spikes = _mm512_maskz_cvtepi32_epi8(kAll, fired);
    if (a.adds) spikes = _mm_add_epi8(spikes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(out)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), spikes);
  }
}

inline void fire(const FireArgs& a) { portable::fire_by_levels(a, fire_mlf<1>, fire_mlf<3>, fire_mlf<0>); }

MULTIFIRE_AVX512 inline void image_sums(const ImageArgs& a) { portable::image_loop<4>(a); }

inline bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

inline int blocks_at_once(int) { return 2; }

constexpr Kernels kKernels = {"avx512_vnni", runs_here, kLargestActivation, dense_sums, sparse_sums,
                              image_sums,    fire,      blocks_at_once,     4,          0,           0.4f};

}  // namespace avx512
}  // namespace multifire_engine_impl

#endif
#endif
