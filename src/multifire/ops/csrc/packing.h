// Small integers in 2, 4 or 8 bits each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>

#include "tiles.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

constexpr int64_t kGroup = 16, kPackJob = 1 << 16;

// Packed spikes come in blocks of kGroup bytes. With kBits to a value, byte i of a block holds the block's values i,
// kGroup + i, 2·kGroup + i, ..., the first in its lowest bits.
template <int kBits>
struct Packing {
  static constexpr int kWays = 8 / kBits, kMost = (1 << kBits) - 1, kBlock = kGroup * kWays;
  static constexpr int64_t kBlocks = kPackJob / kBlock;  // of a job
};

// Calls f(first value, first byte, values) for each block, in parallel.
template <int kBits, class F>
void each_block(int64_t count, int64_t threads, F f) {
  using P = Packing<kBits>;
  const int64_t blocks = (count + P::kBlock - 1) / P::kBlock;
  in_parallel((blocks + P::kBlocks - 1) / P::kBlocks, threads, [&](int64_t job) {
    const int64_t end = std::min(blocks, (job + 1) * P::kBlocks);
    for (int64_t block = job * P::kBlocks; block < end; ++block)
      f(block * P::kBlock, block * kGroup, std::min<int64_t>(P::kBlock, count - block * P::kBlock));
  });
}

// Packs integers of kBits into bytes; returns false, with useless bytes, if a value is no such integer.
template <int kBits, class S>
bool pack(const S* spikes, uint8_t* bytes, int64_t count, int64_t threads) {
  using P = Packing<kBits>;
  std::atomic<bool> exact{true};
  each_block<kBits>(count, threads, [&](int64_t at, int64_t byte, int64_t values) {
    S padded[P::kBlock];
    const S* from = spikes + at;
    if (values < P::kBlock) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, from, values * sizeof(S));
      from = padded;
    }
    Mask wrong = {};
    for (int lane = 0; lane < kGroup; lane += kLanes) {
      Mask held = {};
      for (int way = 0; way < P::kWays; ++way) {
        const Vec value = load(from + way * kGroup + lane);
        const Mask whole = __builtin_convertvector(value, Mask);
        wrong |= (__builtin_convertvector(whole, Vec) != value) | ((whole & ~P::kMost) != 0);
        held |= whole << (way * kBits);
      }
      const Bytes low = narrow(held);
      std::memcpy(bytes + byte + lane, &low, sizeof low);
    }
    if (any(wrong)) exact = false;
  });
  return exact;
}

template <int kBits, class S>
void unpack(const uint8_t* bytes, S* spikes, int64_t count, int64_t threads) {
  using P = Packing<kBits>;
  each_block<kBits>(count, threads, [&](int64_t at, int64_t byte, int64_t values) {
    S padded[P::kBlock];
    S* to = values < P::kBlock ? padded : spikes + at;
    for (int lane = 0; lane < kGroup; lane += kLanes) {
      Bytes low;
      std::memcpy(&low, bytes + byte + lane, sizeof low);
      const Mask held = widen(low);
      for (int way = 0; way < P::kWays; ++way)
        store(to + way * kGroup + lane, __builtin_convertvector(held >> (way * kBits) & P::kMost, Vec));
    }
    if (values < P::kBlock) std::memcpy(spikes + at, padded, values * sizeof(S));
  });
}

}  // namespace
}  // namespace MULTIFIRE_ISA
}  // namespace multifire
