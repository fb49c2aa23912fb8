// The kernels, written on the compiler's portable vectors and compiled once for each instruction set (see CMakeLists.txt):
// MULTIFIRE_ISA names the build, MULTIFIRE_LANES is its number of floats in a register.
//
// Each pass takes a tile of kTile neighbouring values (one or two cache lines) through all time steps with the membranes in
// registers, to save passes over memory. No operation that decides a spike may be contracted to a fused multiply-add: spikes
// must equal the reference's.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "mlf.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

constexpr int kLanes = MULTIFIRE_LANES;
constexpr int kTile = 32;
constexpr int kVecs = kTile / kLanes;
constexpr int kAnyLevels = -1;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef float Narrow __attribute__((vector_size(2 * kLanes)));  // as many floats as doubles fit into a register
typedef double Wide __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline Vec splat(float value) { return Vec{} + value; }

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The compiler splits these conversions in two on AVX-512, hence the intrinsics.
inline Bits widen(HalfBits half) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)half);
#else
  return __builtin_convertvector(half, Bits);
#endif
}

inline Mask widen(Bytes bytes) {
#if defined(__AVX512F__)
  return (Mask)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  return (Mask)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
#else
  return __builtin_convertvector(bytes, Mask);
#endif
}

inline HalfBits narrow(Bits bits) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, HalfBits);
#endif
}

// The low bytes of integers.
inline Bytes narrow(Mask whole) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)whole);
#else
  return __builtin_convertvector(whole, Bytes);
#endif
}

inline bool any(Mask lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
  for (int lane = 0; lane < kLanes; ++lane)
    if (lanes[lane]) return true;
  return false;
#endif
}

// a·b + c, rounded once if the processor can. For gradients and sums only: spikes must round like the reference.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Wide fused(Wide a, Wide b, Wide c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec load(const bf16* from) {
  HalfBits half;
  std::memcpy(&half, from, sizeof half);
  return (Vec)(widen(half) << 16);
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// Rounds to nearest even. A NaN stays a NaN: its quiet bit is set, and the carry of the rounding stops below it.
inline void store(bf16* to, Vec value) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(value);
#else
  const Bits bits = (Bits)value;
  const HalfBits half = narrow((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
  std::memcpy(to, &half, sizeof half);
}

inline float as_float(float value) { return value; }
inline float as_float(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// kTile values in registers. The last tile of a row may have fewer, `count`; its other lanes are zero and never stored.
struct Tile {
  Vec v[kVecs];
};

// Written out, since the compiler would call memset.
inline Tile zeros() {
  Tile tile;
  for (int i = 0; i < kVecs; ++i) tile.v[i] = splat(0);
  return tile;
}

template <bool Full, class S>
inline Tile load_tile(const S* from, int count) {
  S padded[kTile];
  if (!Full) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, from, count * sizeof(S));
    from = padded;
  }
  Tile tile;
  for (int i = 0; i < kVecs; ++i) tile.v[i] = load(from + i * kLanes);
  return tile;
}

template <bool Full, class S>
inline void store_tile(S* to, const Tile& tile, int count) {
  S padded[kTile];
  S* target = Full ? to : padded;
  for (int i = 0; i < kVecs; ++i) store(target + i * kLanes, tile.v[i]);
  if (!Full) std::memcpy(to, padded, count * sizeof(S));
}

// The division of one time step's values into units of work. It depends only on shapes, and partial sums are added in its
// order, so results do not depend on the number of threads.
struct Grid {
  int64_t channels, inner, step, units, per_unit, segments;
  bool flat;  // channels vary fastest

  explicit Grid(const Args& a) : channels(a.channels), inner(a.inner), step(a.outer * a.channels * a.inner) {
    flat = inner == 1;
    constexpr int64_t kMostUnits = 128, kFewestValues = 4096;
    if (flat) {
      const int64_t rows = std::max({int64_t{1}, (a.outer + kMostUnits - 1) / kMostUnits,
                                     (kFewestValues + channels * a.timesteps - 1) / (channels * a.timesteps)});
      per_unit = rows * channels;
      segments = 1;
      units = (a.outer + rows - 1) / rows;
    } else {
      per_unit = 8192;
      segments = (inner + per_unit - 1) / per_unit;
      units = a.outer * channels * segments;
    }
  }

  // Channel tables repeat, so that a tile can start at any channel and read kTile entries in a row.
  int64_t period() const { return flat ? channels : 1; }
  int64_t table_size() const { return flat ? channels + kTile : channels * kTile; }
};

