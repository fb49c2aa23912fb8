// Membranes and activations for frames of one size, and the loops over layers, pixels and frames. Nothing here allocates
// memory but the constructor.
#ifndef MULTIFIRE_WORKSPACE_H
#define MULTIFIRE_WORKSPACE_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "layers.h"
#include "multifire_engine.h"

namespace multifire_engine_impl {

// The activations of a layer: frames of pixels of `channels` bytes, with a border of one zero pixel.
struct Activations {
  int height = 0, width = 0, channels = 0;
  Buffer<uint8_t> bytes;

  Activations() = default;
  Activations(int rows, int columns, int channel_bytes, int frames) : height(rows), width(columns), channels(channel_bytes), bytes(frames * frame_size()) {}

  int64_t row_size() const { return int64_t{width + 2} * channels; }
  int64_t frame_size() const { return (height + 2) * row_size(); }
  // A pixel of a frame; rows and columns may be -1.
  uint8_t* at(int frame, int y, int x) { return bytes.data() + frame * frame_size() + (y + 1) * row_size() + int64_t{x + 1} * channels; }
};

// One layer of neurons at its place in the network.
struct Stage {
  const Layer* layer;  // nullptr: the stem
  Activations *in, *out;
  bool adds;           // the output already holds the shortcut
  int blocks;
  Buffer<float> membranes;  // [blocks][height][width][levels or 1][kBlock]
  std::vector<int32_t> offsets;  // see SumsArgs
  int64_t frames = 0, sparse_frames = 0, units_seen = 0, units_active = 0;

  int64_t pixel_size(const Neuron& neuron) const { return int64_t{neuron.membranes()} * kBlock; }
  int64_t block_size(const Neuron& neuron) const { return int64_t{out->height} * out->width * pixel_size(neuron); }
};

constexpr int kMaxSize = 1024;  // of height and width: the pool's sums stay exact in float32

class Workspace {
 public:
  Workspace(const Weights& weights, const Kernels& kernels, int height, int width, int steps)
      : weights_(weights), kernels_(kernels), model_(weights.model), neuron_(weights.model.neuron), height_(height), width_(width), steps_(steps) {
    const int channels = up_to_multiple(model_.width, kBlock);
    for (int stage = 0, h = height, w = width; stage < 3; ++stage, h = (h + 1) / 2, w = (w + 1) / 2) {
      const int bytes = stage == 0 ? channels : up_to_multiple(model_.width << stage, kBlock);
      main_[stage] = Activations(h, w, bytes, steps);
      hidden_[stage] = Activations(h, w, bytes, steps);
    }
    add_stages();
    allocate_lists();
    scratch_ = Buffer<float>(int64_t{kParts} * kTile * neuron_.membranes() * kBlock);
    sums_ = Buffer<int32_t>(kParts * kTile * kBlock);
    if (model_.counts) {
      cells_ = Buffer<int32_t>(int64_t{height} * width * model_.in_channels);
      stem_sums_ = Buffer<int32_t>(int64_t{height} * width * weights.stem.channels());
    } else {
      image_ = Buffer<double>(int64_t{height + 2} * (width + 2) * model_.in_channels);
    }
    pool_sums_ = Buffer<int32_t>(4 * model_.width);
    pooled_ = Buffer<double>(4 * model_.width);
    logit_sum_ = Buffer<float>(model_.classes);
  }

  int height() const { return height_; }
  int width() const { return width_; }
  int steps() const { return steps_; }
  int64_t frame_values() const { return int64_t{model_.in_channels} * height_ * width_; }
  const std::vector<Stage>& stages() const { return stages_; }

  void reset() {
    if (is_reset_) return;
    for (Stage& stage : stages_) std::memset(stage.membranes.data(), 0, static_cast<size_t>(stage.membranes.bytes()));
    std::memset(logit_sum_.data(), 0, static_cast<size_t>(logit_sum_.bytes()));
    frames_since_reset_ = 0;
    is_reset_ = true;
  }

