// The operations on the filters of many tensors at once, the same names for every device.
//
// A row is one tensor whose filters lie along `dims[i]`. `units` says of every filter, row behind row, where
// its coefficient lies, or −1 where it has none; int32. All tensors of a call share one dtype; statistics and
// coefficients are float, or double for double weights. What rows write together is charged together: the
// first rows are those of `groups`, group behind group, laid out with `members` as efreg/backends/rows.py
// says. A row without a gradient is charged and not pulled.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace efreg {

using Tensors = std::vector<at::Tensor>;
using Grads = std::vector<std::optional<at::Tensor>>;
using Integers = std::vector<int64_t>;

// The paper's law (electrostatic.h).
struct Electrostatic {
  double strength;   // α · k_e
  double softening;  // ε
  bool count;        // s_n = sgn(Σ sgn(w)), else sgn(Σ w)
};

// Magnitudes, balances and, where `norm`, L2 norms of all filters, row behind row
// (efreg/backends/reference.py: measure).
std::tuple<at::Tensor, at::Tensor, at::Tensor> measure(
    const Tensors& weights, const Integers& dims, bool count, bool norm);

// Along what a number is pulled, in the order of DIRECTIONS (efreg/force/laws.py).
enum Direction : int64_t { kSign, kRadial, kShare };

// grads += scale · c_n · sgn(weights), or its twins (reference.py: pull).
void pull(
    const Grads& grads, const Tensors& weights, const at::Tensor& coefficients, const at::Tensor& units,
    const Integers& dims, double scale, int64_t along);

// weights ← sgn(w) · max(|w| − scales[i] · c_n, 0), or its twins (reference.py: shrink).
void shrink(
    const Tensors& weights, const at::Tensor& coefficients, const at::Tensor& units, const Integers& dims,
    const std::vector<double>& scales, int64_t along);

// measure and law: writes the coefficients that the groups have now.
void charge(
    const Tensors& weights, const at::Tensor& coefficients, const at::Tensor& groups,
    const at::Tensor& members, const Integers& dims, const Electrostatic& law);

// charge and pull, a few groups at a time, so that the weights are still in cache when they are read again.
void force(
    const Grads& grads, const Tensors& weights, const at::Tensor& coefficients, const at::Tensor& groups,
    const at::Tensor& members, const at::Tensor& units, const Integers& dims, const Electrostatic& law,
    double scale);

}  // namespace efreg
