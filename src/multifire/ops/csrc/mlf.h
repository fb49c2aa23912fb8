// What Python and the kernels agree on. The arithmetic is that of ops/reference.py; read it first.
//
// Every tensor of one call has one memory order, [T][outer][channels][inner]: channels-last data has inner = 1, contiguous
// data has inner = H·W. `mlf` on its own is one channel without a norm.
#pragma once

#include <cstdint>

namespace multifire {

constexpr int kMaxLevels = 8;

// Mirrored field by field in ops/cpu.py. An absent tensor is null. States have one membrane for each level, or one if it is
// shared. Activations are of type float, or bfloat16 where `bf16`;
// everything per channel, and every membrane, is float.
struct Args {
  int64_t timesteps, outer, channels, inner;
  int64_t static_input;  // x holds one time step, which stands for all of them
  int64_t bf16, training, threads;
  int64_t levels, surrogate, detach_reset;  // levels = 0: the norm alone
  int64_t shared_membrane, subtract, signed_levels;  // the family; all 0: the MLF neuron
  int64_t learned;                                   // compute the gradients of thresholds and decay
  double decay, width, eps, scale;
  double thresholds[kMaxLevels];

  const void* x;
  float *mean, *var;  // written by `stats`, read by the others; null: no norm
  const float *weight, *bias;
  const void *add_before, *add_after;
  const float* state;
  void* out;
  float* state_out;

  const void* grad_out;
  const float* grad_state_out;
  void* grad_x;
  void* grad_add_before;
  float *grad_weight, *grad_bias, *grad_state;
  float *grad_thresholds, *grad_decay;  // null: not needed
  double* sums;   // Σ dy and Σ dy·(x - μ) per channel: written by `backward`, read by `finish`; null: no norm
  double values;  // per channel, which the mean and variance are of; read by `finish`
};

// Inference in integers, channels last: out = fire(scale·sums + bias) + add_after, in bytes. `sums` holds a convolution's
// integers as floats; they and `bias` repeat along a time step's values, with the periods given. Mirrored in ops/cpu.py.
struct FireArgs {
  int64_t timesteps, values;  // values of one time step
  int64_t channels, bias_period;  // of `scale` and of `bias`; the second is a multiple of the first
  int64_t static_input;           // sums holds one time step, which stands for all of them
  int64_t levels, threads;
  int64_t shared_membrane, subtract;  // as in Args
  double decay;
  double thresholds[kMaxLevels];

  const float *sums, *scale, *bias;
  const uint8_t* add_after;
  const float* state;
  uint8_t* out;
  float* state_out;
};

// One build of kernels.cpp and its headers, for one instruction set.
struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*stats)(const Args&);
  void (*forward)(const Args&);
  void (*backward)(const Args&);
  void (*finish)(const Args&);  // in training, after `backward`: from dy to the gradient of x
  void (*fire)(const FireArgs&);
  bool (*pack)(const void* spikes, uint8_t* bytes, int64_t count, int64_t bits, bool bf16, int64_t threads);
  void (*unpack)(const uint8_t* bytes, void* spikes, int64_t count, int64_t bits, bool bf16, int64_t threads);
};

}  // namespace multifire