  // Checks a frame; returns what is wrong with it, or nullptr.
  const char* fault(const float* frame) const {
    const float largest = static_cast<float>(weights_.stem.largest_count);
    for (int64_t i = 0; i < frame_values(); ++i) {
      const float value = frame[i];
      if (!std::isfinite(value)) return "the frame has values that are not finite";
      if (!model_.counts) continue;
      if (value < 0 || value != std::floor(value)) return "the frame has values that are not integers >= 0, expected event counts";
      if (value > largest) return "the frame has event counts so large that sums may exceed 2^24";
    }
    return nullptr;
  }

  // Adds events to the cells of the next frame; returns what is wrong, or nullptr. After a fault all cells are zero.
  const char* collect(const multifire_event* events, size_t count) {
    const char* fault = nullptr;
    size_t done = 0;
    for (; done < count && !fault; ++done) {
      const multifire_event& e = events[done];
      if (e.x < 0 || e.x >= width_ || e.y < 0 || e.y >= height_ || e.p < 0 || e.p >= model_.in_channels) fault = "an event lies outside of the frame";
      else if (e.count < 0) fault = "an event has a count below 0";
      else if (e.count > weights_.stem.largest_count - cell(e)) fault = "the frame has event counts so large that sums may exceed 2^24";
      else cell(e) += e.count;
    }
    if (fault)
      for (size_t i = 0; i + 1 < done; ++i) cell(events[i]) = 0;
    return fault;
  }

  // Computes the collected frame of a stream.
  void step_events(const multifire_event* events, size_t count, float* logits) {
    clear_stem_sums();
    for (size_t i = 0; i < count; ++i) scatter(events[i].y, events[i].x, events[i].p);
    run_stem_counts(0, Keep::kMembranes);
    finish_step(logits);
  }

  // Computes a frame of a stream, which has no fault.
  void step(const float* frame, float* logits) {
    load_frame(frame);
    run_stem(0, 1, Keep::kMembranes);
    finish_step(logits);
  }

  // Computes one sample, whose frames have no fault.
  void run(const float* frames, int64_t timesteps, int64_t time_stride, float* logits, float* per_step, int64_t per_step_stride) {
    std::memset(logits, 0, sizeof(float) * static_cast<size_t>(model_.classes));
    const bool at_once = timesteps <= steps_;
    if (!at_once) reset();
    for (int64_t begin = 0; begin < timesteps; begin += steps_) {
      const int count = static_cast<int>(std::min<int64_t>(steps_, timesteps - begin));
      const Keep keep = at_once ? Keep::kNothing : Keep::kMembranes;
      run_stems(frames + begin * time_stride, count, time_stride, keep);
      run_layers(count, keep);
      for (int t = 0; t < count; ++t) vote(t, logits, per_step ? per_step + (begin + t) * per_step_stride : nullptr);
    }
    for (int c = 0; c < model_.classes; ++c) logits[c] /= static_cast<float>(timesteps);
  }

  // Copies the membranes of a layer as [membranes, channels, height, width].
  void copy_state(int64_t index, int channels, float* state) const {
    const Stage& stage = stages_[static_cast<size_t>(index)];
    const int pixels = stage.out->height * stage.out->width;
    for (int m = 0; m < neuron_.membranes(); ++m)
      for (int c = 0; c < channels; ++c)
        for (int pixel = 0; pixel < pixels; ++pixel)
          *state++ = stage.membranes[c / kBlock * stage.block_size(neuron_) + (int64_t{pixel} * neuron_.membranes() + m) * kBlock + c % kBlock];
  }

  int64_t bytes() const {
    int64_t total = entries_.bytes() + starts_.bytes() + scratch_.bytes() + sums_.bytes() + cells_.bytes() + stem_sums_.bytes() + image_.bytes();
    for (const Activations& part : main_) total += part.bytes.bytes();
    for (const Activations& part : hidden_) total += part.bytes.bytes();
    for (const Stage& stage : stages_) total += stage.membranes.bytes();
    return total;
  }

 private:
  // A stream keeps its membranes; a sample that is computed at once does not need them afterwards.
  enum class Keep { kMembranes, kNothing };

