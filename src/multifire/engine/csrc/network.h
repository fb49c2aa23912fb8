// What a file describes: the network, its neurons and its weights, all checked.
#ifndef MULTIFIRE_NETWORK_H
#define MULTIFIRE_NETWORK_H

#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "tensor_file.h"

namespace multifire_engine_impl {

constexpr int kMaxLevels = 8;
constexpr int kMaxWidth = 1024;
constexpr int kMaxClasses = 1 << 20;
constexpr int kMaxInChannels = 64;
constexpr int kLargestWeight = 127;
constexpr int kLargestActivation = 129;   // as multifire.export.int8_conv: pairs of products fit into 16 bits
constexpr int64_t kLargestSum = 1 << 24;  // integers up to this value are exact in float32
constexpr float kLargestCurrent = FLT_MAX / 4;

// A neuron: u = decay * u + current; level k fires if u > thresholds[k]; then the reset.
struct Neuron {
  int levels = 3;
  float thresholds[kMaxLevels] = {};
  float decay = 0.25f;
  bool shared = false;    // all levels share one membrane
  bool subtract = false;  // a spike is subtracted; else it sets the membrane to zero

  int membranes() const { return shared ? 1 : levels; }
};

struct Model {
  int in_channels = 3, classes = 10, width = 64, blocks = 3;
  bool counts = false, norm_input = false;
  Neuron neuron;

  int largest_activation() const { return neuron.levels * (1 + blocks); }
};

// A convolution with its scale and bias for each output channel.
struct Convolution {
  std::string name;
  int in_channels, out_channels, kernel, stride;
  int largest_input;
  const Tensor* weights;  // [out, in, kernel, kernel]
  std::vector<float> scale, bias;
};

class ModelReader {
 public:
  explicit ModelReader(const std::string& description) : json_(read_json(description)) {}

  Model read() {
    const Json *model = json_.find("model"), *counts = json_.find("counts");
    require(model && model->kind == Json::kObject && counts && json_.items.size() == 2,
            "its header does not describe its network");
    model_ = model;
    check_names();
    Model result;
    result.counts = boolean(counts);
    result.in_channels = integer("in_channels", 3, kMaxInChannels);
    result.classes = integer("num_classes", 10, kMaxClasses);
    result.width = integer("width", 64, kMaxWidth);
    result.norm_input = boolean(model_->find("norm_input"));
    result.blocks = blocks(text("name", "ds_resnet20"));
    result.neuron = neuron();
    if (result.largest_activation() > kLargestActivation)
      fail("its activations may reach " + std::to_string(result.largest_activation()) + ", expected at most " +
           std::to_string(kLargestActivation));
    return result;
  }

 private:
  void check_names() const {
    static const char* const kNames[] = {"name",
                                         "in_channels",
                                         "num_classes",
                                         "width",
                                         "levels",
                                         "thresholds",
                                         "decay",
                                         "learn_thresholds",
                                         "learn_decay",
                                         "membranes",
                                         "reset",
                                         "signed",
                                         "surrogate",
                                         "surrogate_width",
                                         "detach_reset",
                                         "norm_input",
                                         "checkpoint_stages"};
    for (const std::string& name : model_->names) {
      bool known = false;
      for (const char* candidate : kNames) known = known || name == candidate;
      if (!known) fail("its network has the unknown field \"" + name + "\"; use a newer engine");
    }
  }

  bool boolean(const Json* json) const {
    if (!json) return false;
    require(json->kind == Json::kTrue || json->kind == Json::kFalse, "its network has a field that is not true or false");
    return json->kind == Json::kTrue;
  }
  int integer(const char* name, int otherwise, int64_t largest) const {
    const Json* json = model_->find(name);
    const int64_t value = json ? integer_of(*json, largest, std::string("its ") + name + ": ") : otherwise;
    if (value < 1) fail(std::string("its ") + name + " is 0, expected at least 1");
    return static_cast<int>(value);
  }
  double number(const char* name, double otherwise) const {
    const Json* json = model_->find(name);
    return json ? number_of(*json, std::string("its ") + name + ": ") : otherwise;
  }
  std::string text(const char* name, const char* otherwise) const {
    const Json* json = model_->find(name);
    if (json && json->kind != Json::kString) fail(std::string("its ") + name + " is not a text");
    return json ? json->text : otherwise;
  }

