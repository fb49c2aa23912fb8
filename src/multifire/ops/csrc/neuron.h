// A level's membranes of a tile, and the surrogate derivatives.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

constexpr int kAnyLevels = -1;

// A call's arguments in the types that the inner loops use. K levels are known at compile time, or kAnyLevels.
template <int K>
struct Neurons {
  static constexpr int kStored = K == kAnyLevels ? kMaxLevels : K == 0 ? 1 : K;
  int runtime_levels;
  float decay, thresholds[kMaxLevels];

  template <class A>
  explicit Neurons(const A& a) : runtime_levels(static_cast<int>(a.levels)), decay(static_cast<float>(a.decay)) {
    for (int k = 0; k < kMaxLevels; ++k) thresholds[k] = static_cast<float>(a.thresholds[k]);
  }
  int levels() const { return K == kAnyLevels ? runtime_levels : K; }
};

// The lanes whose membrane did not fire; a mask on AVX-512, with which the reset is free.
#if defined(__AVX512F__)
typedef __mmask16 Silent;
constexpr Silent kAllSilent = 0xffff;
inline Silent not_above(Vec u, float threshold) { return _mm512_cmp_ps_mask(u, splat(threshold), _CMP_NGT_UQ); }
inline Vec reset(Vec u, Silent silent) { return _mm512_maskz_mov_ps(silent, u); }
inline Vec leak(Vec u, Silent silent, float decay) { return _mm512_maskz_mul_ps(silent, splat(decay), u); }
inline Vec less_one(Vec count, Silent silent) { return _mm512_mask_sub_ps(count, silent, count, splat(1)); }
inline Mask less_one(Mask count, Silent silent) {
  return (Mask)_mm512_mask_sub_epi32((__m512i)count, silent, (__m512i)count, _mm512_set1_epi32(1));
}
#else
typedef Mask Silent;
constexpr Silent kAllSilent = Silent{} - 1;
inline Silent not_above(Vec u, float threshold) { return ~(u > threshold); }
inline Vec reset(Vec u, Silent silent) { return (Vec)((Mask)u & silent); }
inline Vec leak(Vec u, Silent silent, float decay) { return decay * reset(u, silent); }
inline Vec less_one(Vec count, Silent silent) { return count - reset(splat(1), silent); }
inline Mask less_one(Mask count, Silent silent) { return count + silent; }
#endif

// One level's membranes of a tile, before the reset.
struct Membranes {
  Vec u[kVecs];
  Silent silent[kVecs];

  void start(const Tile& state) {
    for (int i = 0; i < kVecs; ++i) {
      u[i] = state.v[i];
      silent[i] = kAllSilent;
    }
  }
  // One time step: u = decay·u·(1 - s) + y, s = u > θ.
  void step(int i, float decay, Vec y, float threshold) {
    u[i] = leak(u[i], silent[i], decay) + y;
    silent[i] = not_above(u[i], threshold);
  }
  Tile state() const {
    Tile state;
    for (int i = 0; i < kVecs; ++i) state.v[i] = reset(u[i], silent[i]);
    return state;
  }
};

// Surrogates: kept + h(v)·pull, h the derivative at v = u - θ.
struct Rect {
  float half, height;
  explicit Rect(const Args& a) : half(static_cast<float>(a.width / 2)), height(1 / static_cast<float>(a.width)) {}
  Vec derivative(Vec v) const { return magnitude(v) < half ? splat(height) : splat(0); }
  Vec operator()(Vec v, Vec pull, Vec kept) const {
    return magnitude(v) < half ? fused(splat(height), pull, kept) : kept;
  }
};

enum SurrogateKind { kRect, kTriangle, kAtan, kSigmoid, kGaussian };  // as SURROGATES of config/neurons.py

// Triangle or atan, whichever the call names.
struct Smooth {
  bool is_triangle;
  float width, slope;

  explicit Smooth(const Args& a)
      : is_triangle(a.surrogate == kTriangle), width(static_cast<float>(a.width)), slope(static_cast<float>(M_PI / a.width)) {}

  MULTIFIRE_INLINE Vec derivative(Vec v) const {
    if (is_triangle) {
      const Vec h = 1 - magnitude(v) / width;
      return (h > 0 ? h : splat(0)) / width;
    }
    const Vec z = slope * v;
    return 1 / (width * (1 + z * z));
  }
  MULTIFIRE_INLINE Vec operator()(Vec v, Vec pull, Vec kept) const { return fused(derivative(v), pull, kept); }
};

// Any but rect. The exponentials are long, so fewer builds of the passes have them.
struct AnySurrogate {
  Smooth smooth;
  SurrogateKind kind;
  float height, slope, root;

  explicit AnySurrogate(const Args& a)
      : smooth(a),
        kind(static_cast<SurrogateKind>(a.surrogate)),
        height(1 / static_cast<float>(a.width)),
        slope(static_cast<float>(4 / a.width)),
        root(static_cast<float>(std::sqrt(M_PI) / a.width)) {}

  MULTIFIRE_INLINE Vec derivative(Vec v) const {
    if (kind < kSigmoid) return smooth.derivative(v);
    const Vec z = kind == kSigmoid ? magnitude(slope * v) : root * v * (root * v);
    const Vec e = exp_of(-z);
    return kind == kSigmoid ? slope * e / ((1 + e) * (1 + e)) : height * e;
  }
  MULTIFIRE_INLINE Vec operator()(Vec v, Vec pull, Vec kept) const { return fused(derivative(v), pull, kept); }
};

// Sums over all values for the gradients of thresholds and decay: in float over a tile's time steps, beyond that in double,
// added up over units in their order.
class NeuronSums {
 public:
  static constexpr int kSums = kMaxLevels + 1;  // of each level, then of the decay

  struct Lanes {
    double values[kSums][kLanes] = {};
    void add(int which, Vec sum) {
      float lanes[kLanes];
      std::memcpy(lanes, &sum, sizeof lanes);
      for (int i = 0; i < kLanes; ++i) values[which][i] += lanes[i];
    }
  };

  explicit NeuronSums(const Grid& g) : units_(g.units), parts_(g.units * kSums) {}

  void store(int64_t unit, const Lanes& lanes) {
    for (int which = 0; which < kSums; ++which)
      for (double value : lanes.values[which]) parts_[unit * kSums + which] += value;
  }

  // Called when all units are done.
  void write(const Args& a) const {
    double totals[kSums] = {};
    for (int64_t unit = 0; unit < units_; ++unit)
      for (int which = 0; which < kSums; ++which) totals[which] += parts_[unit * kSums + which];
    for (int k = 0; a.grad_thresholds && k < a.levels; ++k) a.grad_thresholds[k] = static_cast<float>(totals[k]);
    if (a.grad_decay) *a.grad_decay = static_cast<float>(totals[kMaxLevels]);
  }

 private:
  int64_t units_;
  std::vector<double> parts_;
};

}  // namespace
}  // namespace MULTIFIRE_ISA
}  // namespace multifire
