// Tiles of kTile neighbouring values, their division into units of work, threads, and sums per channel.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "mlf.h"
#include "simd.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

constexpr int kTile = 32;
constexpr int kVecs = kTile / kLanes;

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

}  // namespace
}  // namespace MULTIFIRE_ISA
}  // namespace multifire