  // The number of blocks in each of three stages, of ds_resnet{6n+2}.
  static int blocks(const std::string& name) {
    const std::string prefix = "ds_resnet", digits = name.size() > prefix.size() ? name.substr(prefix.size()) : "";
    bool valid = name.compare(0, prefix.size(), prefix) == 0 && !digits.empty() && digits.size() < 6;
    for (char c : digits) valid = valid && is_digit(c);
    const int depth = valid ? std::atoi(digits.c_str()) : 0;
    if (depth < 8 || depth % 6 != 2 || depth > 6 * kLargestActivation)
      fail("its network is \"" + name + "\", expected ds_resnet of depth 6n+2");
    return (depth - 2) / 6;
  }

  Neuron neuron() const {
    for (const char* name : {"learn_thresholds", "learn_decay"})
      if (boolean(model_->find(name)))
        fail(std::string("it was trained with ") + name + ", which the engine does not support");
    require(!boolean(model_->find("signed")), "its neurons are signed, so that its activations are not integers >= 0");
    Neuron neuron;
    neuron.levels = integer("levels", 3, kMaxLevels);
    neuron.decay = static_cast<float>(number("decay", 0.25));
    require(std::isfinite(neuron.decay), "its decay is not finite in float32");
    const std::string membranes = text("membranes", "own"), reset = text("reset", "zero");
    neuron.shared = membranes == "shared";
    neuron.subtract = reset == "subtract";
    const bool known = neuron.shared ? neuron.subtract || reset == "any"
                                     : membranes == "own" && (neuron.subtract || reset == "zero");
    if (!known)
      fail("its neurons have membranes \"" + membranes + "\" and reset \"" + reset + "\", which do not go together");
    read_thresholds(neuron);
    return neuron;
  }

  void read_thresholds(Neuron& neuron) const {
    const Json* given = model_->find("thresholds");
    const bool is_given = given && given->kind != Json::kNull;
    const double gap = number("surrogate_width", 1.0);
    if (is_given)
      require(given->kind == Json::kArray && static_cast<int>(given->items.size()) == neuron.levels,
              "its thresholds are not one for each level");
    for (int k = 0; k < neuron.levels; ++k) {
      const double threshold = is_given ? number_of(given->items[static_cast<size_t>(k)], "its thresholds: ") : 0.6 + k * gap;
      neuron.thresholds[k] = static_cast<float>(threshold);
      require(std::isfinite(neuron.thresholds[k]), "its thresholds are not finite in float32");
      const bool ascends = k == 0 || neuron.thresholds[k - 1] <= neuron.thresholds[k];
      require(!neuron.shared || ascends, "its levels share a membrane, but its thresholds do not ascend");
    }
  }

  Json json_;
  const Json* model_ = nullptr;
};

// The network in a file, whose memory must outlive it.
class Network {
 public:
  explicit Network(const TensorFile& file) : file_(file) {
    const std::string *version = file.text("multifire"), *kind = file.text("kind"), *description = file.text("network");
    require(version && kind && *kind == "int8",
            "it is not an int8 network of multifire; write one with multifire export --to int8");
    require(*version == "1", "it was written in another version of the format");
    require(description != nullptr, "its header does not describe its network");
    model = ModelReader(*description).read();
    add_layers();
    voting_weight = tensor("voting.weight", false, {model.classes, 4 * model.width});
    voting_bias = tensor("voting.bias", false, {model.classes});
    check_finite(*voting_weight);
    check_finite(*voting_bias);
    require(used_ == file.tensors.size(), "it contains tensors that its network does not have");
  }

