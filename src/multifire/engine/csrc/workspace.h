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
  std::vector<int32_t> offsets, mask_offsets;  // see SumsArgs
  int64_t frames = 0, sparse_frames = 0, groups_seen = 0, groups_active = 0;

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
    masks_ = Buffer<uint64_t>(int64_t{height + 2} * (width + 2) * steps);
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
    int64_t total = masks_.bytes() + scratch_.bytes() + sums_.bytes() + cells_.bytes() + stem_sums_.bytes() + image_.bytes();
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
    Stage stage{layer, in, out, adds, layer ? layer->blocks : weights_.stem.blocks, {}, {}, {}};
    stage.membranes = Buffer<float>(stage.blocks * stage.block_size(neuron_));
    for (int position = 0; layer && position < layer->kernel * layer->kernel; ++position) {
      const int row = position / layer->kernel, column = position % layer->kernel;
      stage.mask_offsets.push_back(row * (in->width + 2) + column);
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
    const int at_once = kernels_.blocks_at_once(stage.layer->groups);
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
    const int border = layer.kernel / 2, in_y = y * layer.stride - border, in_x = x * layer.stride - border;
    float* membranes[kParts];
    for (int i = 0; i < blocks; ++i)
      membranes[i] = tile_membranes(stage, block + i, y, x, pixels, keep, scratch_.data() + i * kTile * stage.pixel_size(neuron_));
    SumsArgs sums{nullptr, int64_t{layer.stride} * stage.in->channels, stage.offsets.data(), layer.items, layer.ends.data(), layer.weights.data() + block * layer.block_stride(), layer.block_stride(), pixels, blocks, 1, stage.in->frame_size(), sums_.data(), nullptr, layer.stride, stage.mask_offsets.data(), layer.kernel * layer.kernel, layer.groups};
    for (int t = 0; t < count; t += sums.frames) {
      sums.frames = sparse ? 1 : std::min(kParts / blocks, count - t);
      sums.x = stage.in->at(t, in_y, in_x);
      sums.masks = masks_.data() + (int64_t{t} * (stage.in->height + 2) + in_y + 1) * (stage.in->width + 2) + in_x + 1;
      (sparse ? kernels_.sparse_sums : kernels_.dense_sums)(sums);
      for (int i = 0; i < sums.frames * blocks; ++i) {
        const int64_t channel = int64_t{block + i % blocks} * kBlock;
        kernels_.fire({sums_.data() + i * kTile * kBlock, false, layer.scale.data() + channel, layer.bias.data() + channel, membranes[i % blocks], pixels, &neuron_, stage.adds, stage.out->at(t + i / blocks, y, x) + channel, stage.out->channels});
      }
    }
  }

  // Lists the non-zero groups of a layer's input; returns true if they are so few that the list is faster.
  bool takes_list(Stage& stage, int count) {
    const Layer& layer = *stage.layer;
    const float limit = kernels_.sparse_below;
    if (limit <= 0 || layer.groups > 64) return false;
    const int64_t pixels = int64_t{count} * (stage.in->height + 2) * (stage.in->width + 2);
    int64_t active = 0;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const uint8_t* bytes = stage.in->bytes.data() + pixel * stage.in->channels;
      uint64_t mask = 0;
      for (int group = 0; group < layer.groups; ++group) {
        uint32_t four;
        std::memcpy(&four, bytes + group * kGroup, sizeof four);
        mask |= uint64_t{four != 0} << group;
        active += four != 0;
      }
      masks_[pixel] = mask;
    }
    const int64_t groups = int64_t{count} * stage.in->height * stage.in->width * layer.groups;
    stage.groups_seen += groups;
    stage.groups_active += active;
    return static_cast<float>(active) <= limit * static_cast<float>(groups);
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
  Buffer<uint64_t> masks_;
  Buffer<float> scratch_, logit_sum_;
  Buffer<int32_t> sums_, cells_, stem_sums_, pool_sums_;
  Buffer<double> image_, pooled_;
  int64_t frames_since_reset_ = 0;
  bool is_reset_ = true;
};

}  // namespace multifire_engine_impl

#endif
