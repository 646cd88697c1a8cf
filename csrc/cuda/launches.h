// The operations on the filters of a whole model, one launch each, in CUDA C++: the twin of kernels/force.py,
// which says what the arrays hold. Weights and gradients are behind the addresses in them, of type `dtype`;
// statistics, coefficients, rates, scale and the law's numbers are float, or double for double weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace efreg::cuda {

// A program has kThreads threads, each of which holds kEach numbers at a time: a warp's for a narrow filter,
// the block's for a wide one; a filter of one number has one thread. Equal to NARROW, WIDE and FLAT in
// kernels/launch.py, by which the tiles are cut.
constexpr int kThreads = 128;
constexpr int kEach = 8;
constexpr int kWarp = 32;
constexpr int kNarrowLanes = kWarp * kEach;
constexpr int kWideLanes = kThreads * kEach;
constexpr int kNarrowFilters = kThreads / kWarp;

// Writes the statistics of all filters, row behind row; `norm` where it is given.
void measure(
    const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights, const at::Tensor& magnitude,
    const at::Tensor& balance, const std::optional<at::Tensor>& norm, bool count, at::ScalarType dtype);

// Writes statistics, then each group's coefficients by the paper's law, whose numbers are α · k_e and ε.
// `done` holds zeros, and zeros again afterwards.
void charge(
    const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights, const at::Tensor& owners,
    const at::Tensor& groups, const at::Tensor& members, const at::Tensor& done, const at::Tensor& magnitude,
    const at::Tensor& balance, const at::Tensor& coefficients, const at::Tensor& law, bool count,
    at::ScalarType dtype);

// Along what a number is pulled, in the order of DIRECTIONS (efreg/force/laws.py).
enum Direction : int64_t { kSign, kRadial, kShare };

// gradients += scale · c_n · sgn(w), or its twins (reference.py: pull).
void pull(
    const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights, const at::Tensor& units,
    const at::Tensor& targets, const at::Tensor& coefficients, const at::Tensor& scale, int64_t along,
    at::ScalarType dtype);

// w ← sgn(w) · max(|w| − t, 0) at t = rates[row] · c_n, or its twins; nothing where found_inf ≠ 0.
void shrink(
    const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights, const at::Tensor& units,
    const at::Tensor& coefficients, const at::Tensor& rates, const at::Tensor& found_inf, int64_t along,
    at::ScalarType dtype);

}  // namespace efreg::cuda