  Model model;
  std::vector<Convolution> layers;  // in the order in which they are computed
  const Tensor* mean = nullptr;     // of the input norm
  const Tensor *voting_weight, *voting_bias;

 private:
  void add_layers() {
    const int levels = model.neuron.levels;
    add("stem", model.in_channels, model.width, 3, 1, 0);
    if (model.norm_input) {
      mean = tensor(model.counts ? "stem.mean" : "input_norm.mean", false, {model.in_channels});
      check_finite(*mean);
    }
    for (int stage = 0, in = model.width; stage < 3; ++stage) {
      const int out = model.width << stage;
      for (int block = 0; block < model.blocks; ++block, in = out) {
        const std::string name = "stages." + std::to_string(stage) + "." + std::to_string(block);
        const int stride = stage > 0 && block == 0 ? 2 : 1;
        const int largest = stride == 2 ? model.largest_activation() : levels * (1 + block);
        if (stride == 2) add(name + ".shortcut", in, out, 1, 2, largest);
        add(name + ".fire1", in, out, 3, stride, largest);
        add(name + ".fire2", out, out, 3, 1, levels);
      }
    }
  }

  void add(const std::string& name, int in, int out, int kernel, int stride, int largest_input) {
    const bool is_float = name == "stem" && !model.counts;
    Convolution layer{name, in, out, kernel, stride, largest_input, nullptr, {}, {}};
    layer.weights = tensor(name + ".conv.weight", !is_float, {out, in, kernel, kernel});
    layer.scale = floats(*tensor(name + ".scale", false, {out}));
    layer.bias = floats(*tensor(name + ".bias", false, {out}));
    if (is_float)
      check_finite(*layer.weights);
    else
      check_sums(layer);
    layers.push_back(std::move(layer));
  }

  const Tensor* tensor(const std::string& name, bool is_int8, const std::vector<int64_t>& shape) {
    const auto at = std::lower_bound(file_.tensors.begin(), file_.tensors.end(), name,
                                     [](const Tensor& t, const std::string& n) { return t.name < n; });
    if (at == file_.tensors.end() || at->name != name) fail("it lacks the tensor " + name);
    if (at->shape != shape || at->is_int8 != is_int8) fail("its tensor " + name + " does not fit the network");
    ++used_;
    return &*at;
  }

  static std::vector<float> floats(const Tensor& tensor) {
    check_finite(tensor);
    std::vector<float> values(static_cast<size_t>(tensor.values()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = tensor.float_at(static_cast<int64_t>(i));
    return values;
  }

  static void check_finite(const Tensor& tensor) {
    for (int64_t i = 0; i < tensor.values(); ++i)
      if (!std::isfinite(tensor.float_at(i))) fail(tensor.name + " contains values that are not finite");
  }

  // Sums must be exact in float32, and currents finite. Event counts are checked when they come.
  void check_sums(const Convolution& layer) const {
    const int64_t taps = layer.weights->values() / layer.out_channels;
    const int64_t largest = layer.name == "stem" ? 0 : model.largest_activation();
    for (int o = 0; o < layer.out_channels; ++o) {
      int64_t total = 0;
      for (int64_t i = 0; i < taps; ++i) {
        const int weight = layer.weights->int8_at(o * taps + i);
        if (weight < -kLargestWeight) fail(layer.name + ".conv.weight contains -128, expected -127 to 127");
        total += std::abs(weight);
      }
      if (largest * total > kLargestSum)
        fail("the sums of " + layer.name + " may reach " + std::to_string(largest * total) + ", expected at most " +
             std::to_string(kLargestSum));
      const auto at = static_cast<size_t>(o);
      const double current = std::fabs(static_cast<double>(layer.scale[at])) * kLargestSum +
                             std::fabs(static_cast<double>(layer.bias[at]));
      if (current > static_cast<double>(kLargestCurrent)) fail("the currents of " + layer.name + " may overflow");
    }
  }

  const TensorFile& file_;
  size_t used_ = 0;
};

}  // namespace multifire_engine_impl

#endif
