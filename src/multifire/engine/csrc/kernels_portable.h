// The inner loops in plain C++: the definition of what the other kernels compute.
#ifndef MULTIFIRE_KERNELS_PORTABLE_H
#define MULTIFIRE_KERNELS_PORTABLE_H

#include <cstring>

#include "kernels.h"

namespace multifire_engine_impl {
namespace portable {

inline void add_item(const uint8_t* x, const int8_t* weights, int32_t* sums) {
  for (int o = 0; o < kBlock; ++o)
    for (int i = 0; i < kGroup; ++i) sums[o] += x[i] * weights[o * kGroup + i];
}

inline void clear(const SumsArgs& a, int32_t* sums) {
  std::memset(sums, 0, sizeof(int32_t) * static_cast<size_t>(a.pixels * kBlock));
}

inline void dense_part(const SumsArgs& a, const uint8_t* x, const int8_t* weights, int32_t* sums) {
  clear(a, sums);
  for (int pixel = 0; pixel < a.pixels; ++pixel)
    for (int item = 0; item < a.items; ++item)
      add_item(x + pixel * a.pixel_stride + a.offsets[item], weights + item * kItemBytes, sums + pixel * kBlock);
}

inline void dense_sums(const SumsArgs& a) {
  for (int frame = 0; frame < a.frames; ++frame)
    for (int block = 0; block < a.blocks; ++block)
      dense_part(a, a.x + frame * a.frame_stride, a.weights + block * a.block_stride, a.part(frame, block));
}

inline void sparse_pixel(const SparseArgs& a, int pixel, const int8_t* weights, int32_t* sums) {
  const int column = a.column + pixel * a.stride;
  for (int row = 0; row < a.kernel; ++row) {
    const int32_t* starts = a.starts + row * a.row_starts + pixel * a.stride;
    const int8_t* row_weights = weights + (row * a.kernel - column) * a.column_size;
    for (const Entry* entry = a.entries + starts[0]; entry < a.entries + starts[a.kernel]; ++entry)
      add_item(reinterpret_cast<const uint8_t*>(&entry->bytes), row_weights + entry->weights, sums);
  }
}

inline void sparse_sums(const SparseArgs& a) {
  for (int block = 0; block < a.blocks; ++block) {
    for (int pixel = 0; pixel < a.pixels; ++pixel) {
      int32_t* sums = a.sums + (block * kTile + pixel) * kBlock;
      std::memset(sums, 0, sizeof(int32_t) * kBlock);
      sparse_pixel(a, pixel, a.weights + block * a.block_stride, sums);
    }
  }
}

template <int Pixels>
MULTIFIRE_INLINE void image_part(const ImageArgs& a, int pixel) {
  double totals[Pixels][kBlock] = {};
  const double* weights = a.weights;
  for (int row = 0; row < 3; ++row) {
    const double* x = a.x + row * a.row_stride + int64_t{pixel} * a.channels;
    for (int i = 0; i < 3 * a.channels; ++i, weights += a.weights_stride)
      for (int p = 0; p < Pixels; ++p)
        for (int o = 0; o < kBlock; ++o) totals[p][o] += x[i + p * a.channels] * weights[o];
  }
  for (int p = 0; p < Pixels; ++p)
    for (int o = 0; o < kBlock; ++o) a.sums[(pixel + p) * kBlock + o] = static_cast<float>(totals[p][o]);
}

// Inline, so that other kernels compile it for their own instruction set.
template <int Pixels>
MULTIFIRE_INLINE void image_loop(const ImageArgs& a) {
  int pixel = 0;
  for (; pixel + Pixels <= a.pixels; pixel += Pixels) image_part<Pixels>(a, pixel);
  for (; pixel < a.pixels; ++pixel) image_part<1>(a, pixel);
}

inline void image_sums(const ImageArgs& a) { image_loop<2>(a); }

// Fires one neuron, whose membranes are kBlock values apart; returns the number of levels that fire.
inline int fire_one(const Neuron& neuron, float current, float* membranes) {
  int fired = 0;
  for (int m = 0; m < neuron.membranes(); ++m) {
    const float u = rounded(neuron.decay * membranes[m * kBlock]) + current;
    const int first = neuron.shared ? 0 : m, end = neuron.shared ? neuron.levels : m + 1;
    float cost = 0;
    for (int k = first; k < end; ++k) {
      if (!(u > neuron.thresholds[k])) continue;
      ++fired;
      cost += neuron.shared ? 1 : neuron.thresholds[k];
    }
    membranes[m * kBlock] = neuron.subtract ? u - cost : u > neuron.thresholds[first] ? 0 : u;
  }
  return fired;
}

inline void fire(const FireArgs& a) {
  for (int pixel = 0; pixel < a.pixels; ++pixel) {
    float* membranes = a.membranes + pixel * a.neuron->membranes() * kBlock;
    uint8_t* out = a.out + pixel * a.out_stride;
    for (int o = 0; o < kBlock; ++o) {
      const int at = pixel * kBlock + o;
      const float sum = a.has_floats ? static_cast<const float*>(a.sums)[at]
                                     : static_cast<float>(static_cast<const int32_t*>(a.sums)[at]);
      const float current = rounded(sum * a.scale[o]) + a.bias[o];
      const int fired = fire_one(*a.neuron, current, membranes + o);
      out[o] = static_cast<uint8_t>(fired + (a.adds ? out[o] : 0));
    }
  }
}

// Calls the build for the number of levels of MLF neurons; other neurons fire here.
using Fire = void (*)(const FireArgs&);
inline void fire_by_levels(const FireArgs& a, Fire one, Fire three, Fire any) {
  if (a.neuron->shared || a.neuron->subtract) return fire(a);
  if (a.neuron->levels == 1) return one(a);
  if (a.neuron->levels == 3) return three(a);
  any(a);
}

inline bool runs_here() { return true; }
inline int blocks_at_once(int) { return 1; }

constexpr Kernels kKernels = {"portable", runs_here, kLargestActivation, dense_sums, sparse_sums,
                              image_sums, fire,      blocks_at_once,     4,          0.7f, 0.7f};

}  // namespace portable
}  // namespace multifire_engine_impl

#endif
