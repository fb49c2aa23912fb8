// The functions that Python calls, and the choice among the builds of kernels.cpp: the widest that this processor runs.

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

// Takes the build of that name; false where there is none or the processor lacks it.
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

bool multifire_pack(const void* spikes, uint8_t* bytes, int64_t count, bool bf16, int64_t threads) {
  return multifire::chosen()->pack(spikes, bytes, count, bf16, threads);
}

void multifire_unpack(const uint8_t* bytes, void* spikes, int64_t count, bool bf16, int64_t threads) {
  multifire::chosen()->unpack(bytes, spikes, count, bf16, threads);
}
}
