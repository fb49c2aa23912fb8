// The choice among the kernels: the fastest that this processor runs.
#ifndef MULTIFIRE_MACHINE_H
#define MULTIFIRE_MACHINE_H

#include <cstdlib>
#include <cstring>

// The common files come first: where all files are joined into one, the others lie inside of conditions.
#include "kernels.h"
#include "kernels_portable.h"

// Here the order matters in the same way: AMX builds on AVX-512.
#include "kernels_avx2.h"
#include "kernels_avx512.h"
#include "kernels_amx.h"
#include "kernels_neon.h"

namespace multifire_engine_impl {

inline const Kernels* const* builds() {
  static const Kernels* const kBuilds[] = {
#if defined(__x86_64__)
#if defined(__linux__)
      &amx::kKernels,
#endif
      &avx512::kKernels, &avx2::kKernels,
#elif defined(__aarch64__)
      &neon::kDotProduct, &neon::kKernels,
#endif
      &portable::kKernels, nullptr};
  return kBuilds;
}

// The kernels for networks with activations up to this one. MULTIFIRE_ENGINE_ISA names those to use, for tests and
// measurements.
inline const Kernels& chosen_kernels(int largest_input) {
  const char* wanted = std::getenv("MULTIFIRE_ENGINE_ISA");
  for (const Kernels* const* build = builds(); *build; ++build)
    if ((!wanted || std::strcmp(wanted, (*build)->name) == 0) && largest_input <= (*build)->largest_input &&
        (*build)->runs_here())
      return **build;
  throw Failure{MULTIFIRE_BAD_INPUT, std::string("MULTIFIRE_ENGINE_ISA is ") + wanted +
                                         ", which this processor or this build does not run, or not for this network"};
}

}  // namespace multifire_engine_impl

#endif
