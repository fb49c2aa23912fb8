// The two passes of the neuron's other members: signed levels, one membrane for all levels, reset by subtraction.
#pragma once

#include "neuron.h"
#include "norm.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

inline bool is_other_member(const Args& a) { return a.levels > 0 && (a.shared_membrane || a.subtract || a.signed_levels); }

// A call's arguments in the types that the inner loops use, and the reset. A membrane has one level of its own, or all levels
// share it. With `subtract`, a spike costs it θ_k of its own level, or 1 of a shared one.
template <bool Shared, bool Signed>
struct Family {
  static constexpr int kStored = Shared ? 1 : kMaxLevels;
  int levels, membranes;
  bool subtract, detach;
  float decay, thresholds[kMaxLevels];

  template <class A>
  explicit Family(const A& a, bool detach_reset = false)
      : levels(static_cast<int>(a.levels)),
        membranes(Shared ? 1 : levels),
        subtract(a.subtract != 0),
        detach(detach_reset),
        decay(static_cast<float>(a.decay)) {
    for (int k = 0; k < kMaxLevels; ++k) thresholds[k] = static_cast<float>(a.thresholds[k]);
  }

  // The levels of a membrane: the first, and one past the last. If any of them fires, the first does.
  int first(int membrane) const { return Shared ? 0 : membrane; }
  int end(int membrane) const { return Shared ? levels : membrane + 1; }
  float price(int k) const { return Shared ? 1 : thresholds[k]; }

  MULTIFIRE_INLINE Vec spikes(int k, Vec u) const {  // s_k
    const Vec up = u > thresholds[k] ? splat(1) : splat(0);
    return Signed ? (-u > thresholds[k] ? splat(-1) : up) : up;
  }
  MULTIFIRE_INLINE Vec unless_fires(int k, Vec u, Vec value) const {
    const Vec rest = u > thresholds[k] ? splat(0) : value;
    return Signed ? (-u > thresholds[k] ? splat(0) : rest) : rest;
  }

  // What a membrane u keeps after its spikes, which are added to `fired`.
  MULTIFIRE_INLINE Vec after_reset(int membrane, Vec u, Vec& fired) const {
    Vec cost = splat(0);
    for (int k = first(membrane); k < end(membrane); ++k) {
      const Vec s = spikes(k, u);
      fired += s;
      if (subtract) cost += price(k) * s;
    }
    return subtract ? u - cost : unless_fires(first(membrane), u, u);
  }
};

template <bool Full, bool Shared, bool Signed, class S>
inline void family_forward_tile(const Args& a, const Tensors<S>& s, const Family<Shared, Signed>& neuron, const TileNorm& norm,
                                int64_t step, int64_t at, int count) {
  Tile carries[Family<Shared, Signed>::kStored];
  for (int m = 0; m < neuron.membranes; ++m) carries[m] = a.state ? load_tile<Full>(a.state + m * step + at, count) : zeros();
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const Tile y = current<Full>(s, norm, t, step, at, count);
    Tile fired = zeros();
    for (int m = 0; m < neuron.membranes; ++m)
      for (int i = 0; i < kVecs; ++i)
        carries[m].v[i] = neuron.after_reset(m, neuron.decay * carries[m].v[i] + y.v[i], fired.v[i]);
    store_sum<Full>(s, fired, t * step + at, count);
  }
  if (a.state_out)
    for (int m = 0; m < neuron.membranes; ++m) store_tile<Full>(a.state_out + m * step + at, carries[m], count);
}

template <bool Shared, bool Signed, class S>
void family_forward(const Args& a) {
  const Grid g(a);
  const NormTables tables(a, g);
  in_parallel(g.units, a.threads, [&](int64_t index) {
    const Args own = a;  // a local copy can stay in registers, since stores cannot change it
    const Family<Shared, Signed> neuron(own);
    const Tensors<S> tensors(own, g);
    const Unit unit = unit_at(g, index);
    each_tile(g, unit, [&](int64_t at, int64_t c, int count) {
      const TileNorm norm(tables, unit, c);
      if (count == kTile)
        family_forward_tile<true>(own, tensors, neuron, norm, g.step, at, count);
      else
        family_forward_tile<false>(own, tensors, neuron, norm, g.step, at, count);
    });
  });
}