  void add_stages() {
    stages_.reserve(weights_.layers.size() + 1);
    add_stage(nullptr, nullptr, &main_[0], false);
    int stage = 0;
    for (const Layer& layer : weights_.layers) {
      const bool is_second = layer.name.back() == '2', is_shortcut = layer.kernel == 1;
      if (is_shortcut) ++stage;
      Activations* const before = &main_[layer.stride == 2 ? stage - 1 : stage];
      if (is_second) add_stage(&layer, &hidden_[stage], &main_[stage], true);
      else add_stage(&layer, before, is_shortcut ? &main_[stage] : &hidden_[stage], false);
    }
  }

  void add_stage(const Layer* layer, Activations* in, Activations* out, bool adds) {
    Stage stage{layer, in, out, adds, layer ? layer->blocks : weights_.stem.blocks, {}, {}};
    stage.membranes = Buffer<float>(stage.blocks * stage.block_size(neuron_));
    for (int position = 0; layer && position < layer->kernel * layer->kernel; ++position) {
      const int row = position / layer->kernel, column = position % layer->kernel;
      for (int group = 0; group < layer->groups; ++group)
        stage.offsets.push_back(static_cast<int32_t>(row * in->row_size()) + column * in->channels + group * kGroup);
    }
    stages_.push_back(std::move(stage));
  }

  int32_t& cell(const multifire_event& e) { return cells_[(int64_t{e.y} * width_ + e.x) * model_.in_channels + e.p]; }

  void clear_stem_sums() { std::memset(stem_sums_.data(), 0, static_cast<size_t>(stem_sums_.bytes())); }

  // Adds the events of a cell to the stem's sums, and empties the cell.
  void scatter(int y, int x, int channel) {
    const Stem& stem = weights_.stem;
    int32_t& cell = cells_[(int64_t{y} * width_ + x) * model_.in_channels + channel];
    if (cell == 0) return;
    for (int row = 0; row < 3; ++row) {
      const int to_y = y + 1 - row;
      if (to_y < 0 || to_y >= height_) continue;
      for (int column = 0; column < 3; ++column) {
        const int to_x = x + 1 - column;
        if (to_x < 0 || to_x >= width_) continue;
        const int32_t* weights = stem.integers.data() + int64_t{(row * 3 + column) * stem.in_channels + channel} * stem.channels();
        int32_t* sums = stem_sums_.data() + (int64_t{to_y} * width_ + to_x) * stem.channels();
        for (int o = 0; o < stem.channels(); ++o) sums[o] += cell * weights[o];
      }
    }
    cell = 0;
  }

  // Prepares the stem's sums (of counts) or its input (of images).
  void load_frame(const float* frame) {
    if (!model_.counts) return load_image(frame);
    clear_stem_sums();
    for (int p = 0; p < model_.in_channels; ++p)
      for (int y = 0; y < height_; ++y)
        for (int x = 0; x < width_; ++x, ++frame) {
          if (*frame == 0) continue;
          cells_[(int64_t{y} * width_ + x) * model_.in_channels + p] = static_cast<int32_t>(*frame);
          scatter(y, x, p);
        }
  }

  void load_image(const float* frame) {
    const std::vector<float>& mean = weights_.stem.mean;
    for (int c = 0; c < model_.in_channels; ++c) {
      const float shift = mean.empty() ? 0 : mean[static_cast<size_t>(c)];
      for (int y = 0; y < height_; ++y)
        for (int x = 0; x < width_; ++x)
          image_[(int64_t{y + 1} * (width_ + 2) + x + 1) * model_.in_channels + c] = static_cast<double>(*frame++ - shift);
    }
  }

  void run_stems(const float* frames, int count, int64_t time_stride, Keep keep) {
    if (time_stride == 0) {
      load_frame(frames);
      run_stem(0, count, keep);
      return;
    }
    // Frame by frame, so that the sums of one frame are enough; the membranes are needed from frame to frame.
    Stage& stage = stages_[0];
    if (keep == Keep::kNothing) std::memset(stage.membranes.data(), 0, static_cast<size_t>(stage.membranes.bytes()));
    for (int t = 0; t < count; ++t) {
      load_frame(frames + t * time_stride);
      run_stem(t, 1, Keep::kMembranes);
    }
  }