struct Unit {
  int64_t begin, length, channel;  // channel: that of a unit of contiguous data, 0 for channels-last
};

inline Unit unit_at(const Grid& g, int64_t index) {
  if (g.flat) {
    const int64_t begin = index * g.per_unit;
    return {begin, std::min(g.per_unit, g.step - begin), 0};
  }
  const int64_t plane = index / g.segments, offset = index % g.segments * g.per_unit;
  return {plane * g.inner + offset, std::min(g.per_unit, g.inner - offset), plane % g.channels};
}

template <class T>
class Table {
 public:
  template <class F>
  Table(const Grid& g, F value_of) : values_(g.table_size()), flat_(g.flat) {
    const size_t repeat = flat_ ? 1 : kTile;
    for (int64_t c = 0; c < g.channels; ++c) std::fill_n(values_.begin() + c * repeat, repeat, static_cast<T>(value_of(c)));
    for (size_t i = g.channels * repeat; i < values_.size(); ++i) values_[i] = values_[i - g.channels];
  }
  const T* at(const Unit& unit) const { return values_.data() + (flat_ ? 0 : unit.channel * kTile); }

 private:
  std::vector<T> values_;
  bool flat_;
};

// Calls f(position, channel offset, values) for the tiles of a unit.
template <class F>
inline void each_tile(const Grid& g, const Unit& unit, F f) {
  const int64_t period = g.period();
  int64_t channel = 0;
  for (int64_t i = 0; i < unit.length; i += kTile) {
    f(unit.begin + i, channel, static_cast<int>(std::min<int64_t>(kTile, unit.length - i)));
    channel += kTile;
    if (channel >= period) channel %= period;
  }
}

// Threads take jobs from a counter, which balances the load on a busy machine and needs only basic OpenMP.
template <class F>
void in_parallel(int64_t jobs, int64_t threads, F f) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t job; (job = next.fetch_add(1)) < jobs;) f(job);
  };
  const int team = static_cast<int>(std::min(jobs, threads));
  if (team <= 1) return work();
#pragma omp parallel num_threads(team)
  work();
}

// Scratch memory of this thread, aligned to a cache line: an access across two lines costs twice.
float* scratch(size_t size) {
  constexpr size_t kLine = 64 / sizeof(float);
  static thread_local std::vector<float> memory;
  if (memory.size() < size + kLine) memory.resize(size + kLine);
  const size_t past = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % kLine;
  return memory.data() + (past ? kLine - past : 0);
}

// Two sums per channel in double, added up over units.
class Sums {
 public:
  explicit Sums(const Grid& g) : g_(g), parts_(2 * g.units * g.period()) {}

  // `body` adds to two arrays of period + kTile entries, indexed by channel offset + lane.
  template <class F>
  void gather(int64_t unit, F body) {
    const int64_t period = g_.period(), size = period + kTile;
    static thread_local std::vector<double> memory;
    memory.assign(2 * size, 0.0);
    body(memory.data(), memory.data() + size);
    double* part = parts_.data() + 2 * unit * period;
    for (const double* from : {memory.data(), memory.data() + size}) {
      std::copy(from, from + period, part);
      for (int64_t i = period; i < size; ++i) part[i % period] += from[i];  // a tile may extend past the end of the period
      part += period;
    }
  }

  // The first sum of every channel, then the second.
  std::vector<double> totals() const {
    const int64_t period = g_.period();
    std::vector<double> totals(2 * g_.channels);
    const double* part = parts_.data();
    for (int64_t unit = 0; unit < g_.units; ++unit) {
      const int64_t channel = g_.flat ? 0 : unit / g_.segments % g_.channels;
      for (double* to : {totals.data() + channel, totals.data() + g_.channels + channel})
        for (int64_t i = 0; i < period; ++i) to[i] += *part++;
    }
    return totals;
  }

 private:
  const Grid& g_;
  std::vector<double> parts_;
};

