// Firing on integer sums, for int8 inference.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "family_pass.h"
#include "neuron.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

typedef uint8_t TileBytes __attribute__((vector_size(kTile)));

// The low bytes of a tile of integers.
inline TileBytes narrow(const Mask (&tile)[kVecs]) {
  TileBytes bytes;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i low = _mm256_packs_epi32((__m256i)tile[0], (__m256i)tile[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)tile[2], (__m256i)tile[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works within each half of a register
  bytes = (TileBytes)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
#else
  for (int i = 0; i < kVecs; ++i) {
    const Bytes part = narrow(tile[i]);
    std::memcpy(reinterpret_cast<char*>(&bytes) + i * kLanes, &part, sizeof part);
  }
#endif
  return bytes;
}

inline TileBytes load_bytes(const uint8_t* from, int count) {
  TileBytes bytes = {};
  std::memcpy(&bytes, from, count);
  return bytes;
}

template <int K, bool Full>
inline void fire_tile(const FireArgs& a, const Neurons<K>& neurons, const float* scales, const float* biases, int64_t at,
                      int count) {
  const Tile scale = load_tile<true>(scales, kTile), bias = load_tile<true>(biases, kTile);
  const int64_t stride = a.static_input ? 0 : a.values;
  const int bytes = Full ? kTile : count;
  const int levels = neurons.levels();
  Membranes membranes[Neurons<K>::kStored];
  for (int k = 0; k < levels; ++k)
    membranes[k].start(a.state ? load_tile<Full>(a.state + k * a.values + at, count) : zeros());
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const int64_t here = t * a.values + at;
    Tile y = load_tile<Full>(a.sums + t * stride + at, count);
    Mask fired[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      y.v[i] = y.v[i] * scale.v[i] + bias.v[i];
      fired[i] = Mask{} + levels;
    }
    for (int k = 0; k < levels; ++k) {
      for (int i = 0; i < kVecs; ++i) {
        membranes[k].step(i, neurons.decay, y.v[i], neurons.thresholds[k]);
        fired[i] = less_one(fired[i], membranes[k].silent[i]);
      }
    }
    TileBytes spikes = narrow(fired);
    if (a.add_after) spikes += load_bytes(a.add_after + here, bytes);
    std::memcpy(a.out + here, &spikes, bytes);
  }
  if (a.state_out)
    for (int k = 0; k < levels; ++k) store_tile<Full>(a.state_out + k * a.values + at, membranes[k].state(), count);
}

// As `fire_tile`, for the neuron's other members.
template <bool Full, bool Shared>
inline void family_fire_tile(const FireArgs& a, const Family<Shared, false>& neuron, const float* scales, const float* biases,
                             int64_t at, int count) {
  const Tile scale = load_tile<true>(scales, kTile), bias = load_tile<true>(biases, kTile);
  const int64_t stride = a.static_input ? 0 : a.values;
  const int bytes = Full ? kTile : count;
  Tile carries[Family<Shared, false>::kStored];
  for (int m = 0; m < neuron.membranes; ++m)
    carries[m] = a.state ? load_tile<Full>(a.state + m * a.values + at, count) : zeros();
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const int64_t here = t * a.values + at;
    const Tile y = load_tile<Full>(a.sums + t * stride + at, count);
    Mask counts[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      const Vec current = y.v[i] * scale.v[i] + bias.v[i];
      Vec fired = splat(0);
      for (int m = 0; m < neuron.membranes; ++m)
        carries[m].v[i] = neuron.after_reset(m, neuron.decay * carries[m].v[i] + current, fired);
      counts[i] = __builtin_convertvector(fired, Mask);
    }
    TileBytes spikes = narrow(counts);
    if (a.add_after) spikes += load_bytes(a.add_after + here, bytes);
    std::memcpy(a.out + here, &spikes, bytes);
  }
  if (a.state_out)
    for (int m = 0; m < neuron.membranes; ++m) store_tile<Full>(a.state_out + m * a.values + at, carries[m], count);
}

constexpr int64_t kFireJob = 1 << 12;  // a multiple of kTile

// Calls f(scales, biases, position, values) for all tiles, in parallel.
template <class F>
void each_fire_tile(const FireArgs& a, F f) {
  if (a.values == 0) return;
  const auto repeated = [](const float* values, int64_t period) {  // repeated, so that a tile may start anywhere in the period
    std::vector<float> table(period + kTile);
    for (size_t i = 0; i < table.size(); ++i) table[i] = values[i % period];
    return table;
  };
  const std::vector<float> scale = repeated(a.scale, a.channels), bias = repeated(a.bias, a.bias_period);
  in_parallel((a.values + kFireJob - 1) / kFireJob, a.threads, [&](int64_t job) {
    const int64_t end = std::min(a.values, (job + 1) * kFireJob);
    for (int64_t at = job * kFireJob; at < end; at += kTile)
      f(scale.data() + at % a.channels, bias.data() + at % a.bias_period, at, static_cast<int>(std::min<int64_t>(kTile, end - at)));
  });
}

template <int K>
void fire(const FireArgs& a) {
  const Neurons<K> neurons(a);
  each_fire_tile(a, [&](const float* scales, const float* biases, int64_t at, int count) {
    if (count == kTile)
      fire_tile<K, true>(a, neurons, scales, biases, at, count);
    else
      fire_tile<K, false>(a, neurons, scales, biases, at, count);
  });
}

template <bool Shared>
void family_fire(const FireArgs& a) {
  const Family<Shared, false> neuron(a);
  each_fire_tile(a, [&](const float* scales, const float* biases, int64_t at, int count) {
    if (count == kTile)
      family_fire_tile<true>(a, neuron, scales, biases, at, count);
    else
      family_fire_tile<false>(a, neuron, scales, biases, at, count);
  });
}

}  // namespace
}  // namespace MULTIFIRE_ISA
}  // namespace multifire
