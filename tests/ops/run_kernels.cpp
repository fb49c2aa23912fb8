// Calls the CPU kernel with inputs of its own and writes all results as doubles.
//
// usage: run_kernels ISA

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "mlf.h"

using multifire::Args;
using multifire::FireArgs;

extern "C" {
bool multifire_use_isa(const char* name);
void multifire_stats(const Args* a);
void multifire_forward(const Args* a);
void multifire_backward(const Args* a);
void multifire_finish(const Args* a);
void multifire_fire(const FireArgs* a);
bool multifire_pack(const void* spikes, uint8_t* bytes, int64_t count, int64_t bits, bool bf16, int64_t threads);
void multifire_unpack(const uint8_t* bytes, void* spikes, int64_t count, int64_t bits, bool bf16, int64_t threads);
}

namespace {

constexpr int64_t kTimesteps = 3, kOuter = 2, kChannels = 37, kThreads = 2;

// A bfloat16 that holds its numbers exactly.
struct Half {
  uint16_t bits = 0;
  Half() = default;
  Half(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    bits = static_cast<uint16_t>(wide >> 16);
  }
  operator double() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return double{value};
  }
};

// Multiples of 1/16 between -2 and 2, or integers from 0 to 3.
uint32_t seed = 1;
uint32_t next() { return (seed = seed * 1664525 + 1013904223) >> 8; }
template <class S>
std::vector<S> numbers(int64_t count) {
  std::vector<S> values(static_cast<size_t>(count));
  for (S& value : values) value = S((static_cast<float>(next() % 65) - 32) / 16);
  return values;
}
template <class S>
std::vector<S> integers(int64_t count) {
  std::vector<S> values(static_cast<size_t>(count));
  for (S& value : values) value = S(static_cast<float>(next() % 4));
  return values;
}

template <class S>
void put(const std::vector<S>& values) {
  for (const S& value : values) {
    const double wide = static_cast<double>(value);
    std::fwrite(&wide, sizeof wide, 1, stdout);
  }
}

template <class A>
void set_neuron(A& a, int64_t levels, int64_t member) {
  a.levels = levels;
  a.shared_membrane = member / 2;
  a.subtract = member % 2;
  a.decay = 0.25;
  for (int64_t k = 0; k < levels; ++k) a.thresholds[k] = 0.5 + static_cast<double>(k) / 2;
}

// A training step, or an evaluation with gradients.
template <class S>
void call_passes(int64_t inner, int64_t levels, int64_t member, int64_t surrogate, bool training) {
  const int64_t step = kOuter * kChannels * inner, values = kTimesteps * step;
  const int64_t membranes = levels == 0 ? 0 : member / 2 ? 1 : levels;
  Args a{};
  a.timesteps = kTimesteps;
  a.outer = kOuter;
  a.channels = kChannels;
  a.inner = inner;
  a.bf16 = sizeof(S) == 2;
  a.training = training;
  a.threads = kThreads;
  a.surrogate = surrogate;
  a.width = 1;
  a.eps = 1e-5;
  a.scale = 1;
  a.learned = levels > 0;
  a.values = static_cast<double>(kTimesteps * kOuter * inner);
  set_neuron(a, levels, member);
  auto x = numbers<S>(values), add_before = numbers<S>(values), add_after = numbers<S>(values);
  auto grad_out = numbers<S>(values), out = numbers<S>(values), grad_x = out, grad_add_before = out;
  auto mean = numbers<float>(kChannels), weight = mean, bias = numbers<float>(kChannels);
  auto state = numbers<float>(membranes * step), grad_state_out = state, state_out = state, grad_state = state;
  std::vector<float> var(kChannels, 0.5f), grad_weight(kChannels), grad_bias(kChannels);
  std::vector<float> grad_thresholds(static_cast<size_t>(levels)), grad_decay(1);
  std::vector<double> sums(2 * kChannels);
  a.x = x.data();
  a.mean = mean.data();
  a.var = var.data();
  a.weight = weight.data();
  a.bias = bias.data();
  a.add_before = add_before.data();
  a.add_after = add_after.data();
  a.out = out.data();
  a.grad_out = grad_out.data();
  a.grad_x = grad_x.data();
  a.grad_add_before = grad_add_before.data();
  a.grad_weight = grad_weight.data();
  a.grad_bias = grad_bias.data();
  a.sums = sums.data();
  if (levels > 0) {
    a.state = state.data();
    a.state_out = state_out.data();
    a.grad_state_out = grad_state_out.data();
    a.grad_state = grad_state.data();
    a.grad_thresholds = grad_thresholds.data();
    a.grad_decay = grad_decay.data();
  }
  if (training) multifire_stats(&a);
  multifire_forward(&a);
  multifire_backward(&a);
  if (training) multifire_finish(&a);
  put(mean);
  put(var);
  put(out);
  put(state_out);
  put(grad_x);
  put(grad_add_before);
  put(grad_weight);
  put(grad_bias);
  put(grad_state);
  put(grad_thresholds);
  put(grad_decay);
}

template <class S>
void call_all_passes() {
  for (int64_t inner : {1, 9})
    for (int64_t levels : {0, 1, 2, 3, 5})
      for (int64_t member = 0; member < (levels == 0 ? 1 : 4); ++member)
        for (int64_t surrogate = 0; surrogate < (levels == 0 ? 1 : 5); ++surrogate)
          for (bool training : {false, true}) call_passes<S>(inner, levels, member, surrogate, training);
}

void call_fire(int64_t levels, int64_t member) {
  const int64_t values = kOuter * kChannels, membranes = member / 2 ? 1 : levels;
  FireArgs a{};
  a.timesteps = kTimesteps;
  a.values = values;
  a.channels = kChannels;
  a.bias_period = kChannels;
  a.threads = kThreads;
  set_neuron(a, levels, member);
  auto sums = integers<float>(kTimesteps * values), scale = numbers<float>(kChannels), bias = numbers<float>(kChannels);
  auto state = numbers<float>(membranes * values), state_out = state;
  auto add_after = integers<uint8_t>(kTimesteps * values), out = add_after;
  a.sums = sums.data();
  a.scale = scale.data();
  a.bias = bias.data();
  a.add_after = add_after.data();
  a.state = state.data();
  a.out = out.data();
  a.state_out = state_out.data();
  multifire_fire(&a);
  put(out);
  put(state_out);
}

// Spikes, in and out of bytes.
template <class S>
bool call_pack(int64_t bits) {
  const int64_t count = 12345;
  const std::vector<S> spikes = integers<S>(count);
  std::vector<S> unpacked(spikes.size());
  std::vector<uint8_t> bytes(static_cast<size_t>(count + 64));
  const bool exact = multifire_pack(spikes.data(), bytes.data(), count, bits, sizeof(S) == 2, kThreads);
  multifire_unpack(bytes.data(), unpacked.data(), count, bits, sizeof(S) == 2, kThreads);
  put(bytes);
  return exact && std::memcmp(spikes.data(), unpacked.data(), spikes.size() * sizeof(S)) == 0;
}

}  // namespace

int main(int, char** arguments) {
  if (!multifire_use_isa(arguments[1])) return 2;
  call_all_passes<float>();
  call_all_passes<Half>();
  for (int64_t levels : {1, 2, 3, 5})
    for (int64_t member = 0; member < 4; ++member) call_fire(levels, member);
  bool same = true;
  for (int64_t bits : {2, 4, 8}) same = call_pack<float>(bits) && call_pack<Half>(bits) && same;
  return same ? 0 : 1;
}