inline Narrow load_narrow(const float* from) {
  Narrow value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Narrow load_narrow(const bf16* from) {
  typedef uint16_t In __attribute__((vector_size(kLanes)));
  typedef uint32_t Out __attribute__((vector_size(2 * kLanes)));
  In half;
  std::memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
  return (Narrow)((Out)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
  return (Narrow)(__builtin_convertvector(half, Out) << 16);
#endif
}

inline Wide widen(Narrow value) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(value);
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(value);
#else
  return __builtin_convertvector(value, Wide);
#endif
}

inline Wide load_wide(const double* from) {
  Wide value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Σ(x - shift) and Σ(x - shift)² of a tile over time, added to the channel sums.
template <bool Full, class S>
inline void stats_tile(const S* x, int64_t stride, int64_t timesteps, const double* shift, int count, double* sum, double* square) {
  constexpr int kHalf = kLanes / 2, kGroups = kTile / kHalf;
  Wide sums[kGroups] = {}, squares[kGroups] = {}, shifts[kGroups];
  for (int i = 0; i < kGroups; ++i) shifts[i] = load_wide(shift + i * kHalf);
  for (int64_t t = 0; t < timesteps; ++t) {
    S padded[kTile];
    const S* from = x + t * stride;
    if (!Full) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, from, count * sizeof(S));
      from = padded;
    }
    for (int i = 0; i < kGroups; ++i) {
      const Wide d = widen(load_narrow(from + i * kHalf)) - shifts[i];
      sums[i] += d;
      squares[i] = fused(d, d, squares[i]);
    }
  }
  double lanes[2][kTile];
  std::memcpy(lanes[0], sums, sizeof lanes[0]);
  std::memcpy(lanes[1], squares, sizeof lanes[1]);
  for (int i = 0; i < (Full ? kTile : count); ++i) {
    sum[i] += lanes[0][i];
    square[i] += lanes[1][i];
  }
}

// Mean and biased variance per channel. The sums are taken about the channel's first value, so that a nearly constant channel
// with a large mean keeps its variance.
template <class S>
class Stats {
 public:
  Stats(const Args& a, const Grid& g)
      : a_(a),
        g_(g),
        x_(static_cast<const S*>(a.x)),
        timesteps_(a.static_input ? 1 : a.timesteps),
        shift_(g, [&](int64_t c) { return double{as_float(x_[c * a.inner])}; }),
        sums_(g) {}

  void gather(int64_t index) {
    const Unit unit = unit_at(g_, index);
    const double* shifts = shift_.at(unit);
    sums_.gather(index, [&](double* sum, double* square) {
      each_tile(g_, unit, [&](int64_t at, int64_t c, int count) {
        if (count == kTile)
          stats_tile<true>(x_ + at, g_.step, timesteps_, shifts + c, count, sum + c, square + c);
        else
          stats_tile<false>(x_ + at, g_.step, timesteps_, shifts + c, count, sum + c, square + c);
      });
    });
  }

  // Called when all units are done.
  void write() const {
    const double n = static_cast<double>(timesteps_) * a_.outer * a_.inner;
    const std::vector<double> totals = sums_.totals();
    for (int64_t c = 0; c < a_.channels; ++c) {
      const double sum = totals[c], square = totals[a_.channels + c];
      a_.mean[c] = static_cast<float>(as_float(x_[c * a_.inner]) + sum / n);
      const double var = (square - sum * sum / n) / n;
      a_.var[c] = static_cast<float>(var < 0 ? 0 : var);
    }
  }

 private:
  const Args& a_;
  const Grid& g_;
  const S* x_;
  int64_t timesteps_;
  Table<double> shift_;
  Sums sums_;
};

template <class S>
void stats(const Args& a) {
  const Grid g(a);
  Stats<S> stats(a, g);
  in_parallel(g.units, a.threads, [&](int64_t index) { stats.gather(index); });
  stats.write();
}

bool constant(const Args& a, int64_t c) { return a.var[c] < std::numeric_limits<float>::min(); }

// sqrt(var); for a constant channel slightly above 0.
float root_of(const Args& a, int64_t c) { return std::sqrt(constant(a, c) ? std::numeric_limits<float>::min() : a.var[c]); }

// scale / (sqrt(var) + eps), which torch computes as a reciprocal and a product.
float factor_of(const Args& a, int64_t c) {
  return a.var ? 1 / (root_of(a, c) + static_cast<float>(a.eps)) * static_cast<float>(a.scale) : 1.0f;
}

struct NormTables {
  Table<float> mean, factor, weight, bias;

  NormTables(const Args& a, const Grid& g)
      : mean(g, [&](int64_t c) { return a.mean ? a.mean[c] : 0.0f; }),
        factor(g, [&](int64_t c) { return factor_of(a, c); }),
        weight(g, [&](int64_t c) { return a.weight ? a.weight[c] : 1.0f; }),
        bias(g, [&](int64_t c) { return a.bias ? a.bias[c] : 0.0f; }) {}
};

// The norm's four numbers for each value of a tile.
struct TileNorm {
  Tile mean, factor, weight, bias;

