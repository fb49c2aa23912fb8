// The threshold-dependent batch norm: statistics, its numbers for each value of a tile, and its second backward pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "tiles.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

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

// The neurons' input current at time t: the norm of x, plus `before`; x - μ goes to `centred`.
template <bool Full, class S>
MULTIFIRE_INLINE Tile current(const Tensors<S>& s, const TileNorm& norm, int64_t t, int64_t step, int64_t at, int count,
                              float* centred = nullptr) {
  Tile y = load_tile<Full>(s.x + t * s.x_stride + at, count);
  for (int i = 0; i < kVecs; ++i) {
    y.v[i] = y.v[i] - norm.mean.v[i];
    if (centred) store(centred + i * kLanes, y.v[i]);
    y.v[i] = y.v[i] * norm.factor.v[i] * norm.weight.v[i] + norm.bias.v[i];
  }
  if (s.before) {
    const Tile add = load_tile<Full>(s.before + t * step + at, count);
    for (int i = 0; i < kVecs; ++i) y.v[i] = y.v[i] + add.v[i];
  }
  return y;
}

// Stores spikes plus `after`.
template <bool Full, class S>
MULTIFIRE_INLINE void store_sum(const Tensors<S>& s, Tile spikes, int64_t here, int count) {
  if (s.after) {
    const Tile add = load_tile<Full>(s.after + here, count);
    for (int i = 0; i < kVecs; ++i) spikes.v[i] = spikes.v[i] + add.v[i];
  }
  store_tile<Full>(s.out + here, spikes, count);
}

// Stores the gradient dy of the current of one time step. In training it goes to the memory of dx, or to the gradient of
// add_before, which equals it; in evaluation dx is known at once.
template <bool Full, class S>
MULTIFIRE_INLINE void store_dy(const Args& a, const Tensors<S>& s, const TileNorm& norm, Tile dy, int64_t here, int count) {
  if (s.grad_before) store_tile<Full>(s.grad_before + here, dy, count);
  if (a.static_input || (a.training && s.grad_before)) return;
  if (!a.training)
    for (int i = 0; i < kVecs; ++i) dy.v[i] = dy.v[i] * (norm.factor.v[i] * norm.weight.v[i]);
  store_tile<Full>(s.grad_x + here, dy, count);
}

// Σ dy and Σ dy·(x - μ) of a tile: over its time steps in float, beyond that in double.
struct DySums {
  Tile sums = zeros(), products = zeros();

  MULTIFIRE_INLINE void add(const Tile& dy, const float* centred) {
    for (int i = 0; i < kVecs; ++i) {
      sums.v[i] += dy.v[i];
      products.v[i] = fused(dy.v[i], load(centred + i * kLanes), products.v[i]);
    }
  }

  // Stores dx of a static x, and adds the sums to those of the channels.
  template <bool Full, class S>
  MULTIFIRE_INLINE void finish(const Args& a, const Tensors<S>& s, const TileNorm& norm, int64_t at, int count, double* sum,
                               double* product) {
    if (a.static_input) {
      Tile dx = sums;
      if (!a.training)
        for (int i = 0; i < kVecs; ++i) dx.v[i] = dx.v[i] * (norm.factor.v[i] * norm.weight.v[i]);
      store_tile<Full>(s.grad_x + at, dx, count);
    }
    float lanes[2][kTile];
    std::memcpy(lanes[0], &sums, sizeof lanes[0]);
    std::memcpy(lanes[1], &products, sizeof lanes[1]);
    for (int i = 0; i < (Full ? kTile : count); ++i) {
      sum[i] += lanes[0][i];
      product[i] += lanes[1][i];
    }
  }
};

// Writes Σ dy and Σ dy·(x - μ) of each channel, and the gradients of γ and β, which follow from them.
inline void write_sums(const Args& a, const Sums& sums) {
  if (!a.sums) return;
  const std::vector<double> totals = sums.totals();
  std::copy(totals.begin(), totals.end(), a.sums);
  for (int64_t c = 0; c < a.channels; ++c) {
    if (a.grad_weight) a.grad_weight[c] = static_cast<float>(totals[a.channels + c] * factor_of(a, c));
    if (a.grad_bias) a.grad_bias[c] = static_cast<float>(totals[c]);
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

}  // namespace
}  // namespace MULTIFIRE_ISA
}  // namespace multifire