  // Fires the stem `count` times on the frame that was loaded, from activations `t` on.
  void run_stem(int t, int count, Keep keep) {
    if (model_.counts) {
      for (int i = 0; i < count; ++i) run_stem_counts(t + i, i == 0 ? keep : Keep::kMembranes);
      return;
    }
    const Stem& stem = weights_.stem;
    Stage& stage = stages_[0];
    auto* sums = reinterpret_cast<float*>(sums_.data());
    for (int block = 0; block < stem.blocks; ++block)
      for (int y = 0; y < height_; ++y)
        for (int x = 0; x < width_; x += kTile) {
          const int pixels = std::min(kTile, width_ - x);
          const double* window = image_.data() + (int64_t{y} * (width_ + 2) + x) * stem.in_channels;
          kernels_.image_sums({window, int64_t{width_ + 2} * stem.in_channels, stem.in_channels, stem.floats.data() + block * kBlock, stem.channels(), pixels, sums});
          float* membranes = tile_membranes(stage, block, y, x, pixels, keep);
          FireArgs args{sums, true, stem.scale.data() + block * kBlock, stem.bias.data() + block * kBlock, membranes, pixels, &neuron_, false, nullptr, stage.out->channels};
          for (int i = 0; i < count; ++i) {
            args.out = stage.out->at(t + i, y, x) + block * kBlock;
            kernels_.fire(args);
          }
        }
    stage.frames += count;
  }

  void run_stem_counts(int t, Keep keep) {
    const Stem& stem = weights_.stem;
    Stage& stage = stages_[0];
    if (keep == Keep::kNothing) std::memset(stage.membranes.data(), 0, static_cast<size_t>(stage.membranes.bytes()));
    for (int block = 0; block < stem.blocks; ++block)
      for (int y = 0; y < height_; ++y)
        for (int x = 0, pixels; x < width_; x += pixels) {
          pixels = edge_kind(x, width_) ? 1 : std::min(kTile, width_ - 1 - x);  // those whose bias is the same
          stem_tile(stage, t, y, x, pixels, block);
        }
    ++stage.frames;
  }

  void stem_tile(Stage& stage, int t, int y, int x, int pixels, int block) {
    const Stem& stem = weights_.stem;
    for (int i = 0; i < pixels; ++i)
      std::memcpy(sums_.data() + i * kBlock, stem_sums_.data() + (int64_t{y} * width_ + x + i) * stem.channels() + block * kBlock, kBlock * sizeof(int32_t));
    const float* bias = stem.edge_biases.data() + (edge_kind(y, height_) * 4 + edge_kind(x, width_)) * stem.channels() + block * kBlock;
    float* membranes = tile_membranes(stage, block, y, x, pixels, Keep::kMembranes);
    kernels_.fire({sums_.data(), false, stem.scale.data() + block * kBlock, bias, membranes, pixels, &neuron_, false, stage.out->at(t, y, x) + block * kBlock, stage.out->channels});
  }

  // The membranes of a tile: those that the stream keeps, or zeros.
  float* tile_membranes(Stage& stage, int block, int y, int x, int pixels, Keep keep, float* scratch = nullptr) {
    if (keep == Keep::kMembranes) {
      is_reset_ = false;
      return stage.membranes.data() + block * stage.block_size(neuron_) + (int64_t{y} * stage.out->width + x) * stage.pixel_size(neuron_);
    }
    if (!scratch) scratch = scratch_.data();
    std::memset(scratch, 0, sizeof(float) * static_cast<size_t>(pixels * stage.pixel_size(neuron_)));
    return scratch;
  }

  void run_layers(int count, Keep keep) {
    for (size_t i = 1; i < stages_.size(); ++i) run_layer(stages_[i], count, keep);
  }

  void run_layer(Stage& stage, int count, Keep keep) {
    const bool sparse = takes_list(stage, count);
    if (sparse) list_units(stage, count);
    const int at_once = sparse ? kSparseBlocks : kernels_.blocks_at_once(stage.layer->groups);
    for (int block = 0, blocks; block < stage.blocks; block += blocks) {
      const int left = std::min(at_once, stage.blocks - block);
      blocks = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      for (int y = 0; y < stage.out->height; ++y)
        for (int x = 0; x < stage.out->width; x += kTile) run_tile(stage, count, y, x, block, blocks, sparse, keep);
    }
    stage.frames += count;
    stage.sparse_frames += sparse ? count : 0;
  }