  TileNorm(const NormTables& n, const Unit& unit, int64_t c)
      : mean(load_tile<true>(n.mean.at(unit) + c, kTile)),
        factor(load_tile<true>(n.factor.at(unit) + c, kTile)),
        weight(load_tile<true>(n.weight.at(unit) + c, kTile)),
        bias(load_tile<true>(n.bias.at(unit) + c, kTile)) {}
};

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

template <class S>
struct Tensors {
  const S *x, *before, *after, *grad;
  S *out, *grad_x, *grad_before;
  int64_t x_stride;

  Tensors(const Args& a, const Grid& g)
      : x(static_cast<const S*>(a.x)),
        before(static_cast<const S*>(a.add_before)),
        after(static_cast<const S*>(a.add_after)),
        grad(static_cast<const S*>(a.grad_out)),
        out(static_cast<S*>(a.out)),
        grad_x(static_cast<S*>(a.grad_x)),
        grad_before(static_cast<S*>(a.grad_add_before)),
        x_stride(a.static_input ? 0 : g.step) {}
};

template <int K, bool Full, class S>
inline void forward_tile(const Args& a, const Tensors<S>& s, const Neurons<K>& neurons, const TileNorm& norm, int64_t step,
                         int64_t at, int count) {
  const int levels = neurons.levels();
  Membranes membranes[Neurons<K>::kStored];
  for (int k = 0; k < levels; ++k)
    membranes[k].start(a.state ? load_tile<Full>(a.state + k * step + at, count) : zeros());
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const int64_t here = t * step + at;
    Tile y = load_tile<Full>(s.x + t * s.x_stride + at, count), fired;
    for (int i = 0; i < kVecs; ++i)
      y.v[i] = (y.v[i] - norm.mean.v[i]) * norm.factor.v[i] * norm.weight.v[i] + norm.bias.v[i];
    if (s.before) {
      const Tile add = load_tile<Full>(s.before + here, count);
      for (int i = 0; i < kVecs; ++i) y.v[i] = y.v[i] + add.v[i];
    }
    for (int i = 0; i < kVecs; ++i) fired.v[i] = splat(static_cast<float>(levels));
    for (int k = 0; k < levels; ++k) {
      for (int i = 0; i < kVecs; ++i) {
        membranes[k].step(i, neurons.decay, y.v[i], neurons.thresholds[k]);
        fired.v[i] = less_one(fired.v[i], membranes[k].silent[i]);
      }
    }
    if (K == 0) fired = y;
    if (s.after) {
      const Tile add = load_tile<Full>(s.after + here, count);
      for (int i = 0; i < kVecs; ++i) fired.v[i] = fired.v[i] + add.v[i];
    }
    store_tile<Full>(s.out + here, fired, count);
  }
  if (a.state_out)
    for (int k = 0; k < levels; ++k) store_tile<Full>(a.state_out + k * step + at, membranes[k].state(), count);
}

template <int K, class S>
void forward(const Args& a) {
  const Grid g(a);
  const NormTables tables(a, g);
  in_parallel(g.units, a.threads, [&](int64_t index) {
    const Args own = a;  // a local copy can stay in registers, since stores cannot change it
    const Neurons<K> neurons(own);
    const Tensors<S> tensors(own, g);
    const Unit unit = unit_at(g, index);
    each_tile(g, unit, [&](int64_t at, int64_t c, int count) {
      const TileNorm norm(tables, unit, c);
      if (count == kTile)
        forward_tile<K, true>(own, tensors, neurons, norm, g.step, at, count);
      else
        forward_tile<K, false>(own, tensors, neurons, norm, g.step, at, count);
    });
  });
}

// Surrogates, in the order of reference.SURROGATES: kept + h(v)·pull, h the derivative at v = u - θ.
inline Vec magnitude(Vec v) { return (Vec)((Mask)v & 0x7fffffff); }

struct Rect {
  float half, height;
  explicit Rect(double width) : half(static_cast<float>(width / 2)), height(1 / static_cast<float>(width)) {}
  Vec operator()(Vec v, Vec pull, Vec kept) const {
    return magnitude(v) < half ? fused(splat(height), pull, kept) : kept;
  }
};

struct Triangle {
  float width;
  explicit Triangle(double w) : width(static_cast<float>(w)) {}
  Vec operator()(Vec v, Vec pull, Vec kept) const {
    const Vec h = 1 - magnitude(v) / width;
    return fused((h > 0 ? h : splat(0)) / width, pull, kept);
  }
};

