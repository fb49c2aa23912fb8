// The inner loops for 64-bit ARM: with the dot product of ARMv8.2 where there is one, else with products widened to 16 bits.
#ifndef MULTIFIRE_KERNELS_NEON_H
#define MULTIFIRE_KERNELS_NEON_H

#if defined(__aarch64__)

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstring>

#include "kernels.h"
#include "kernels_portable.h"

namespace multifire_engine_impl {
namespace neon {

#if defined(__clang__)
#define MULTIFIRE_DOTPROD __attribute__((target("dotprod")))
#else
#define MULTIFIRE_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

constexpr int kLargestInput = 127;  // bytes are multiplied as signed ones
constexpr int kQuarters = kItemBytes / 16;

MULTIFIRE_INLINE int8x16_t four_bytes(const uint8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
}

// Sums of one block for some pixels.
template <int Pixels>
MULTIFIRE_DOTPROD void dot_part(const SumsArgs& a, const uint8_t* x, const int8_t* weights, int32_t* sums) {
  int32x4_t totals[Pixels][kQuarters];
  for (int p = 0; p < Pixels; ++p)
    for (int q = 0; q < kQuarters; ++q) totals[p][q] = vdupq_n_s32(0);
  for (int item = 0; item < a.items; ++item, weights += kItemBytes) {
    int8x16_t w[kQuarters];
    for (int q = 0; q < kQuarters; ++q) w[q] = vld1q_s8(weights + 16 * q);
    for (int p = 0; p < Pixels; ++p) {
      const int8x16_t bytes = four_bytes(x + a.offsets[item] + p * a.pixel_stride);
      for (int q = 0; q < kQuarters; ++q) totals[p][q] = vdotq_s32(totals[p][q], bytes, w[q]);
    }
  }
  for (int p = 0; p < Pixels; ++p)
    for (int q = 0; q < kQuarters; ++q) vst1q_s32(sums + p * kBlock + 4 * q, totals[p][q]);
}

// The same without the dot product. A vector of totals holds two sums of pairs for each of two output channels.
template <int Pixels>
void wide_part(const SumsArgs& a, const uint8_t* x, const int8_t* weights, int32_t* sums) {
  int32x4_t totals[Pixels][2 * kQuarters];
  for (int p = 0; p < Pixels; ++p)
    for (int q = 0; q < 2 * kQuarters; ++q) totals[p][q] = vdupq_n_s32(0);
  for (int item = 0; item < a.items; ++item, weights += kItemBytes) {
    for (int p = 0; p < Pixels; ++p) {
      const int8x8_t bytes = vget_low_s8(four_bytes(x + a.offsets[item] + p * a.pixel_stride));
      for (int q = 0; q < 2 * kQuarters; ++q)
        totals[p][q] = vpadalq_s16(totals[p][q], vmull_s8(bytes, vld1_s8(weights + 8 * q)));
    }
  }
  for (int p = 0; p < Pixels; ++p)
    for (int q = 0; q < kQuarters; ++q)
      vst1q_s32(sums + p * kBlock + 4 * q, vpaddq_s32(totals[p][2 * q], totals[p][2 * q + 1]));
}

typedef void (*Part)(const SumsArgs& a, const uint8_t* x, const int8_t* weights, int32_t* sums);

template <int Pixels>
void dense_of(const SumsArgs& a, Part many, Part one) {
  for (int frame = 0; frame < a.frames; ++frame) {
    for (int block = 0; block < a.blocks; ++block) {
      const uint8_t* x = a.x + frame * a.frame_stride;
      const int8_t* weights = a.weights + block * a.block_stride;
      int32_t* sums = a.part(frame, block);
      int pixel = 0;
      for (; pixel + Pixels <= a.pixels; pixel += Pixels)
        many(a, x + pixel * a.pixel_stride, weights, sums + pixel * kBlock);
      for (; pixel < a.pixels; ++pixel) one(a, x + pixel * a.pixel_stride, weights, sums + pixel * kBlock);
    }
  }
}

inline void dot_sums(const SumsArgs& a) { dense_of<4>(a, dot_part<4>, dot_part<1>); }
inline void wide_sums(const SumsArgs& a) { dense_of<2>(a, wide_part<2>, wide_part<1>); }

// The list of one row of a pixel's window, and the weights of its entries.
struct RowList {
  const Entry *begin, *end;
  const int8_t* weights;