  // Some blocks of channels of neighbouring pixels, over all frames.
  void run_tile(Stage& stage, int count, int y, int x, int block, int blocks, bool sparse, Keep keep) {
    const Layer& layer = *stage.layer;
    const int pixels = std::min(kTile, stage.out->width - x);
    float* membranes[kParts];
    for (int i = 0; i < blocks; ++i)
      membranes[i] = tile_membranes(stage, block + i, y, x, pixels, keep, scratch_.data() + i * kTile * stage.pixel_size(neuron_));
    for (int t = 0, frames; t < count; t += frames) {
      frames = sparse ? 1 : std::min(kParts / blocks, count - t);
      if (sparse) sparse_sums(stage, t, y, x, block, pixels);
      else dense_sums(stage, t, frames, y, x, block, blocks, pixels);
      for (int i = 0; i < frames * blocks; ++i) {
        const int64_t channel = int64_t{block + i % blocks} * kBlock;
        kernels_.fire({sums_.data() + i * kTile * kBlock, false, layer.scale.data() + channel, layer.bias.data() + channel, membranes[i % blocks], pixels, &neuron_, stage.adds, stage.out->at(t + i / blocks, y, x) + channel, stage.out->channels});
      }
    }
  }

  void dense_sums(const Stage& stage, int t, int frames, int y, int x, int block, int blocks, int pixels) {
    const Layer& layer = *stage.layer;
    const int border = layer.kernel / 2;
    const uint8_t* input = stage.in->at(t, y * layer.stride - border, x * layer.stride - border);
    kernels_.dense_sums({input, int64_t{layer.stride} * stage.in->channels, stage.offsets.data(), layer.items, layer.groups, layer.ends.data(), layer.weights.data() + block * layer.block_stride(), layer.block_stride(), pixels, blocks, frames, stage.in->frame_size(), sums_.data()});
  }

  void sparse_sums(const Stage& stage, int t, int y, int x, int block, int pixels) {
    const Layer& layer = *stage.layer;
    const bool pairs = kernels_.sparse_unit == 2;
    const int border = layer.kernel / 2, row = y * layer.stride + 1 - border, column = x * layer.stride + 1 - border;
    const int64_t row_starts = stage.in->width + 2, column_size = int64_t{units_of(layer)} * unit_bytes();
    const int32_t* starts = starts_.data() + (int64_t{t} * (stage.in->height + 2) + row) * row_starts + column;
    const int8_t* weights = pairs ? layer.pairs.data() + block / kSparseBlocks * layer.kernel * layer.kernel * column_size : layer.weights.data() + block * layer.block_stride();
    kernels_.sparse_sums({entries_.data(), starts, row_starts, column, layer.stride, layer.kernel, weights, layer.block_stride(), column_size, layer.span, layer.widens, pixels, sums_.data()});
  }

  int units_of(const Layer& layer) const { return layer.groups * kGroup / kernels_.sparse_unit; }
  // Bytes from the weights of one unit to those of the next.
  int unit_bytes() const { return kernels_.sparse_unit == 2 ? kSparseBlocks * kBlock * 2 : kItemBytes; }

  int64_t padded_pixels(const Stage& stage) const { return int64_t{stage.in->height + 2} * (stage.in->width + 2); }
  int64_t largest_list(const Stage& stage, int count) const {
    const double units = static_cast<double>(count) * stage.in->height * stage.in->width * units_of(*stage.layer);
    return static_cast<int64_t>(static_cast<double>(kernels_.sparse_below) * units);
  }

  void allocate_lists() {
    int64_t entries = 0, pixels = 0;
    for (const Stage& stage : stages_) {
      if (!stage.layer || !stage.layer->has_list) continue;
      entries = std::max(entries, largest_list(stage, steps_) + 1);
      pixels = std::max(pixels, steps_ * padded_pixels(stage) + 1);
    }
    entries_ = Buffer<Entry>(entries);
    starts_ = Buffer<int32_t>(pixels);
  }