struct Atan {
  float width, slope;
  explicit Atan(double w) : width(static_cast<float>(w)), slope(static_cast<float>(M_PI / w)) {}
  Vec operator()(Vec v, Vec pull, Vec kept) const {
    const Vec z = slope * v;
    return fused(1 / (width * (1 + z * z)), pull, kept);
  }
};

// First backward pass of a tile: recomputes the membranes from x, then runs time backwards.
//     δ_k[t] = c·(1 - s_k[t]) + h_k[t]·(g[t] - c·u_k[t]),   c = decay·δ_k[t+1],   dy[t] = Σ_k δ_k[t]
// (without c·u_k where the reset is detached: Reset is false).
// In training, dy is stored in the memory of dx (or as the gradient of add_before, which equals it). `sum` and `product` add up
// Σ dy and Σ dy·(x - μ): over one tile's time steps in float, beyond that in double.
template <int K, bool Full, bool Reset, class S, class Surrogate>
inline void backward_tile(const Args& a, const Tensors<S>& s, const Neurons<K>& neurons, const Surrogate& surrogate,
                          const TileNorm& norm, float* memory, int64_t step, int64_t at, int count, double* sum,
                          double* product) {
  const int levels = neurons.levels();
  const int64_t slot = (levels + 1) * kTile;  // x - μ, then u_k, of one time step
  Membranes membranes[Neurons<K>::kStored];
  for (int k = 0; k < levels; ++k)
    membranes[k].start(a.state ? load_tile<Full>(a.state + k * step + at, count) : zeros());
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const int64_t here = t * step + at;
    Tile y = load_tile<Full>(s.x + t * s.x_stride + at, count);
    for (int i = 0; i < kVecs; ++i) {
      const Vec centred = y.v[i] - norm.mean.v[i];
      store(memory + t * slot + i * kLanes, centred);
      y.v[i] = centred * norm.factor.v[i] * norm.weight.v[i] + norm.bias.v[i];
    }
    if (s.before) {
      const Tile add = load_tile<Full>(s.before + here, count);
      for (int i = 0; i < kVecs; ++i) y.v[i] = y.v[i] + add.v[i];
    }
    for (int k = 0; k < levels; ++k) {
      for (int i = 0; i < kVecs; ++i) {
        membranes[k].step(i, neurons.decay, y.v[i], neurons.thresholds[k]);
        store(memory + t * slot + (k + 1) * kTile + i * kLanes, membranes[k].u[i]);
      }
    }
  }

  Tile delta[Neurons<K>::kStored];  // ∂L/∂carry
  for (int k = 0; k < levels; ++k)
    delta[k] = a.grad_state_out ? load_tile<Full>(a.grad_state_out + k * step + at, count) : zeros();
  Tile sums = zeros(), products = zeros();
  for (int64_t t = a.timesteps - 1; t >= 0; --t) {
    const int64_t here = t * step + at;
    const Tile grad = load_tile<Full>(s.grad + here, count);
    Tile dy = grad;
    for (int k = 0; k < levels; ++k) {
      for (int i = 0; i < kVecs; ++i) {
        const Vec u = load(memory + t * slot + (k + 1) * kTile + i * kLanes), v = u - neurons.thresholds[k];
        const Vec carried = delta[k].v[i], kept = v > 0 ? splat(0) : carried;
        const Vec pull = Reset ? fused(-u, carried, grad.v[i]) : grad.v[i];
        const Vec d = surrogate(v, pull, kept);
        dy.v[i] = k == 0 ? d : dy.v[i] + d;
        delta[k].v[i] = neurons.decay * d;
      }
    }
    for (int i = 0; i < kVecs; ++i) {
      sums.v[i] += dy.v[i];
      products.v[i] = fused(dy.v[i], load(memory + t * slot + i * kLanes), products.v[i]);
    }
    if (s.grad_before) store_tile<Full>(s.grad_before + here, dy, count);
    if (a.static_input || (a.training && s.grad_before)) continue;
    if (!a.training)
      for (int i = 0; i < kVecs; ++i) dy.v[i] = dy.v[i] * (norm.factor.v[i] * norm.weight.v[i]);
    store_tile<Full>(s.grad_x + here, dy, count);
  }
  if (a.grad_state)
    for (int k = 0; k < levels; ++k) store_tile<Full>(a.grad_state + k * step + at, delta[k], count);
  if (a.static_input) {
    Tile dx = sums;
    if (!a.training)
      for (int i = 0; i < kVecs; ++i) dx.v[i] = dx.v[i] * (norm.factor.v[i] * norm.weight.v[i]);
    store_tile<Full>(s.grad_x + at, dx, count);
  }
  if (!sum) return;
  float lanes[2][kTile];
  std::memcpy(lanes[0], &sums, sizeof lanes[0]);
  std::memcpy(lanes[1], &products, sizeof lanes[1]);
  for (int i = 0; i < (Full ? kTile : count); ++i) {
    sum[i] += lanes[0][i];
    product[i] += lanes[1][i];
  }
}

