// Membranes and activations for frames of one size, and the loops over layers, pixels and frames. Nothing here allocates
// memory but the constructor.
#ifndef MULTIFIRE_WORKSPACE_H
#define MULTIFIRE_WORKSPACE_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "activations.h"
#include "first_layer.h"
#include "kernels.h"
#include "layers.h"
#include "multifire_engine.h"

namespace multifire_engine_impl {

// One layer of neurons at its place in the network.
struct Stage {
  const Layer* layer;  // nullptr: the stem
  Activations *in, *out;
  bool adds;  // the output already holds the shortcut
  int blocks;
  Buffer<float> membranes;       // [blocks][height][width][levels or 1][kBlock]
  std::vector<int32_t> offsets;  // see SumsArgs
  int64_t frames = 0, sparse_frames = 0, units_seen = 0, units_active = 0;

  int64_t pixel_size(const Neuron& neuron) const { return int64_t{neuron.membranes()} * kBlock; }
  int64_t block_size(const Neuron& neuron) const { return int64_t{out->height} * out->width * pixel_size(neuron); }
};

constexpr int kMaxSize = 1024;  // of height and width: the pool's sums stay exact in float32

class Workspace {
 public:
  Workspace(const Weights& weights, const Kernels& kernels, int height, int width, int steps)
      : weights_(weights),
        kernels_(kernels),
        model_(weights.model),
        neuron_(weights.model.neuron),
        height_(height),
        width_(width),
        steps_(steps),
        first_(weights, kernels, height, width) {
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
    pool_sums_ = Buffer<int32_t>(4 * model_.width);
    pooled_ = Buffer<double>(4 * model_.width);
    logit_sum_ = Buffer<float>(model_.classes);
  }

  int height() const { return height_; }
  int width() const { return width_; }
  const std::vector<Stage>& stages() const { return stages_; }

  void reset() {
    if (is_reset_) return;
    for (Stage& stage : stages_) std::memset(stage.membranes.data(), 0, static_cast<size_t>(stage.membranes.bytes()));
    std::memset(logit_sum_.data(), 0, static_cast<size_t>(logit_sum_.bytes()));
    frames_since_reset_ = 0;
    is_reset_ = true;
  }

  // Checks a frame or events, see FirstLayer; a fault changes nothing.
  const char* fault(const float* frame) const { return first_.fault(frame); }
  const char* collect(const multifire_event* events, size_t count) { return first_.collect(events, count); }

  // Computes the collected frame of a stream.
  void step_events(const multifire_event* events, size_t count, float* logits) {
    first_.load_events(events, count);
    finish_step(logits);
  }

  // Computes a frame of a stream, which has no fault.
  void step(const float* frame, float* logits) {
    first_.load_frame(frame);
    finish_step(logits);
  }

  // Computes one sample, whose frames have no fault.
  void run(const float* frames, int64_t timesteps, int64_t time_stride, float* logits, float* per_step,
           int64_t per_step_stride) {
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
          *state++ = stage.membranes[c / kBlock * stage.block_size(neuron_) +
                                     (int64_t{pixel} * neuron_.membranes() + m) * kBlock + c % kBlock];
  }

