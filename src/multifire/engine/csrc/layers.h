// The weights in the order in which the kernels read them. They are shared by an engine and its clones.
#ifndef MULTIFIRE_LAYERS_H
#define MULTIFIRE_LAYERS_H

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"
#include "network.h"

namespace multifire_engine_impl {

// Zeros, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : count_(count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 2 * kAlign);
    memory_.reset(std::calloc(bytes, 1));  // large ones take no memory before they are used
    if (!memory_) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + kAlign - 1) / kAlign * kAlign);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  T* data_ = nullptr;
  int64_t count_ = 0;
};

inline int up_to_multiple(int value, int of) { return (value + of - 1) / of * of; }

// A convolution of bytes, packed.
struct Layer {
  std::string name;
  int in_channels, out_channels, kernel, stride;
  int groups, blocks, items;
  Buffer<int8_t> weights;     // [blocks][items][kBlock][kGroup]
  Buffer<float> scale, bias;  // [blocks * kBlock]; zero for channels that do not exist
  std::vector<int32_t> ends;  // see SumsArgs
  Buffer<int8_t> pairs;       // for lists of pairs: [blocks / list_blocks][window][pairs][list_blocks][kBlock][2]
  int list_blocks = 0;        // blocks that are computed from a list at a time: 2 or 4
  float sparse_below = 0;     // a list is faster if at most this fraction of the units is not zero; 0: there is none
  int span = 0;               // see SparseArgs
  bool widens[9] = {};

  int64_t block_stride() const { return int64_t{items} * kItemBytes; }
  int64_t bytes() const { return weights.bytes() + pairs.bytes() + scale.bytes() + bias.bytes(); }
};

// Where int16 sums of pairs of products must be widened, so that no sum of inputs up to `largest` exceeds 32,767.
inline std::vector<int32_t> widening_ends(const Layer& layer, int largest) {
  const int limit = INT16_MAX / largest;
  const int lanes = kItemBytes / 2;
  std::vector<int32_t> ends;
  std::vector<int> positive(static_cast<size_t>(lanes * layer.blocks)), negative(positive.size());
  const auto add = [&](int item) {  // returns whether all sums stay within the limit
    bool fits = true;
    for (int block = 0; block < layer.blocks; ++block) {
      const int8_t* weights = layer.weights.data() + block * layer.block_stride() + item * kItemBytes;
      for (int i = 0; i < kItemBytes; ++i) {
        const auto lane = static_cast<size_t>(block * lanes + i / 2);
        (weights[i] > 0 ? positive : negative)[lane] += std::abs(weights[i]);
        fits = fits && std::max(positive[lane], negative[lane]) <= limit;
      }
    }
    return fits;
  };
  for (int item = 0; item < layer.items; ++item) {
    if (add(item)) continue;
    ends.push_back(item);
    std::fill(positive.begin(), positive.end(), 0);
    std::fill(negative.begin(), negative.end(), 0);
    add(item);  // fits: 2 * 127 * 129 < 32,768
  }
  ends.push_back(layer.items);
  return ends;
}

// Orders the weights for lists of pairs.
inline void pack_pairs(Layer& layer) {
  const int pairs = layer.groups * 2, window = layer.kernel * layer.kernel;
  layer.pairs = Buffer<int8_t>(layer.weights.bytes());
  for (int block = 0; block < layer.blocks; ++block)
    for (int unit = 0; unit < window * pairs; ++unit)
      for (int i = 0; i < 2 * kBlock; ++i) {
        const int64_t from = block * layer.block_stride() + unit / 2 * kItemBytes + i / 2 * kGroup + unit % 2 * 2 + i % 2;
        const int64_t at = int64_t{block / layer.list_blocks} * window * pairs + unit;
        layer.pairs[(at * layer.list_blocks + block % layer.list_blocks) * 2 * kBlock + i] = layer.weights[from];
      }
}