// Second backward pass, in training: dx = slope·dy + offset + tilt·(x - μ), the three numbers per channel.
template <bool Full, class S>
inline void finish_tile(const S* dy, const S* x, S* dx, int64_t stride, int64_t timesteps, const Tile& mean, const Tile& slope,
                        const Tile& offset, const Tile& tilt, int count) {
  for (int64_t t = 0; t < timesteps; ++t) {
    Tile out = load_tile<Full>(dy + t * stride, count);
    const Tile in = load_tile<Full>(x + t * stride, count);
    for (int i = 0; i < kVecs; ++i)
      out.v[i] = fused(slope.v[i], out.v[i], fused(tilt.v[i], in.v[i] - mean.v[i], offset.v[i]));
    store_tile<Full>(dx + t * stride, out, count);
  }
}

// The second pass, given the sums.
template <class S>
class Finish {
 public:
  Finish(const Args& a, const Grid& g)
      : g_(g),
        tensors_(a, g),
        timesteps_(a.static_input ? 1 : a.timesteps),
        steps_(a.static_input ? static_cast<double>(a.timesteps) : 1),
        mean_(g, [&](int64_t c) { return a.mean[c]; }),
        slope_(g, [&](int64_t c) { return slope_of(a, c); }),
        offset_(g, [&](int64_t c) { return -steps_ * slope_of(a, c) * a.sums[c] / a.values; }),
        tilt_(g, [&](int64_t c) { return tilt_of(a, c); }) {
    dy_ = tensors_.grad_before && !a.static_input ? tensors_.grad_before : tensors_.grad_x;
  }

  void operator()(int64_t index) const {
    const Unit unit = unit_at(g_, index);
    const Tensors<S>& s = tensors_;
    each_tile(g_, unit, [&](int64_t at, int64_t c, int count) {
      const auto tile = [&](const Table<float>& table) { return load_tile<true>(table.at(unit) + c, kTile); };
      const Tile mean = tile(mean_), slope = tile(slope_), offset = tile(offset_), tilt = tile(tilt_);
      if (count == kTile)
        finish_tile<true>(dy_ + at, s.x + at, s.grad_x + at, g_.step, timesteps_, mean, slope, offset, tilt, count);
      else
        finish_tile<false>(dy_ + at, s.x + at, s.grad_x + at, g_.step, timesteps_, mean, slope, offset, tilt, count);
    });
  }

 private:
  static double slope_of(const Args& a, int64_t c) { return double{factor_of(a, c)} * (a.weight ? a.weight[c] : 1.0f); }

  double tilt_of(const Args& a, int64_t c) const {
    const double std = root_of(a, c), product = a.sums[a.channels + c];
    return constant(a, c) ? 0 : -steps_ * slope_of(a, c) * product / ((std + a.eps) * a.values * std);
  }

  const Grid& g_;
  Tensors<S> tensors_;
  int64_t timesteps_;
  double steps_;  // time steps of dx for one value of x
  Table<float> mean_, slope_, offset_, tilt_;
  const S* dy_;
};

template <class S>
void finish(const Args& a) {
  const Grid g(a);
  const Finish<S> finish(a, g);
  in_parallel(g.units, a.threads, finish);
}