  int64_t bytes() const {
    int64_t total = list_.bytes() + scratch_.bytes() + sums_.bytes() + first_.bytes();
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
      if (is_second)
        add_stage(&layer, &hidden_[stage], &main_[stage], true);
      else
        add_stage(&layer, before, is_shortcut ? &main_[stage] : &hidden_[stage], false);
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

  void run_stems(const float* frames, int count, int64_t time_stride, Keep keep) {
    if (time_stride == 0) {
      first_.load_frame(frames);
      run_stem(0, count, keep);
      return;
    }
    // Frame by frame, so that the sums of one frame are enough; the membranes are needed from frame to frame.
    Stage& stage = stages_[0];
    if (keep == Keep::kNothing) std::memset(stage.membranes.data(), 0, static_cast<size_t>(stage.membranes.bytes()));
    for (int t = 0; t < count; ++t) {
      first_.load_frame(frames + t * time_stride);
      run_stem(t, 1, Keep::kMembranes);
    }
  }

  // Fires the stem `count` times on the frame that was loaded, for the time steps from t on.
  void run_stem(int t, int count, Keep keep) {
    Stage& stage = stages_[0];
    for (int block = 0; block < stage.blocks; ++block)
      for (int y = 0; y < height_; ++y)
        for (int x = 0, pixels; x < width_; x += pixels) {
          pixels = first_.run_length(x);
          first_.tile_sums(y, x, pixels, block, sums_.data());
          float* membranes = tile_membranes(stage, block, y, x, pixels, keep, scratch_.data());
          for (int i = 0; i < count; ++i)
            kernels_.fire({sums_.data(), first_.has_floats(), first_.scale(block), first_.bias(y, x, block), membranes,
                           pixels, &neuron_, false, stage.out->at(t + i, y, x) + block * kBlock, stage.out->channels});
        }
    stage.frames += count;
  }

  // The membranes of a tile: those that the stream keeps, or zeros.
  float* tile_membranes(Stage& stage, int block, int y, int x, int pixels, Keep keep, float* scratch) {
    if (keep == Keep::kMembranes) {
      is_reset_ = false;
      return stage.membranes.data() + block * stage.block_size(neuron_) +
             (int64_t{y} * stage.out->width + x) * stage.pixel_size(neuron_);
    }
    std::memset(scratch, 0, sizeof(float) * static_cast<size_t>(pixels * stage.pixel_size(neuron_)));
    return scratch;
  }

  void run_layers(int count, Keep keep) {
    for (size_t i = 1; i < stages_.size(); ++i) run_layer(stages_[i], count, keep);
  }

  void run_layer(Stage& stage, int count, Keep keep) {
    const bool sparse = takes_list(stage, count);
    if (sparse) list_units(stage, count);
    const int at_once = sparse ? stage.layer->list_blocks : kernels_.blocks_at_once(stage.layer->groups);
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
      membranes[i] = tile_membranes(stage, block + i, y, x, pixels, keep,
                                    scratch_.data() + i * kTile * stage.pixel_size(neuron_));
    for (int t = 0, frames; t < count; t += frames) {
      frames = sparse ? 1 : std::min(kParts / blocks, count - t);
      if (sparse)
        sparse_sums(stage, t, y, x, block, blocks, pixels);
      else
        dense_sums(stage, t, frames, y, x, block, blocks, pixels);
      for (int i = 0; i < frames * blocks; ++i) {
        const int64_t channel = int64_t{block + i % blocks} * kBlock;
        kernels_.fire({sums_.data() + i * kTile * kBlock, false, layer.scale.data() + channel, layer.bias.data() + channel,
                       membranes[i % blocks], pixels, &neuron_, stage.adds, stage.out->at(t + i / blocks, y, x) + channel,
                       stage.out->channels});
      }
    }
  }

  void dense_sums(const Stage& stage, int t, int frames, int y, int x, int block, int blocks, int pixels) {
    const Layer& layer = *stage.layer;
    const int border = layer.kernel / 2;
    const uint8_t* input = stage.in->at(t, y * layer.stride - border, x * layer.stride - border);
    kernels_.dense_sums({input, int64_t{layer.stride} * stage.in->channels, stage.offsets.data(), layer.items, layer.groups,
                         layer.ends.data(), layer.weights.data() + block * layer.block_stride(), layer.block_stride(),
                         pixels, blocks, frames, stage.in->frame_size(), sums_.data()});
  }

  void sparse_sums(const Stage& stage, int t, int y, int x, int block, int blocks, int pixels) {
    const Layer& layer = *stage.layer;
    const bool pairs = kernels_.sparse_unit == 2;
    const int border = layer.kernel / 2, row = y * layer.stride + 1 - border, column = x * layer.stride + 1 - border;
    const int64_t row_starts = stage.in->width + 2, column_size = int64_t{units_of(layer)} * unit_bytes(layer);
    const int32_t* starts = list_.starts() + (int64_t{t} * (stage.in->height + 2) + row) * row_starts + column;
    const int8_t* weights = pairs ? layer.pairs.data() + block / blocks * layer.kernel * layer.kernel * column_size
                                  : layer.weights.data() + block * layer.block_stride();
    kernels_.sparse_sums({list_.entries(), starts, row_starts, column, layer.stride, layer.kernel, weights,
                          layer.block_stride(), column_size, layer.span, layer.widens, pixels, blocks, sums_.data()});
  }

  int units_of(const Layer& layer) const { return layer.groups * kGroup / kernels_.sparse_unit; }
  // Bytes from the weights of one unit to those of the next.
  int unit_bytes(const Layer& layer) const {
    return kernels_.sparse_unit == 2 ? layer.list_blocks * kBlock * 2 : kItemBytes;
  }

  int64_t largest_list(const Stage& stage, int count) const {
    const double units = static_cast<double>(count) * stage.in->height * stage.in->width * units_of(*stage.layer);
    return static_cast<int64_t>(static_cast<double>(stage.layer->sparse_below) * units);
  }

  void allocate_lists() {
    int64_t entries = 0, pixels = 0;
    for (const Stage& stage : stages_) {
      if (!stage.layer || stage.layer->sparse_below == 0) continue;
      entries = std::max(entries, largest_list(stage, steps_) + 1);
      pixels = std::max(pixels, steps_ * stage.in->frame_pixels() + 1);
    }
    list_.allocate(entries, pixels);
  }

  // Counts the units of a layer's input that are not zero; returns true if they are so few that a list is faster.
  bool takes_list(Stage& stage, int count) {
    const Layer& layer = *stage.layer;
    if (layer.sparse_below == 0) return false;
    const bool pairs = kernels_.sparse_unit == 2;
    const int64_t active = pairs ? stage.in->count_nonzero_units<2>(count) : stage.in->count_nonzero_units<4>(count);
    stage.units_seen += int64_t{count} * stage.in->height * stage.in->width * units_of(layer);
    stage.units_active += active;
    return active <= largest_list(stage, count);
  }

  void list_units(const Stage& stage, int count) {
    const int units = units_of(*stage.layer);
    if (kernels_.sparse_unit == 2)
      list_.list<2>(*stage.in, count, units, unit_bytes(*stage.layer));
    else
      list_.list<4>(*stage.in, count, units, unit_bytes(*stage.layer));
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
    for (int c = 0; c < channels; ++c)
      pooled_[c] = static_cast<double>(static_cast<float>(pool_sums_[c]) / static_cast<float>(pixels));
    for (int k = 0; k < model_.classes; ++k) {
      const float* weights = weights_.voting_weight.data() + int64_t{k} * channels;
      double sum = 0;
      for (int c = 0; c < channels; ++c) sum += pooled_[c] * static_cast<double>(weights[c]);
      const auto logit = static_cast<float>(sum + static_cast<double>(weights_.voting_bias[k]));
      total[k] += logit;
      if (logits) logits[k] = logit;
    }
  }

  // Computes the frame that the first layer has loaded.
  void finish_step(float* logits) {
    run_stem(0, 1, Keep::kMembranes);
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
  FirstLayer first_;
  Activations main_[3], hidden_[3];
  std::vector<Stage> stages_;
  UnitList list_;  // of the input of the layer that is being computed
  Buffer<float> scratch_, logit_sum_;
  Buffer<int32_t> sums_, pool_sums_;
  Buffer<double> pooled_;
  int64_t frames_since_reset_ = 0;
  bool is_reset_ = true;
};

}  // namespace multifire_engine_impl

#endif