// The largest sum of a window's positions `from` to `to`, over inputs up to `largest` and all output channels.
inline int64_t largest_sum(const Layer& layer, int from, int to, int largest) {
  int64_t result = 0;
  for (int o = 0; o < layer.blocks * kBlock; ++o) {
    const int8_t* weights = layer.weights.data() + o / kBlock * layer.block_stride() + o % kBlock * kGroup;
    int64_t positive = 0, negative = 0;
    for (int item = from * layer.groups; item < to * layer.groups; ++item)
      for (int i = 0; i < kGroup; ++i) {
        const int weight = weights[item * kItemBytes + i];
        (weight > 0 ? positive : negative) += std::abs(weight);
      }
    result = std::max({result, largest * positive, largest * negative});
  }
  return result;
}

// Decides after which positions the int16 sums of a list are widened; returns false if those of a span may not fit.
inline bool fit_spans(Layer& layer, int span, int largest) {
  const int window = layer.kernel * layer.kernel;
  layer.span = span;
  for (int begin = 0, at = 0; at < window; at += span) {
    const int end = at + span;
    if (largest_sum(layer, begin, end, largest) > INT16_MAX) return false;
    layer.widens[end - 1] = end == window || largest_sum(layer, begin, end + span, largest) > INT16_MAX;
    if (layer.widens[end - 1]) begin = end;
  }
  return true;
}

// Prepares a layer for lists, if it is large enough for them to be faster.
inline void prepare_list(Layer& layer, const Kernels& kernels, int largest) {
  if (layer.blocks % 2 != 0 || layer.groups < 8) return;
  layer.list_blocks = layer.blocks % 4 == 0 ? 4 : 2;
  const float below = layer.list_blocks == 4 ? kernels.four_below : kernels.two_below;
  const bool has_pairs = kernels.sparse_unit == 2;
  const bool fits = !has_pairs || fit_spans(layer, layer.kernel, largest) || fit_spans(layer, 1, largest);
  if (below == 0 || !fits) return;
  layer.sparse_below = below;
  if (has_pairs) pack_pairs(layer);
}

inline Layer packed(const Convolution& convolution, const Kernels& kernels) {
  Layer layer{convolution.name,
              convolution.in_channels,
              convolution.out_channels,
              convolution.kernel,
              convolution.stride,
              0,
              0,
              0,
              {},
              {},
              {},
              {},
              {},
              0,
              0,
              0,
              {}};
  const int window = layer.kernel * layer.kernel;
  layer.groups = (layer.in_channels + kGroup - 1) / kGroup;
  layer.blocks = (layer.out_channels + kBlock - 1) / kBlock;
  layer.items = window * layer.groups;
  layer.weights = Buffer<int8_t>(layer.blocks * layer.block_stride());
  layer.scale = Buffer<float>(layer.blocks * kBlock);
  layer.bias = Buffer<float>(layer.blocks * kBlock);
  for (int o = 0; o < layer.out_channels; ++o) {
    layer.scale[o] = convolution.scale[static_cast<size_t>(o)];
    layer.bias[o] = convolution.bias[static_cast<size_t>(o)];
    for (int i = 0; i < layer.in_channels; ++i) {
      for (int position = 0; position < window; ++position) {
        const int item = position * layer.groups + i / kGroup;
        const int64_t at = o / kBlock * layer.block_stride() + item * kItemBytes + o % kBlock * kGroup + i % kGroup;
        layer.weights[at] = convolution.weights->int8_at((int64_t{o} * layer.in_channels + i) * window + position);
      }
    }
  }
  layer.ends = widening_ends(layer, convolution.largest_input);
  prepare_list(layer, kernels, convolution.largest_input);
  return layer;
}

// The first layer: its inputs are event counts of any size, or images.
struct Stem {
  int in_channels, out_channels, blocks;
  Buffer<int32_t> integers;   // of counts: [window][in][blocks * kBlock]
  Buffer<double> floats;      // of images: the same
  Buffer<float> scale, bias;  // [blocks * kBlock]
  Buffer<float> edge_biases;  // of counts: [4 kinds of row][4 kinds of column][blocks * kBlock]; see `edge_kind`
  std::vector<float> mean;    // of images; empty without an input norm
  int64_t largest_count = 0;  // sums of counts up to this one are exact

  int channels() const { return blocks * kBlock; }
  int64_t bytes() const { return integers.bytes() + floats.bytes() + scale.bytes() + bias.bytes() + edge_biases.bytes(); }
};

// Which rows (or columns) of a window lie outside: 1 for the first, 2 for the last, 3 for both.
inline int edge_kind(int at, int size) { return (at == 0 ? 1 : 0) + (at == size - 1 ? 2 : 0); }