template <int K, class S, class Surrogate, bool Reset>
void backward_pass(const Args& a) {
  const Grid g(a);
  const NormTables tables(a, g);
  Sums sums(g);
  in_parallel(g.units, a.threads, [&](int64_t index) {
    const Args own = a;  // as in `forward`
    const Neurons<K> neurons(own);
    const Tensors<S> tensors(own, g);
    const Surrogate surrogate(own.width);
    const Unit unit = unit_at(g, index);
    float* memory = scratch(a.timesteps * (a.levels + 1) * kTile);
    sums.gather(index, [&](double* sum, double* product) {
      each_tile(g, unit, [&](int64_t at, int64_t c, int count) {
        const TileNorm norm(tables, unit, c);
        if (count == kTile)
          backward_tile<K, true, Reset>(own, tensors, neurons, surrogate, norm, memory, g.step, at, count, sum + c, product + c);
        else
          backward_tile<K, false, Reset>(own, tensors, neurons, surrogate, norm, memory, g.step, at, count, sum + c, product + c);
      });
    });
  });
  if (!a.sums) return;
  const std::vector<double> totals = sums.totals();
  std::copy(totals.begin(), totals.end(), a.sums);
  for (int64_t c = 0; c < a.channels; ++c) {
    if (a.grad_weight) a.grad_weight[c] = static_cast<float>(totals[a.channels + c] * factor_of(a, c));
    if (a.grad_bias) a.grad_bias[c] = static_cast<float>(totals[c]);
  }
}

template <int K, class S, class Surrogate>
void backward(const Args& a) {
  a.detach_reset ? backward_pass<K, S, Surrogate, false>(a) : backward_pass<K, S, Surrogate, true>(a);
}

constexpr int64_t kGroup = 16, kPackJob = 1 << 16;

// Packed spikes come in blocks of kGroup bytes. With kBits to a value, byte i of a block holds the block's values i,
// kGroup + i, 2·kGroup + i, ..., the first in its lowest bits.
template <int kBits>
struct Packing {
  static constexpr int kWays = 8 / kBits, kMost = (1 << kBits) - 1, kBlock = kGroup * kWays;
  static constexpr int64_t kBlocks = kPackJob / kBlock;  // of a job
};

// Calls f(first value, first byte, values) for each block, in parallel.
template <int kBits, class F>
void each_block(int64_t count, int64_t threads, F f) {
  using P = Packing<kBits>;
  const int64_t blocks = (count + P::kBlock - 1) / P::kBlock;
  in_parallel((blocks + P::kBlocks - 1) / P::kBlocks, threads, [&](int64_t job) {
    const int64_t end = std::min(blocks, (job + 1) * P::kBlocks);
    for (int64_t block = job * P::kBlocks; block < end; ++block)
      f(block * P::kBlock, block * kGroup, std::min<int64_t>(P::kBlock, count - block * P::kBlock));
  });
}

// Packs integers of kBits into bytes; returns false, with useless bytes, if a value is no such integer.
template <int kBits, class S>
bool pack(const S* spikes, uint8_t* bytes, int64_t count, int64_t threads) {
  using P = Packing<kBits>;
  std::atomic<bool> exact{true};
  each_block<kBits>(count, threads, [&](int64_t at, int64_t byte, int64_t values) {
    S padded[P::kBlock];
    const S* from = spikes + at;
    if (values < P::kBlock) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, from, values * sizeof(S));
      from = padded;
    }
    Mask wrong = {};
    for (int lane = 0; lane < kGroup; lane += kLanes) {
      Mask held = {};
      for (int way = 0; way < P::kWays; ++way) {
        const Vec value = load(from + way * kGroup + lane);
        const Mask whole = __builtin_convertvector(value, Mask);
        wrong |= (__builtin_convertvector(whole, Vec) != value) | ((whole & ~P::kMost) != 0);
        held |= whole << (way * kBits);
      }
      const Bytes low = narrow(held);
      std::memcpy(bytes + byte + lane, &low, sizeof low);
    }
    if (any(wrong)) exact = false;
  });
  return exact;
}

template <int kBits, class S>
void unpack(const uint8_t* bytes, S* spikes, int64_t count, int64_t threads) {
  using P = Packing<kBits>;
  each_block<kBits>(count, threads, [&](int64_t at, int64_t byte, int64_t values) {
    S padded[P::kBlock];
    S* to = values < P::kBlock ? padded : spikes + at;
    for (int lane = 0; lane < kGroup; lane += kLanes) {
      Bytes low;
      std::memcpy(&low, bytes + byte + lane, sizeof low);
      const Mask held = widen(low);
      for (int way = 0; way < P::kWays; ++way)
        store(to + way * kGroup + lane, __builtin_convertvector(held >> (way * kBits) & P::kMost, Vec));
    }
    if (values < P::kBlock) std::memcpy(spikes + at, padded, values * sizeof(S));
  });
}

typedef uint8_t TileBytes __attribute__((vector_size(kTile)));

