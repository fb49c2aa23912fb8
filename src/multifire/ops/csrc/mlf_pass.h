// The two passes of the MLF neuron: own membranes, reset to zero, upwards only. family_pass.h has the other members.
#pragma once

#include "neuron.h"
#include "norm.h"

namespace multifire {
namespace MULTIFIRE_ISA {
namespace {

template <int K, bool Full, class S>
inline void forward_tile(const Args& a, const Tensors<S>& s, const Neurons<K>& neurons, const TileNorm& norm, int64_t step,
                         int64_t at, int count) {
  const int levels = neurons.levels();
  Membranes membranes[Neurons<K>::kStored];
  for (int k = 0; k < levels; ++k)
    membranes[k].start(a.state ? load_tile<Full>(a.state + k * step + at, count) : zeros());
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const int64_t here = t * step + at;
    const Tile y = current<Full>(s, norm, t, step, at, count);
    Tile fired;
    for (int i = 0; i < kVecs; ++i) fired.v[i] = splat(static_cast<float>(levels));
    for (int k = 0; k < levels; ++k) {
      for (int i = 0; i < kVecs; ++i) {
        membranes[k].step(i, neurons.decay, y.v[i], neurons.thresholds[k]);
        fired.v[i] = less_one(fired.v[i], membranes[k].silent[i]);
      }
    }
    if (K == 0) fired = y;
    store_sum<Full>(s, fired, here, count);
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

// First backward pass of a tile: recomputes the membranes from x, then runs time backwards.
//     δ_k[t] = c·(1 - s_k[t]) + h_k[t]·(g[t] - c·u_k[t]),   c = decay·δ_k[t+1],   dy[t] = Σ_k δ_k[t]
// (without c·u_k where the reset is detached: Reset is false). Learn: `learned` adds up -∂L/∂θ_k = Σ h_k·(g - c·u_k) and
// ∂L/∂decay = Σ δ_k[t+1]·u_k[t]·(1 - s_k[t]).
template <int K, bool Full, bool Reset, bool Learn, class S, class Surrogate>
inline void backward_tile(const Args& a, const Tensors<S>& s, const Neurons<K>& neurons, const Surrogate& surrogate,
                          const TileNorm& norm, float* memory, int64_t step, int64_t at, int count, double* sum,
                          double* product, NeuronSums::Lanes* learned) {
  const int levels = neurons.levels();
  const int64_t slot = (levels + 1) * kTile;  // x - μ, then u_k, of one time step
  Membranes membranes[Neurons<K>::kStored];
  for (int k = 0; k < levels; ++k)
    membranes[k].start(a.state ? load_tile<Full>(a.state + k * step + at, count) : zeros());
  for (int64_t t = 0; t < a.timesteps; ++t) {
    const Tile y = current<Full>(s, norm, t, step, at, count, memory + t * slot);
    for (int k = 0; k < levels; ++k) {
      for (int i = 0; i < kVecs; ++i) {
        membranes[k].step(i, neurons.decay, y.v[i], neurons.thresholds[k]);
        store(memory + t * slot + (k + 1) * kTile + i * kLanes, membranes[k].u[i]);
      }
    }
  }

  Tile delta[Neurons<K>::kStored];  // ∂L/∂carry; with Learn δ_k, which is to be multiplied by the decay
  for (int k = 0; k < levels; ++k)
    delta[k] = a.grad_state_out ? load_tile<Full>(a.grad_state_out + k * step + at, count) : zeros();
  DySums sums;
  Vec of_thresholds[Neurons<K>::kStored], of_decay = splat(0);
  for (int k = 0; k < levels; ++k) of_thresholds[k] = splat(0);
  for (int64_t t = a.timesteps - 1; t >= 0; --t) {
    const int64_t here = t * step + at;
    const bool last = t == a.timesteps - 1;
    const float leak = last ? 1 : neurons.decay;
    const Tile grad = load_tile<Full>(s.grad + here, count);
    Tile dy = grad;
    for (int k = 0; k < levels; ++k) {
      for (int i = 0; i < kVecs; ++i) {
        const Vec u = load(memory + t * slot + (k + 1) * kTile + i * kLanes), v = u - neurons.thresholds[k];
        const Vec carried = Learn ? leak * delta[k].v[i] : delta[k].v[i], kept = v > 0 ? splat(0) : carried;
        const Vec pull = Reset ? fused(-u, carried, grad.v[i]) : grad.v[i];
        Vec d;
        if (Learn) {
          const Vec pulled = surrogate(v, pull, splat(0));
          of_thresholds[k] += pulled;
          of_decay = v > 0 ? of_decay : fused(delta[k].v[i], u, of_decay);
          delta[k].v[i] = d = kept + pulled;
        } else {
          d = surrogate(v, pull, kept);
          delta[k].v[i] = neurons.decay * d;
        }
        dy.v[i] = k == 0 ? d : dy.v[i] + d;
      }
    }
    if (Learn && last) of_decay = splat(0);  // what came from grad_state_out is no δ
    sums.add(dy, memory + t * slot);
    store_dy<Full>(a, s, norm, dy, here, count);
  }
  if (Learn) {
    for (int k = 0; k < levels; ++k) {
      const Tile initial = a.state ? load_tile<Full>(a.state + k * step + at, count) : zeros();
      for (int i = 0; i < kVecs; ++i) {
        of_decay = fused(delta[k].v[i], initial.v[i], of_decay);
        delta[k].v[i] = neurons.decay * delta[k].v[i];
      }
      learned->add(k, -of_thresholds[k]);
    }
    learned->add(kMaxLevels, of_decay);
  }
  if (a.grad_state)
    for (int k = 0; k < levels; ++k) store_tile<Full>(a.grad_state + k * step + at, delta[k], count);
  sums.finish<Full>(a, s, norm, at, count, sum, product);
}

template <int K, class S, class Surrogate, bool Reset, bool Learn>
void backward_pass(const Args& a) {
  const Grid g(a);
  const NormTables tables(a, g);
  Sums sums(g);
  NeuronSums learned(g);
  in_parallel(g.units, a.threads, [&](int64_t index) {
    const Args own = a;  // as in `forward`
    const Neurons<K> neurons(own);
    const Tensors<S> tensors(own, g);
    const Surrogate surrogate(own);
    const Unit unit = unit_at(g, index);
    float* memory = scratch(a.timesteps * (a.levels + 1) * kTile);
    NeuronSums::Lanes lanes;
    sums.gather(index, [&](double* sum, double* product) {
      each_tile(g, unit, [&](int64_t at, int64_t c, int count) {
        const TileNorm norm(tables, unit, c);
        if (count == kTile)
          backward_tile<K, true, Reset, Learn>(own, tensors, neurons, surrogate, norm, memory, g.step, at, count, sum + c,
                                               product + c, &lanes);
        else
          backward_tile<K, false, Reset, Learn>(own, tensors, neurons, surrogate, norm, memory, g.step, at, count, sum + c,
                                                product + c, &lanes);
      });
    });
    if (Learn) learned.store(index, lanes);
  });
  write_sums(a, sums);
  if (Learn) learned.write(a);
}

}  // namespace
}  // namespace MULTIFIRE_ISA
}  // namespace multifire
