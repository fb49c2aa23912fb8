// The sums of the first layer: of event counts over the list of events, of images over all pixels.
#ifndef MULTIFIRE_FIRST_LAYER_H
#define MULTIFIRE_FIRST_LAYER_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "kernels.h"
#include "layers.h"
#include "multifire_engine.h"

namespace multifire_engine_impl {

class FirstLayer {
 public:
  FirstLayer(const Weights& weights, const Kernels& kernels, int height, int width)
      : stem_(weights.stem), kernels_(kernels), counts_(weights.model.counts), height_(height), width_(width) {
    if (counts_) {
      cells_ = Buffer<int32_t>(frame_values());
      sums_ = Buffer<int32_t>(int64_t{height} * width * stem_.channels());
    } else {
      image_ = Buffer<double>(int64_t{height + 2} * (width + 2) * stem_.in_channels);
    }
  }

  // Checks a frame; returns what is wrong with it, or nullptr.
  const char* fault(const float* frame) const {
    const float largest = static_cast<float>(stem_.largest_count);
    for (int64_t i = 0; i < frame_values(); ++i) {
      const float value = frame[i];
      if (!std::isfinite(value)) return "the frame has values that are not finite";
      if (!counts_) continue;
      if (value < 0 || value != std::floor(value))
        return "the frame has values that are not integers >= 0, expected event counts";
      if (value > largest) return kTooManyEvents;
    }
    return nullptr;
  }

  // Adds events to the cells of the next frame; returns what is wrong, or nullptr. After a fault all cells are zero.
  const char* collect(const multifire_event* events, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      const char* fault = fault_of(events[i]);
      if (!fault) {
        cell(events[i]) += events[i].count;
        continue;
      }
      for (size_t done = 0; done < i; ++done) cell(events[done]) = 0;
      return fault;
    }
    return nullptr;
  }

  // Computes the sums of the collected frame.
  void load_events(const multifire_event* events, size_t count) {
    clear_sums();
    for (size_t i = 0; i < count; ++i) scatter(events[i].y, events[i].x, events[i].p);
  }

  // Computes the sums of a frame (of counts), or keeps the frame (of images).
  void load_frame(const float* frame) {
    if (!counts_) return load_image(frame);
    clear_sums();
    for (int p = 0; p < stem_.in_channels; ++p)
      for (int y = 0; y < height_; ++y)
        for (int x = 0; x < width_; ++x, ++frame) {
          if (*frame == 0) continue;
          cells_[cell_at(y, x, p)] = static_cast<int32_t>(*frame);
          scatter(y, x, p);
        }
  }

  bool has_floats() const { return !counts_; }
  const float* scale(int block) const { return stem_.scale.data() + block * kBlock; }
  const float* bias(int y, int x, int block) const {
    if (!counts_) return stem_.bias.data() + block * kBlock;
    return stem_.edge_biases.data() + (edge_kind(y, height_) * 4 + edge_kind(x, width_)) * stem_.channels() + block * kBlock;
  }

  // The number of pixels from x on that have the same bias and fit into a tile.
  int run_length(int x) const {
    if (!counts_) return std::min(kTile, width_ - x);
    return edge_kind(x, width_) ? 1 : std::min(kTile, width_ - 1 - x);
  }

  // Writes the sums [pixels][kBlock] of a tile: int32, or float if has_floats().
  void tile_sums(int y, int x, int pixels, int block, int32_t* to) const {
    if (counts_) {
      const int32_t* from = sums_.data() + (int64_t{y} * width_ + x) * stem_.channels() + block * kBlock;
      for (int i = 0; i < pixels; ++i, from += stem_.channels())
        std::memcpy(to + i * kBlock, from, kBlock * sizeof(int32_t));
      return;
    }
    const int64_t row = int64_t{width_ + 2} * stem_.in_channels;
    kernels_.image_sums({image_.data() + y * row + int64_t{x} * stem_.in_channels, row, stem_.in_channels,
                         stem_.floats.data() + block * kBlock, stem_.channels(), pixels, reinterpret_cast<float*>(to)});
  }

  int64_t frame_values() const { return int64_t{height_} * width_ * stem_.in_channels; }
  int64_t bytes() const { return cells_.bytes() + sums_.bytes() + image_.bytes(); }

 private:
  static constexpr const char* kTooManyEvents = "the frame has event counts so large that sums may exceed 2^24";

  int64_t cell_at(int y, int x, int p) const { return (int64_t{y} * width_ + x) * stem_.in_channels + p; }
  int32_t& cell(const multifire_event& e) { return cells_[cell_at(e.y, e.x, e.p)]; }

  const char* fault_of(const multifire_event& e) {
    if (e.x < 0 || e.x >= width_ || e.y < 0 || e.y >= height_ || e.p < 0 || e.p >= stem_.in_channels)
      return outside(e);
    if (e.count < 0) return "an event has a count below 0";
    return e.count > stem_.largest_count - cell(e) ? kTooManyEvents : nullptr;
  }

  const char* outside(const multifire_event& e) {
    std::snprintf(fault_, sizeof fault_, "an event lies outside of the frame: x = %d, y = %d, p = %d, expected x < %d, "
                  "y < %d, p < %d and none below 0", e.x, e.y, e.p, width_, height_, stem_.in_channels);
    return fault_;
  }

  void clear_sums() { std::memset(sums_.data(), 0, static_cast<size_t>(sums_.bytes())); }

  // Adds the events of a cell to the sums, and empties the cell.
  void scatter(int y, int x, int p) {
    int32_t& cell = cells_[cell_at(y, x, p)];
    for (int row = 0; cell != 0 && row < 3; ++row) {
      const int to_y = y + 1 - row;
      if (to_y < 0 || to_y >= height_) continue;
      for (int column = 0; column < 3; ++column) {
        const int to_x = x + 1 - column;
        if (to_x < 0 || to_x >= width_) continue;
        const int32_t* weights = stem_.integers.data() +
                                 ((row * 3 + column) * int64_t{stem_.in_channels} + p) * stem_.channels();
        int32_t* sums = sums_.data() + (int64_t{to_y} * width_ + to_x) * stem_.channels();
        for (int o = 0; o < stem_.channels(); ++o) sums[o] += cell * weights[o];
      }
    }
    cell = 0;
  }

  void load_image(const float* frame) {
    for (int c = 0; c < stem_.in_channels; ++c) {
      const float shift = stem_.mean.empty() ? 0 : stem_.mean[static_cast<size_t>(c)];
      for (int y = 0; y < height_; ++y)
        for (int x = 0; x < width_; ++x)
          image_[(int64_t{y + 1} * (width_ + 2) + x + 1) * stem_.in_channels + c] = static_cast<double>(*frame++ - shift);
    }
  }

  const Stem& stem_;
  const Kernels& kernels_;
  bool counts_;
  int height_, width_;
  char fault_[160] = "";
  Buffer<int32_t> cells_;  // event counts [height][width][channels]; zero between frames
  Buffer<int32_t> sums_;   // [height][width][output channels]
  Buffer<double> image_;   // channels last, with a border of one zero pixel
};

}  // namespace multifire_engine_impl

#endif
