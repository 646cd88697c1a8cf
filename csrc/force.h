// The operations on the filters of many tensors at once, the same names for every device.
//
// A row is one tensor whose filters lie along `dims[i]`; filter n of row i uses coefficients[offsets[i] + n].
// All tensors of a call share one dtype; statistics and coefficients are float, or double for double weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace efreg {

using Tensors = std::vector<at::Tensor>;
using Integers = std::vector<int64_t>;

// A law that the kernels know; strength and shape are the law's native numbers (efreg/laws.py):
// c_n = strength · m_src / (r_n² + (shape · m_src)²), strength · (rank_n / (N − 1))^shape, or strength.
struct Law {
  enum Kind { kElectrostatic, kLadder, kL1 };
  Kind kind;
  double strength;
  double shape;
  bool count;  // s_n = sgn(Σ sgn(w)), else sgn(Σ w)
};

// Magnitudes, signs and, where `norm`, L2 norms of all filters, row behind row (efreg/reference.py: measure).
std::tuple<at::Tensor, at::Tensor, at::Tensor> measure(
    const Tensors& weights, const Integers& dims, bool count, bool norm);

// grads += scale · c_n · sgn(weights), or scale · c_n · w/‖w_n‖₂ where `radial` (reference.py: pull).
void pull(
    const Tensors& grads, const Tensors& weights, const at::Tensor& coefficients, const Integers& offsets,
    const Integers& dims, double scale, bool radial);

// weights ← sgn(w) · max(|w| − scales[i] · c_n, 0), or its radial twin (reference.py: shrink).
void shrink(
    const Tensors& weights, const at::Tensor& coefficients, const Integers& offsets, const Integers& dims,
    const std::vector<double>& scales, bool radial);

// measure and law: fills `coefficients` with those of the weights now; returns magnitudes, placed as these.
at::Tensor charge(
    const Tensors& weights, const at::Tensor& coefficients, const Integers& offsets, const Integers& dims,
    const Law& law);

// charge and pull, a few layers at a time, so that the weights are still in cache when they are read again.
// The first `charged` rows have charges; those behind share their coefficients, through the offsets.
void force(
    const Tensors& grads, const Tensors& weights, const at::Tensor& coefficients, const Integers& offsets,
    const Integers& dims, int64_t charged, const Law& law, double scale);

}  // namespace efreg