// The norm's mean is subtracted inside of the image only, so its part of the sums depends on the edge.
inline void fill_edge_biases(Stem& stem, const Convolution& convolution, const Tensor* mean) {
  stem.edge_biases = Buffer<float>(16 * stem.channels());
  for (int kind = 0; kind < 16; ++kind) {
    for (int o = 0; o < stem.out_channels; ++o) {
      double sum = 0;
      for (int i = 0; mean && i < stem.in_channels; ++i) {
        for (int position = 0; position < 9; ++position) {
          const int row = position / 3, column = position % 3;
          const bool outside = (row == 0 && (kind / 4 & 1)) || (row == 2 && (kind / 4 & 2)) ||
                               (column == 0 && (kind % 4 & 1)) || (column == 2 && (kind % 4 & 2));
          const double product = static_cast<double>(mean->float_at(i)) *
                                 convolution.weights->int8_at((o * stem.in_channels + i) * 9 + position);
          if (!outside) sum += product;
        }
      }
      const auto at = static_cast<size_t>(o);
      const double part = static_cast<double>(convolution.scale[at]) * sum;
      stem.edge_biases[kind * stem.channels() + o] =
          mean ? static_cast<float>(static_cast<double>(convolution.bias[at]) - part) : convolution.bias[at];
    }
  }
}

inline Stem packed_stem(const Network& network) {
  const Convolution& convolution = network.layers[0];
  Stem stem{convolution.in_channels,
            convolution.out_channels,
            (convolution.out_channels + kBlock - 1) / kBlock,
            {},
            {},
            {},
            {},
            {},
            {},
            0};
  const bool counts = network.model.counts;
  const int64_t values = int64_t{9} * stem.in_channels * stem.channels();
  if (counts)
    stem.integers = Buffer<int32_t>(values);
  else
    stem.floats = Buffer<double>(values);
  stem.scale = Buffer<float>(stem.channels());
  stem.bias = Buffer<float>(stem.channels());
  int64_t largest_total = 1;
  for (int o = 0; o < stem.out_channels; ++o) {
    stem.scale[o] = convolution.scale[static_cast<size_t>(o)];
    stem.bias[o] = convolution.bias[static_cast<size_t>(o)];
    int64_t total = 0;
    for (int i = 0; i < stem.in_channels; ++i) {
      for (int position = 0; position < 9; ++position) {
        const int64_t from = (o * stem.in_channels + i) * 9 + position,
                      to = int64_t{position * stem.in_channels + i} * stem.channels() + o;
        if (counts) {
          stem.integers[to] = convolution.weights->int8_at(from);
          total += std::abs(stem.integers[to]);
        } else {
          stem.floats[to] = static_cast<double>(convolution.weights->float_at(from));
        }
      }
    }
    largest_total = std::max(largest_total, total);
  }
  stem.largest_count = kLargestSum / largest_total;
  if (counts) fill_edge_biases(stem, convolution, network.mean);
  for (int i = 0; !counts && network.mean && i < stem.in_channels; ++i) stem.mean.push_back(network.mean->float_at(i));
  return stem;
}

// Everything that a file says, ready to run.
struct Weights {
  Weights(const Network& network, const Kernels& kernels) : model(network.model), stem(packed_stem(network)) {
    for (size_t i = 1; i < network.layers.size(); ++i) layers.push_back(packed(network.layers[i], kernels));
    voting_weight = Buffer<float>(network.voting_weight->values());
    for (int64_t i = 0; i < network.voting_weight->values(); ++i) voting_weight[i] = network.voting_weight->float_at(i);
    voting_bias = Buffer<float>(model.classes);
    for (int i = 0; i < model.classes; ++i) voting_bias[i] = network.voting_bias->float_at(i);
  }

  int64_t bytes() const {
    int64_t total = stem.bytes() + voting_weight.bytes() + voting_bias.bytes();
    for (const Layer& layer : layers) total += layer.bytes();
    return total;
  }

  Model model;
  Stem stem;
  std::vector<Layer> layers;  // without the stem
  Buffer<float> voting_weight, voting_bias;
};

}  // namespace multifire_engine_impl

#endif
