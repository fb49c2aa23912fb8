// The activations of a layer, and the list of their units that are not zero. A unit is two or four channels of a pixel.
// Most units are zero, so eight bytes are looked at together.
#ifndef MULTIFIRE_ACTIVATIONS_H
#define MULTIFIRE_ACTIVATIONS_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "kernels.h"
#include "layers.h"

namespace multifire_engine_impl {

inline uint64_t eight_bytes(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// Sets each unit of 2 or 4 bytes to 1 if it is not zero.
template <int Unit>
uint64_t nonzero_units(uint64_t word) {
  constexpr uint64_t highest = Unit == 2 ? 0x8000800080008000 : 0x8000000080000000;
  // The sum sets the highest bit of a unit whose other bits are not all zero, and carries nothing into the next unit.
  return (((word & ~highest) + ~highest) | word) >> (8 * Unit - 1) & (highest >> (8 * Unit - 1));
}

// Frames of pixels of `channels` bytes, a multiple of kBlock, with a border of one zero pixel.
struct Activations {
  int height = 0, width = 0, channels = 0;
  Buffer<uint8_t> bytes;

  Activations() = default;
  Activations(int rows, int columns, int channel_bytes, int frames)
      : height(rows), width(columns), channels(channel_bytes), bytes(frames * frame_size()) {}

  int64_t row_size() const { return int64_t{width + 2} * channels; }
  int64_t frame_size() const { return (height + 2) * row_size(); }
  int64_t frame_pixels() const { return int64_t{height + 2} * (width + 2); }
  // A pixel of a frame; rows and columns may be -1.
  uint8_t* at(int frame, int y, int x) {
    return bytes.data() + frame * frame_size() + (y + 1) * row_size() + int64_t{x + 1} * channels;
  }

  template <int Unit>
  int64_t count_nonzero_units(int frames) const {
    constexpr int64_t kAtOnce = 8 * 0x7fff;  // more could overflow a counter, which is as wide as a unit
    const int64_t size = frames * frame_size();
    int64_t total = 0;
    for (int64_t begin = 0; begin < size; begin += kAtOnce) {
      const int64_t end = std::min(size, begin + kAtOnce);
      uint64_t counters = 0;
      for (int64_t i = begin; i < end; i += 8) counters += nonzero_units<Unit>(eight_bytes(bytes.data() + i));
      for (; counters; counters >>= 8 * Unit)
        total += static_cast<int64_t>(counters & ((uint64_t{1} << 8 * Unit) - 1));
    }
    return total;
  }
};

class UnitList {
 public:
  void allocate(int64_t entries, int64_t pixels) {
    if (entries > INT32_MAX) throw std::bad_alloc();  // more than 16 gigabytes, and more than `starts` can count
    entries_ = Buffer<Entry>(entries);
    starts_ = Buffer<int32_t>(pixels);
  }

  int64_t bytes() const { return entries_.bytes() + starts_.bytes(); }
  const Entry* entries() const { return entries_.data(); }
  const int32_t* starts() const { return starts_.data(); }  // the first entry of each pixel, and the end

  // Lists the units of the first frames. A pixel has `units` of them, and behind them channels that are always zero.
  template <int Unit>
  void list(const Activations& of, int frames, int units, int weight_bytes) {
    int32_t size = 0;
    const uint8_t* pixel_bytes = of.bytes.data();
    const int64_t pixels = frames * of.frame_pixels();
    int column = 0;
    for (int64_t pixel = 0; pixel < pixels; ++pixel, pixel_bytes += of.channels) {
      starts_[pixel] = size;
      const int first = column * units;
      column = column == of.width + 1 ? 0 : column + 1;
      for (int channel = 0; channel < of.channels; channel += 8) {
        if (eight_bytes(pixel_bytes + channel) == 0) continue;
        for (int i = channel; i < channel + 8; i += Unit) {
          const uint32_t unit = unit_at<Unit>(pixel_bytes + i);
          entries_[size] = {unit, (first + i / Unit) * weight_bytes};  // overwritten if the unit is zero
          size += unit != 0;
        }
      }
    }
    starts_[pixels] = size;
  }

 private:
  // A unit of two bytes is repeated.
  template <int Unit>
  static uint32_t unit_at(const uint8_t* bytes) {
    if (Unit == 4) {
      uint32_t four;
      std::memcpy(&four, bytes, sizeof four);
      return four;
    }
    uint16_t two;
    std::memcpy(&two, bytes, sizeof two);
    return two * 0x10001u;
  }

  Buffer<Entry> entries_;
  Buffer<int32_t> starts_;
};

}  // namespace multifire_engine_impl

#endif
