// The kernels, written on the compiler's portable vectors and compiled once for each instruction set (see CMakeLists.txt):
// MULTIFIRE_ISA names the build, MULTIFIRE_LANES is its number of floats in a register.
//
// Each pass takes a tile of kTile neighbouring values (one or two cache lines) through all time steps with the membranes in
// registers, to save passes over memory. No operation that decides a spike may be contracted to a fused multiply-add: spikes
// must equal the reference's.

#include "family_pass.h"
#include "fire.h"
#include "mlf_pass.h"
#include "norm.h"
#include "packing.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

// The rest chooses a specialisation at run time.

template <class S>
void forward_any(const Args& a) {
  if (is_other_member(a)) return family_forward_any<S>(a);
  switch (a.levels) {
    case 0: return forward<0, S>(a);
    case 1: return forward<1, S>(a);
    case 2: return forward<2, S>(a);
    case 3: return forward<3, S>(a);
    default: return forward<kAnyLevels, S>(a);
  }
}

void fire_any(const FireArgs& a) {
  if (a.shared_membrane) return family_fire<true>(a);
  if (a.subtract) return family_fire<false>(a);
  switch (a.levels) {
    case 1: return fire<1>(a);
    case 2: return fire<2>(a);
    case 3: return fire<3>(a);
    default: return fire<kAnyLevels>(a);
  }
}

template <int K, bool Learn, class S, class Surrogate>
void backward(const Args& a) {
  a.detach_reset ? backward_pass<K, S, Surrogate, false, Learn>(a) : backward_pass<K, S, Surrogate, true, Learn>(a);
}

template <bool Learn, class S, class Surrogate>
void backward_levels(const Args& a) {
  switch (a.levels) {
    case 1: return backward<1, Learn, S, Surrogate>(a);
    case 2: return backward<2, Learn, S, Surrogate>(a);
    case 3: return backward<3, Learn, S, Surrogate>(a);
    default: return backward<kAnyLevels, Learn, S, Surrogate>(a);
  }
}

// The commonest calls have builds of their own; in those of others the number of levels is known at run time only.
template <class S>
void backward_any(const Args& a) {
  if (is_other_member(a)) return family_backward_any<S>(a);
  if (a.levels == 0) return backward<0, false, S, Rect>(a);
  if (a.surrogate == kRect) return a.learned ? backward_levels<true, S, Rect>(a) : backward_levels<false, S, Rect>(a);
  if (a.surrogate < kSigmoid && !a.learned) return backward_levels<false, S, Smooth>(a);
  a.learned ? backward<kAnyLevels, true, S, AnySurrogate>(a) : backward<kAnyLevels, false, S, AnySurrogate>(a);
}

template <class S>
bool pack_any(const void* spikes, uint8_t* bytes, int64_t count, int64_t bits, int64_t threads) {
  const S* from = static_cast<const S*>(spikes);
  switch (bits) {
    case 2: return pack<2>(from, bytes, count, threads);
    case 4: return pack<4>(from, bytes, count, threads);
    default: return pack<8>(from, bytes, count, threads);
  }
}

template <class S>
void unpack_any(const uint8_t* bytes, void* spikes, int64_t count, int64_t bits, int64_t threads) {
  S* to = static_cast<S*>(spikes);
  switch (bits) {
    case 2: return unpack<2>(bytes, to, count, threads);
    case 4: return unpack<4>(bytes, to, count, threads);
    default: return unpack<8>(bytes, to, count, threads);
  }
}

bool runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq")
#if defined(__AVX512BF16__)
         && __builtin_cpu_supports("avx512bf16")
#endif
      ;
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

#define MULTIFIRE_QUOTE(name) #name
#define MULTIFIRE_NAME(name) MULTIFIRE_QUOTE(name)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    MULTIFIRE_NAME(MULTIFIRE_ISA),
    runs_here,
    [](const Args& a) { a.bf16 ? stats<bf16>(a) : stats<float>(a); },
    [](const Args& a) { a.bf16 ? forward_any<bf16>(a) : forward_any<float>(a); },
    [](const Args& a) { a.bf16 ? backward_any<bf16>(a) : backward_any<float>(a); },
    [](const Args& a) { a.bf16 ? finish<bf16>(a) : finish<float>(a); },
    fire_any,
    [](const void* spikes, uint8_t* bytes, int64_t count, int64_t bits, bool is_bf16, int64_t threads) {
      return (is_bf16 ? pack_any<bf16> : pack_any<float>)(spikes, bytes, count, bits, threads);
    },
    [](const uint8_t* bytes, void* spikes, int64_t count, int64_t bits, bool is_bf16, int64_t threads) {
      (is_bf16 ? unpack_any<bf16> : unpack_any<float>)(bytes, spikes, count, bits, threads);
    },
};

}  // namespace MULTIFIRE_ISA
}  // namespace multifire