  RowList(const SparseArgs& a, int pixel, int row) {
    const int32_t* starts = a.starts + row * a.row_starts + pixel * a.stride;
    begin = a.entries + starts[0];
    end = a.entries + starts[a.kernel];
    weights = a.weights + (row * a.kernel - a.column - pixel * a.stride) * a.column_size;
  }
};

// An entry is a group of four channels. The totals of all blocks lie in registers.
template <int Blocks>
MULTIFIRE_DOTPROD void dot_list_of(const SparseArgs& a) {
  for (int pixel = 0; pixel < a.pixels; ++pixel) {
    int32x4_t totals[Blocks][kQuarters];
    for (int b = 0; b < Blocks; ++b)
      for (int q = 0; q < kQuarters; ++q) totals[b][q] = vdupq_n_s32(0);
    for (int row = 0; row < a.kernel; ++row) {
      const RowList list(a, pixel, row);
      for (const Entry* entry = list.begin; entry < list.end; ++entry) {
        const int8x16_t bytes = vreinterpretq_s8_u32(vdupq_n_u32(entry->bytes));
        const int8_t* weights = list.weights + entry->weights;
        for (int b = 0; b < Blocks; ++b)
          for (int q = 0; q < kQuarters; ++q)
            totals[b][q] = vdotq_s32(totals[b][q], bytes, vld1q_s8(weights + b * a.block_stride + 16 * q));
      }
    }
    for (int b = 0; b < Blocks; ++b)
      for (int q = 0; q < kQuarters; ++q) vst1q_s32(a.sums + (b * kTile + pixel) * kBlock + 4 * q, totals[b][q]);
  }
}

inline void dot_list(const SparseArgs& a) { a.blocks == 4 ? dot_list_of<4>(a) : dot_list_of<2>(a); }

// The same without the dot product: block by block, since the totals of one take eight registers.
inline void wide_list(const SparseArgs& a) {
  for (int at = 0; at < a.blocks * a.pixels; ++at) {
    const int block = at / a.pixels, pixel = at % a.pixels;
    int32x4_t totals[2 * kQuarters];
    for (int q = 0; q < 2 * kQuarters; ++q) totals[q] = vdupq_n_s32(0);
    for (int row = 0; row < a.kernel; ++row) {
      const RowList list(a, pixel, row);
      for (const Entry* entry = list.begin; entry < list.end; ++entry) {
        const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(entry->bytes));
        const int8_t* weights = list.weights + entry->weights + block * a.block_stride;
        for (int q = 0; q < 2 * kQuarters; ++q)
          totals[q] = vpadalq_s16(totals[q], vmull_s8(bytes, vld1_s8(weights + 8 * q)));
      }
    }
    for (int q = 0; q < kQuarters; ++q)
      vst1q_s32(a.sums + (block * kTile + pixel) * kBlock + 4 * q, vpaddq_s32(totals[2 * q], totals[2 * q + 1]));
  }
}

// A product that no compiler fuses with the addition that follows.
MULTIFIRE_INLINE float32x4_t times(float32x4_t a, float32x4_t b) {
  float32x4_t product = vmulq_f32(a, b);
  __asm__("" : "+w"(product));
  return product;
}

// Fires four neurons; returns how many levels fire.
MULTIFIRE_INLINE uint32x4_t fire_four(const Neuron& neuron, float32x4_t current, float* membranes) {
  const float32x4_t decay = vdupq_n_f32(neuron.decay);
  uint32x4_t fired = vdupq_n_u32(0);
  for (int k = 0; k < neuron.levels; ++k, membranes += kBlock) {
    const float32x4_t u = vaddq_f32(times(decay, vld1q_f32(membranes)), current);
    const uint32x4_t fires = vcgtq_f32(u, vdupq_n_f32(neuron.thresholds[k]));
    vst1q_f32(membranes, vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(u), fires)));
    fired = vsubq_u32(fired, fires);
  }
  return fired;
}

inline void fire(const FireArgs& a) {
  if (a.neuron->shared || a.neuron->subtract) return portable::fire(a);
  for (int pixel = 0; pixel < a.pixels; ++pixel) {
    float* membranes = a.membranes + pixel * a.neuron->levels * kBlock;
    uint32x4_t fired[4];
    for (int q = 0; q < 4; ++q) {
      const int at = pixel * kBlock + 4 * q;
      const float32x4_t sum = a.has_floats ? vld1q_f32(static_cast<const float*>(a.sums) + at)
                                           : vcvtq_f32_s32(vld1q_s32(static_cast<const int32_t*>(a.sums) + at));
      const float32x4_t current = vaddq_f32(times(sum, vld1q_f32(a.scale + 4 * q)), vld1q_f32(a.bias + 4 * q));
      fired[q] = fire_four(*a.neuron, current, membranes + 4 * q);
    }
    const uint16x8_t low = vcombine_u16(vmovn_u32(fired[0]), vmovn_u32(fired[1]));
    const uint16x8_t high = vcombine_u16(vmovn_u32(fired[2]), vmovn_u32(fired[3]));
    uint8x16_t spikes = vcombine_u8(vmovn_u16(low), vmovn_u16(high));
    uint8_t* out = a.out + pixel * a.out_stride;
    if (a.adds) spikes = vaddq_u8(spikes, vld1q_u8(out));
    vst1q_u8(out, spikes);
  }
}

inline bool runs_here() { return true; }

inline bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kDotProductBit = 1ul << 20;
  return (getauxval(AT_HWCAP) & kDotProductBit) != 0;
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}

inline int blocks_at_once(int) { return 1; }

// Not measured: at 0.3 a list of four blocks has at most 0.3 of the products, and about twice the loads for each.
constexpr float kTwoBelow = 0.2f, kFourBelow = 0.3f;

constexpr Kernels kDotProduct = {"neon_dotprod",
                                 has_dot_product,
                                 kLargestInput,
                                 dot_sums,
                                 dot_list,
                                 portable::image_sums,
                                 fire,
                                 blocks_at_once,
                                 kGroup,
                                 kTwoBelow,
                                 kFourBelow};
constexpr Kernels kKernels = {"neon",
                              runs_here,
                              kLargestInput,
                              wide_sums,
                              wide_list,
                              portable::image_sums,
                              fire,
                              blocks_at_once,
                              kGroup,
                              kTwoBelow,
                              kFourBelow};

}  // namespace neon
}  // namespace multifire_engine_impl

#endif
#endif
