// The functions that Python calls, and the choice among the builds of kernels.cpp: the widest that this processor runs.

#include <cmath>
#include <cstring>

#include "mlf.h"

namespace multifire {

#ifdef MULTIFIRE_X86
namespace avx512_bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }

namespace {

const Kernels* const kBuilds[] = {
#ifdef MULTIFIRE_X86
    &avx512_bf16::kernels, &avx512::kernels, &avx2::kernels,
#endif
    &portable::kernels,
};

const Kernels*& chosen() {
  static const Kernels* build = [] {
    for (const Kernels* candidate : kBuilds)
      if (candidate->runs_here()) return candidate;
    return &portable::kernels;
  }();
  return build;
}

}  // namespace
}  // namespace multifire

extern "C" {

int64_t multifire_args_size() { return sizeof(multifire::Args); }
int64_t multifire_fire_args_size() { return sizeof(multifire::FireArgs); }

const char* multifire_isa() { return multifire::chosen()->name; }

// Uses the build of that name; returns false if it does not exist or the processor lacks its instructions.
bool multifire_use_isa(const char* name) {
  for (const multifire::Kernels* build : multifire::kBuilds) {
    if (std::strcmp(build->name, name) == 0 && build->runs_here()) {
      multifire::chosen() = build;
      return true;
    }
  }
  return false;
}

void multifire_stats(const multifire::Args* a) { multifire::chosen()->stats(*a); }
void multifire_forward(const multifire::Args* a) { multifire::chosen()->forward(*a); }
void multifire_backward(const multifire::Args* a) { multifire::chosen()->backward(*a); }
void multifire_finish(const multifire::Args* a) { multifire::chosen()->finish(*a); }
void multifire_fire(const multifire::FireArgs* a) { multifire::chosen()->fire(*a); }

// Moves running means and variances by `momentum` towards those of a batch, as torch's lerp rounds it; `unbias` = n / (n - 1).
void multifire_move_running(float* mean_to, float* var_to, const float* mean, const float* var, int64_t channels,
                            double unbias, double momentum) {
  const float weight = static_cast<float>(momentum);
  const auto move = [weight](float from, float to) {
    return std::fabs(weight) < 0.5f ? std::fma(weight, to - from, from) : std::fma(weight - 1, to - from, to);
  };
  for (int64_t c = 0; c < channels; ++c) {
    mean_to[c] = move(mean_to[c], mean[c]);
    var_to[c] = move(var_to[c], var[c] * static_cast<float>(unbias));
  }
}

bool multifire_pack(const void* spikes, uint8_t* bytes, int64_t count, int64_t bits, bool bf16, int64_t threads) {
  return multifire::chosen()->pack(spikes, bytes, count, bits, bf16, threads);
}

void multifire_unpack(const uint8_t* bytes, void* spikes, int64_t count, int64_t bits, bool bf16, int64_t threads) {
  multifire::chosen()->unpack(bytes, spikes, count, bits, bf16, threads);
}
}