// First backward pass of a tile. With c = ∂L/∂(what a membrane u keeps) = decay·δ[t+1], h⁺ and h⁻ the surrogate at u - θ_k
// and, if signed, at -u - θ_k:
//     δ[t] = c·(1, or 0 where a spike set u to zero) + Σ_k (h⁺·g⁺ + h⁻·g⁻),   ∂L/∂θ_k = -Σ (h⁺·g⁺ - h⁻·g⁻)
// g⁺ and g⁻ are the gradients of a spike: g[t], and what it takes from u, which is its price·c, or ±u·c of a first level.
// Detached, they are g[t]. A price of θ_k adds -c·s_k to its gradient. ∂L/∂decay = Σ δ[t+1]·(what u[t] keeps).
template <bool Full, bool Shared, bool Signed, class S, class Surrogate>
inline void family_backward_tile(const Args& a, const Tensors<S>& s, const Family<Shared, Signed>& neuron,
                                 const Surrogate& surrogate, const TileNorm& norm, float* memory, int64_t step, int64_t at,
                                 int count, double* sum, double* product, NeuronSums::Lanes* learned) {
  const int64_t slot = (neuron.membranes + 1) * kTile;  // x - μ, then the membranes, of one time step
  Tile states[Family<Shared, Signed>::kStored];
  for (int m = 0; m < neuron.membranes; ++m) states[m] = a.state ? load_tile<Full>(a.state + m * step + at, count) : zeros();
  Tile carries[Family<Shared, Signed>::kStored];
  for (int m = 0; m < neuron.membranes; ++m) carries[m] = states[m];
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const Tile y = current<Full>(s, norm, t, step, at, count, memory + t * slot);
    for (int m = 0; m < neuron.membranes; ++m) {
      for (int i = 0; i < kVecs; ++i) {
        const Vec u = neuron.decay * carries[m].v[i] + y.v[i];
        store(memory + t * slot + (m + 1) * kTile + i * kLanes, u);
        Vec fired = splat(0);
        carries[m].v[i] = neuron.after_reset(m, u, fired);
      }
    }
  }

  Tile deltas[Family<Shared, Signed>::kStored];  // δ, which is to be multiplied by the decay
  for (int m = 0; m < neuron.membranes; ++m)
    deltas[m] = a.grad_state_out ? load_tile<Full>(a.grad_state_out + m * step + at, count) : zeros();
  DySums sums;
  Vec of_thresholds[kMaxLevels], of_decay = splat(0);
  for (int k = 0; k < neuron.levels; ++k) of_thresholds[k] = splat(0);
  for (int64_t t = a.timesteps - 1; t >= 0; --t) {
    const bool last = t == a.timesteps - 1;
    const float leak = last ? 1 : neuron.decay;
    const Tile grad = load_tile<Full>(s.grad + t * step + at, count);
    Tile dy = zeros();
    for (int m = 0; m < neuron.membranes; ++m) {
      for (int i = 0; i < kVecs; ++i) {
        const Vec u = load(memory + t * slot + (m + 1) * kTile + i * kLanes), g = grad.v[i];
        const Vec carried = leak * deltas[m].v[i];
        Vec fired = splat(0);
        of_decay = fused(deltas[m].v[i], neuron.after_reset(m, u, fired), of_decay);
        Vec d = neuron.subtract ? carried : neuron.unless_fires(neuron.first(m), u, carried);
        for (int k = neuron.first(m); k < neuron.end(m); ++k) {
          Vec up = g, down = g;
          if (!neuron.detach && neuron.subtract) up = down = g - neuron.price(k) * carried;
          if (!neuron.detach && !neuron.subtract && k == neuron.first(m)) {
            up = fused(-u, carried, g);
            down = fused(u, carried, g);
          }
          up = surrogate.derivative(u - neuron.thresholds[k]) * up;
          down = Signed ? surrogate.derivative(-u - neuron.thresholds[k]) * down : splat(0);
          d += up + down;
          of_thresholds[k] -= up - down;
          if (!Shared && neuron.subtract) of_thresholds[k] -= carried * neuron.spikes(k, u);
        }
        deltas[m].v[i] = d;
        dy.v[i] += d;
      }
    }
    if (last) of_decay = splat(0);  // what came from grad_state_out is no δ
    sums.add(dy, memory + t * slot);
    store_dy<Full>(a, s, norm, dy, t * step + at, count);
  }
  for (int m = 0; m < neuron.membranes; ++m) {
    for (int i = 0; i < kVecs; ++i) {
      of_decay = fused(deltas[m].v[i], states[m].v[i], of_decay);
      deltas[m].v[i] = neuron.decay * deltas[m].v[i];
    }
    if (a.grad_state) store_tile<Full>(a.grad_state + m * step + at, deltas[m], count);
  }
  if (a.learned) {
    for (int k = 0; k < neuron.levels; ++k) learned->add(k, of_thresholds[k]);
    learned->add(kMaxLevels, of_decay);
  }
  sums.finish<Full>(a, s, norm, at, count, sum, product);
}

template <bool Shared, bool Signed, class S, class Surrogate>
void family_backward(const Args& a) {
  const Grid g(a);
  const NormTables tables(a, g);
  Sums sums(g);
  NeuronSums learned(g);
  in_parallel(g.units, a.threads, [&](int64_t index) {
    const Args own = a;  // as in `family_forward`
    const Family<Shared, Signed> neuron(own, own.detach_reset != 0);
    const Tensors<S> tensors(own, g);
    const Surrogate surrogate(own);
    const Unit unit = unit_at(g, index);
    float* memory = scratch(a.timesteps * (neuron.membranes + 1) * kTile);
    NeuronSums::Lanes lanes;
    sums.gather(index, [&](double* sum, double* product) {
      each_tile(g, unit, [&](int64_t at, int64_t c, int count) {
        const TileNorm norm(tables, unit, c);
        if (count == kTile)
          family_backward_tile<true>(own, tensors, neuron, surrogate, norm, memory, g.step, at, count, sum + c, product + c,
                                     &lanes);
        else
          family_backward_tile<false>(own, tensors, neuron, surrogate, norm, memory, g.step, at, count, sum + c, product + c,
                                      &lanes);
      });
    });
    learned.store(index, lanes);
  });
  write_sums(a, sums);
  if (a.learned) learned.write(a);
}

template <class S>
void family_forward_any(const Args& a) {
  if (a.shared_membrane)
    a.signed_levels ? family_forward<true, true, S>(a) : family_forward<true, false, S>(a);
  else
    a.signed_levels ? family_forward<false, true, S>(a) : family_forward<false, false, S>(a);
}

template <class S, class Surrogate>
void family_backward_of(const Args& a) {
  if (a.shared_membrane)
    a.signed_levels ? family_backward<true, true, S, Surrogate>(a) : family_backward<true, false, S, Surrogate>(a);
  else
    a.signed_levels ? family_backward<false, true, S, Surrogate>(a) : family_backward<false, false, S, Surrogate>(a);
}

template <class S>
void family_backward_any(const Args& a) {
  a.surrogate == kRect ? family_backward_of<S, Rect>(a) : family_backward_of<S, AnySurrogate>(a);
}

}  // namespace
}  // namespace MULTIFIRE_ISA
}  // namespace multifire