// The low bytes of a tile of integers.
inline TileBytes narrow(const Mask (&tile)[kVecs]) {
  TileBytes bytes;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i low = _mm256_packs_epi32((__m256i)tile[0], (__m256i)tile[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)tile[2], (__m256i)tile[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works within each half of a register
  bytes = (TileBytes)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
#else
  for (int i = 0; i < kVecs; ++i) {
    const Bytes part = narrow(tile[i]);
    std::memcpy(reinterpret_cast<char*>(&bytes) + i * kLanes, &part, sizeof part);
  }
#endif
  return bytes;
}

inline TileBytes load_bytes(const uint8_t* from, int count) {
  TileBytes bytes = {};
  std::memcpy(&bytes, from, count);
  return bytes;
}

template <int K, bool Full>
inline void fire_tile(const FireArgs& a, const Neurons<K>& neurons, const float* scales, const float* biases, int64_t at,
                      int count) {
  const Tile scale = load_tile<true>(scales, kTile), bias = load_tile<true>(biases, kTile);
  const int64_t stride = a.static_input ? 0 : a.values;
  const int bytes = Full ? kTile : count;
  const int levels = neurons.levels();
  Membranes membranes[Neurons<K>::kStored];
  for (int k = 0; k < levels; ++k)
    membranes[k].start(a.state ? load_tile<Full>(a.state + k * a.values + at, count) : zeros());
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const int64_t here = t * a.values + at;
    Tile y = load_tile<Full>(a.sums + t * stride + at, count);
    Mask fired[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      y.v[i] = y.v[i] * scale.v[i] + bias.v[i];
      fired[i] = Mask{} + levels;
    }
    for (int k = 0; k < levels; ++k) {
      for (int i = 0; i < kVecs; ++i) {
        membranes[k].step(i, neurons.decay, y.v[i], neurons.thresholds[k]);
        fired[i] = less_one(fired[i], membranes[k].silent[i]);
      }
    }
    TileBytes spikes = narrow(fired);
    if (a.add_after) spikes += load_bytes(a.add_after + here, bytes);
    std::memcpy(a.out + here, &spikes, bytes);
  }
  if (a.state_out)
    for (int k = 0; k < levels; ++k) store_tile<Full>(a.state_out + k * a.values + at, membranes[k].state(), count);
}

constexpr int64_t kFireJob = 1 << 12;  // a multiple of kTile

template <int K>
void fire(const FireArgs& a) {
  const Neurons<K> neurons(a);
  const auto repeated = [](const float* values, int64_t period) {  // repeated, so that a tile may start anywhere in the period
    std::vector<float> table(period + kTile);
    for (size_t i = 0; i < table.size(); ++i) table[i] = values[i % period];
    return table;
  };
  const std::vector<float> scale = repeated(a.scale, a.channels), bias = repeated(a.bias, a.bias_period);
  in_parallel((a.values + kFireJob - 1) / kFireJob, a.threads, [&](int64_t job) {
    const int64_t end = std::min(a.values, (job + 1) * kFireJob);
    for (int64_t at = job * kFireJob; at < end; at += kTile) {
      const float *scales = scale.data() + at % a.channels, *biases = bias.data() + at % a.bias_period;
      if (end - at >= kTile)
        fire_tile<K, true>(a, neurons, scales, biases, at, kTile);
      else
        fire_tile<K, false>(a, neurons, scales, biases, at, static_cast<int>(end - at));
    }
  });
}

// The rest chooses a specialisation at run time.

template <class S>
void forward_any(const Args& a) {
  switch (a.levels) {
    case 0: return forward<0, S>(a);
    case 1: return forward<1, S>(a);
    case 2: return forward<2, S>(a);
    case 3: return forward<3, S>(a);
    default: return forward<kAnyLevels, S>(a);
  }
}

void fire_any(const FireArgs& a) {
  switch (a.levels) {
    case 1: return fire<1>(a);
    case 2: return fire<2>(a);
    case 3: return fire<3>(a);
    default: return fire<kAnyLevels>(a);
  }
}

template <class S, class Surrogate>
void backward_levels(const Args& a) {
  switch (a.levels) {
    case 0: return backward<0, S, Rect>(a);
    case 1: return backward<1, S, Surrogate>(a);
    case 2: return backward<2, S, Surrogate>(a);
    case 3: return backward<3, S, Surrogate>(a);
    default: return backward<kAnyLevels, S, Surrogate>(a);
  }
}

template <class S>
void backward_any(const Args& a) {
  switch (a.surrogate) {
    case 0: return backward_levels<S, Rect>(a);
    case 1: return backward_levels<S, Triangle>(a);
    default: return backward_levels<S, Atan>(a);
  }
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