  // The unit of a pixel; two channels are repeated.
  uint32_t unit_at(const uint8_t* pixel, int unit) const {
    if (kernels_.sparse_unit == 4) {
      uint32_t four;
      std::memcpy(&four, pixel + 4 * unit, sizeof four);
      return four;
    }
    uint16_t two;
    std::memcpy(&two, pixel + 2 * unit, sizeof two);
    return two * 0x10001u;
  }

  // Counts the units of a layer's input that are not zero; returns true if they are so few that a list is faster.
  bool takes_list(Stage& stage, int count) {
    const Layer& layer = *stage.layer;
    if (!layer.has_list) return false;
    const int units = units_of(layer);
    int64_t active = 0;
    for (int64_t pixel = 0; pixel < count * padded_pixels(stage); ++pixel)
      for (int unit = 0; unit < units; ++unit) active += unit_at(stage.in->bytes.data() + pixel * stage.in->channels, unit) != 0;
    stage.units_seen += int64_t{count} * stage.in->height * stage.in->width * units;
    stage.units_active += active;
    return active <= largest_list(stage, count);
  }

  void list_units(const Stage& stage, int count) {
    const int units = units_of(*stage.layer), columns = stage.in->width + 2;
    int32_t size = 0;
    for (int64_t pixel = 0; pixel < count * padded_pixels(stage); ++pixel) {
      starts_[pixel] = size;
      const auto column = static_cast<int32_t>(pixel % columns);
      for (int unit = 0; unit < units; ++unit) {
        const uint32_t bytes = unit_at(stage.in->bytes.data() + pixel * stage.in->channels, unit);
        entries_[size] = {bytes, (column * units + unit) * unit_bytes()};  // overwritten if the unit is zero
        size += bytes != 0;
      }
    }
    starts_[count * padded_pixels(stage)] = size;
  }

  // Adds the logits of a frame to `total`; writes them to `logits` unless it is nullptr.
  void vote(int t, float* total, float* logits) {
    Activations& last = main_[2];
    const int channels = 4 * model_.width, pixels = last.height * last.width;
    std::memset(pool_sums_.data(), 0, static_cast<size_t>(pool_sums_.bytes()));
    for (int y = 0; y < last.height; ++y)
      for (int x = 0; x < last.width; ++x) {
        const uint8_t* bytes = last.at(t, y, x);
        for (int c = 0; c < channels; ++c) pool_sums_[c] += bytes[c];
      }
    for (int c = 0; c < channels; ++c) pooled_[c] = static_cast<double>(static_cast<float>(pool_sums_[c]) / static_cast<float>(pixels));
    for (int k = 0; k < model_.classes; ++k) {
      const float* weights = weights_.voting_weight.data() + int64_t{k} * channels;
      double sum = 0;
      for (int c = 0; c < channels; ++c) sum += pooled_[c] * static_cast<double>(weights[c]);
      const auto logit = static_cast<float>(sum + static_cast<double>(weights_.voting_bias[k]));
      total[k] += logit;
      if (logits) logits[k] = logit;
    }
  }

  void finish_step(float* logits) {
    run_layers(1, Keep::kMembranes);
    vote(0, logit_sum_.data(), nullptr);
    ++frames_since_reset_;
    for (int k = 0; k < model_.classes; ++k) logits[k] = logit_sum_[k] / static_cast<float>(frames_since_reset_);
  }

  const Weights& weights_;
  const Kernels& kernels_;
  const Model& model_;
  const Neuron& neuron_;
  int height_, width_, steps_;
  Activations main_[3], hidden_[3];
  std::vector<Stage> stages_;
  Buffer<Entry> entries_;  // of the units that are not zero, and the first of each pixel
  Buffer<int32_t> starts_;
  Buffer<float> scratch_, logit_sum_;
  Buffer<int32_t> sums_, cells_, stem_sums_, pool_sums_;
  Buffer<double> image_, pooled_;
  int64_t frames_since_reset_ = 0;
  bool is_reset_ = true;
};

}  // namespace multifire_engine_impl

#endif
