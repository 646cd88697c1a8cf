// The operations on CPU tensors. The definition of each is in efreg/reference.py.

#include "../force.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace efreg {
namespace {

// Elements of a task: below it a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// Weights measured before they are pulled: together with what a thread streams they stay in its caches.
constexpr int64_t kBatchBytes = 1 << 20;

// Partial sums of a filter, one a lane; a block's lanes are added to the filter's before rounding grows.
constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 64 * kLanes;

template <typename scalar_t>
using acc_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

at::ScalarType acc_of_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// The filters of one tensor and, in a pull, of its gradient: `size` numbers each, one filter behind the
// other.
struct Row {
  at::Tensor target, weight;
  int64_t filters, size, offset;
  double scale;

  int64_t elements() const { return filters * size; }
};

bool filters_are_dense(const at::Tensor& tensor, int64_t dim) {
  if (dim != 0 || !tensor.is_non_overlapping_and_dense()) return false;
  return tensor.size(0) < 2 || tensor.stride(0) * tensor.size(0) == tensor.numel();
}

// `tensor` with its filters along dim 0 and dense in memory: itself, or a copy.
at::Tensor dense(const at::Tensor& tensor, int64_t dim) {
  return filters_are_dense(tensor, dim) ? tensor : tensor.movedim(dim, 0).contiguous();
}

bool same_order(const at::Tensor& a, const at::Tensor& b) {
  constexpr auto last = at::MemoryFormat::ChannelsLast;
  return (a.is_contiguous() && b.is_contiguous()) || (a.is_contiguous(last) && b.is_contiguous(last)) ||
      a.strides().equals(b.strides());
}

// The weight's filters in the memory order of `target`.
at::Tensor ordered_like(const at::Tensor& target, const at::Tensor& weight, int64_t dim) {
  if (filters_are_dense(weight, dim) && same_order(target, weight)) return weight;
  return at::empty_like(target).copy_(weight.movedim(dim, 0));
}

Row make_row(const at::Tensor& target, const at::Tensor& weight, int64_t dim, int64_t offset, double scale) {
  TORCH_CHECK(weight.device().is_cpu() && target.device().is_cpu(), "efreg: expected CPU tensors");
  TORCH_CHECK(
      target.scalar_type() == weight.scalar_type(), "efreg: gradient is ", target.scalar_type(),
      ", weight is ", weight.scalar_type(), "; they must agree, or backend='reference' serves them");
  TORCH_CHECK(
      target.sizes() == weight.sizes(), "efreg: gradient ", target.sizes(), " and weight ", weight.sizes(),
      " differ in shape");
  const auto filters = weight.size(dim);
  const auto size = filters ? weight.numel() / filters : 0;
  auto rows = dense(target, dim);
  auto weights = target.is_same(weight) ? rows : ordered_like(rows, weight, dim);
  return {std::move(rows), std::move(weights), filters, size, offset, scale};
}

std::vector<Row> make_rows(
    const Tensors& targets, const Tensors& weights, const Integers& offsets, const Integers& dims,
    double scale) {
  TORCH_CHECK(
      targets.size() == weights.size() && offsets.size() == weights.size() && dims.size() == weights.size(),
      "efreg: ", targets.size(), " targets, ", weights.size(), " weights, ", offsets.size(), " offsets and ",
      dims.size(), " dims; they must be as many");
  std::vector<Row> rows;
  rows.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK(
        weights[i].scalar_type() == weights[0].scalar_type(),
        "efreg: weights of one call must share a dtype");
    rows.push_back(make_row(targets[i], weights[i], dims[i], offsets[i], scale));
  }
  return rows;
}

void check_coefficients(const std::vector<Row>& rows, const at::Tensor& coefficients) {
  if (rows.empty()) return;
  TORCH_CHECK(
      coefficients.is_contiguous() && coefficients.device().is_cpu() &&
          coefficients.scalar_type() == acc_of_type(rows[0].weight.scalar_type()),
      "efreg: coefficients must be contiguous, on the CPU, and ", acc_of_type(rows[0].weight.scalar_type()));
  for (const auto& row : rows)
    TORCH_CHECK(
        row.offset >= 0 && row.offset + row.filters <= coefficients.numel(), "efreg: filters up to ",
        row.offset + row.filters, " need as many coefficients, not ", coefficients.numel());
}

// Hands changed copies back to the tensors they were made of, and tells autograd of the change.
void write_back(const std::vector<Row>& rows, const Tensors& targets, const Integers& dims) {
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].target.is_same(targets[i]))
      targets[i].unsafeGetTensorImpl()->bump_version();
    else
      targets[i].movedim(dims[i], 0).copy_(rows[i].target);
  }
}

// Calls f(row, n) for every filter of rows [first, last), each thread an equal share of the elements.
template <typename F>
void each_filter(const std::vector<Row>& rows, size_t first, size_t last, const F& f) {
  std::vector<int64_t> starts{0};
  for (size_t i = first; i < last; ++i) starts.push_back(starts.back() + rows[i].elements());
  at::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; begin = starts[++i]) {
      const auto& row = rows[first + i];
      // A filter belongs to the share that holds its first element.
      const auto ceil_div = [&](int64_t x) { return (x + row.size - 1) / row.size; };
      const auto stop = row.elements() ? std::min(row.filters, ceil_div(end - starts[i])) : 0;
      for (auto n = row.elements() ? ceil_div(begin - starts[i]) : 0; n < stop; ++n) f(row, n);
    }
  });
}

// The sum of the lanes, halves added onto each other.
template <typename acc_t>
acc_t fold(acc_t* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <typename scalar_t>
scalar_t* filter(const at::Tensor& rows, int64_t n, int64_t size) {
  return static_cast<scalar_t*>(rows.data_ptr()) + n * size;
}

template <typename T>
T sgn(T x) {
  return static_cast<T>(x > 0) - static_cast<T>(x < 0);
}

// Σ_i term(x_i) for each of the terms, added in an order that depends on `size` alone.
template <typename scalar_t, typename... Terms>
std::array<acc_of<scalar_t>, sizeof...(Terms)> sums(const scalar_t* x, int64_t size, const Terms&... terms) {
  using acc_t = acc_of<scalar_t>;
  acc_t total[sizeof...(Terms)][kLanes] = {};
  for (int64_t start = 0; start < size; start += kBlock) {
    acc_t lanes[sizeof...(Terms)][kLanes] = {};
    const auto add = [&](int64_t i, int64_t l) {
      size_t k = 0;
      ((lanes[k++][l] += terms(static_cast<acc_t>(x[i + l]))), ...);
    };
    const auto stop = std::min(start + kBlock, size);
    auto i = start;
    for (; i + kLanes <= stop; i += kLanes)
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) add(i, l);
    for (int64_t l = 0; i + l < stop; ++l) add(i, l);
    for (size_t k = 0; k < sizeof...(Terms); ++k)
      for (int64_t l = 0; l < kLanes; ++l) total[k][l] += lanes[k][l];
  }
  std::array<acc_t, sizeof...(Terms)> result;
  for (size_t k = 0; k < sizeof...(Terms); ++k) result[k] = fold(total[k]);
  return result;
}

constexpr auto absolute = [](auto x) { return std::abs(x); };
constexpr auto sign = [](auto x) { return sgn(x); };
constexpr auto square = [](auto x) { return x * x; };
constexpr auto itself = [](auto x) { return x; };

template <typename scalar_t>
acc_of<scalar_t> norm_of(const scalar_t* w, int64_t size) {
  return std::sqrt(sums(w, size, square)[0]);
}

template <typename scalar_t>
void measure_filter(const Row& row, int64_t n, bool count, acc_of<scalar_t>* magnitude, acc_of<scalar_t>* s) {
  const auto* w = filter<scalar_t>(row.weight, n, row.size);
  const auto [m, balance] = count ? sums(w, row.size, absolute, sign) : sums(w, row.size, absolute, itself);
  *magnitude = m;
  *s = std::isfinite(m) ? sgn(balance) : 0;
}

// target_i ← update(target_i, w_i) over filter n.
template <typename scalar_t, typename F>
void update_filter(const Row& row, int64_t n, const F& update) {
  using acc_t = acc_of<scalar_t>;
  auto* __restrict__ target = filter<scalar_t>(row.target, n, row.size);
  const auto* w = filter<scalar_t>(row.weight, n, row.size);
  for (int64_t i = 0; i < row.size; ++i)
    target[i] = static_cast<scalar_t>(update(static_cast<acc_t>(target[i]), static_cast<acc_t>(w[i])));
}

template <typename scalar_t>
void pull_filter(const Row& row, int64_t n, acc_of<scalar_t> c, bool radial) {
  using acc_t = acc_of<scalar_t>;
  if (c == 0) return;
  if (!radial) return update_filter<scalar_t>(row, n, [c](acc_t g, acc_t w) { return g + c * sgn(w); });
  const auto norm = norm_of(filter<scalar_t>(row.weight, n, row.size), row.size);
  if (norm > 0 && std::isfinite(norm))
    update_filter<scalar_t>(row, n, [f = c / norm](acc_t g, acc_t w) { return g + f * w; });
}

// The share of a filter that the radial shrink leaves: max(1 − c/‖w_n‖₂, 0), all of one that is not finite.
template <typename acc_t>
acc_t kept_of(acc_t norm, acc_t c) {
  if (norm <= c) return 0;
  return norm > 0 && std::isfinite(norm) ? 1 - c / norm : acc_t(1);
}

template <typename scalar_t>
void shrink_filter(const Row& row, int64_t n, acc_of<scalar_t> c, bool radial) {
  using acc_t = acc_of<scalar_t>;
  auto* w = filter<scalar_t>(row.target, n, row.size);
  if (c == 0) return;
  const auto kept = radial ? kept_of(norm_of(w, row.size), c) : acc_t(0);
  for (int64_t i = 0; i < row.size; ++i) {
    const auto x = static_cast<acc_t>(w[i]);
    w[i] = static_cast<scalar_t>(radial ? x * kept : sgn(x) * std::max(std::abs(x) - c, acc_t(0)));
  }
}

// efreg/laws.py: Electrostatic.coefficients
template <typename acc_t>
void electrostatic(const acc_t* m, const acc_t* s, acc_t* c, int64_t filters, const Law& law) {
  int64_t source = -1;
  for (int64_t n = 0; n < filters; ++n)
    if (std::isfinite(m[n]) && (source < 0 || m[n] > m[source])) source = n;
  if (source < 0) return static_cast<void>(std::fill_n(c, filters, acc_t(0)));
  const auto softening = static_cast<acc_t>(law.shape) * m[source];
  for (int64_t n = 0; n < filters; ++n) {
    const auto r = std::hypot(s[source] * m[source] - s[n] * m[n], softening);
    const auto coefficient = (static_cast<acc_t>(law.strength) / r) * (m[source] / r);
    const bool acts = n != source && s[n] != 0 && s[source] != 0 && std::isfinite(coefficient);
    c[n] = acts ? coefficient : 0;
  }
}

// efreg/laws.py: Ladder.coefficients
template <typename acc_t>
void ladder(const acc_t* m, acc_t* c, int64_t filters, const Law& law) {
  Integers order(filters);
  std::iota(order.begin(), order.end(), 0);
  const auto finite = [m](int64_t n) { return std::isfinite(m[n]); };
  const auto end = std::stable_partition(order.begin(), order.end(), finite);
  std::stable_sort(order.begin(), end, [m](int64_t a, int64_t b) { return m[a] > m[b]; });
  std::fill_n(c, filters, acc_t(0));
  const auto last = end - order.begin() - 1;
  for (int64_t rank = 0; last > 0 && rank <= last; ++rank) {
    const auto height = std::pow(static_cast<double>(rank) / static_cast<double>(last), law.shape);
    c[order[rank]] = static_cast<acc_t>(law.strength * height);
  }
}

template <typename acc_t>
void l1(const acc_t* m, acc_t* c, int64_t filters, const Law& law) {
  for (int64_t n = 0; n < filters; ++n) c[n] = std::isfinite(m[n]) ? static_cast<acc_t>(law.strength) : 0;
}

template <typename acc_t>
void coefficients_of(const acc_t* m, const acc_t* s, acc_t* c, int64_t filters, const Law& law) {
  switch (law.kind) {
    case Law::kElectrostatic:
      return electrostatic(m, s, c, filters, law);
    case Law::kLadder:
      return ladder(m, c, filters, law);
    case Law::kL1:
      return l1(m, c, filters, law);
  }
}

// The end of the batch that begins at row `first`, of rows up to `end`.
size_t batch_end(const std::vector<Row>& rows, size_t first, size_t end) {
  int64_t bytes = 0;
  auto last = first;
  do {
    bytes += rows[last].elements() * rows[last].weight.element_size();
    ++last;
  } while (last < end && bytes < kBatchBytes);
  return last;
}

// Measures the rows of a batch and applies the law to each.
template <typename scalar_t>
void charge_batch(
    const std::vector<Row>& rows, size_t first, size_t last, acc_of<scalar_t>* c, acc_of<scalar_t>* m,
    acc_of<scalar_t>* s, const Law& law) {
  each_filter(rows, first, last, [&](const Row& row, int64_t n) {
    measure_filter<scalar_t>(row, n, law.count, m + row.offset + n, s + row.offset + n);
  });
  for (auto i = first; i < last; ++i) {
    const auto offset = rows[i].offset;
    coefficients_of(m + offset, s + offset, c + offset, rows[i].filters, law);
  }
}

template <typename scalar_t>
void pull_batch(
    const std::vector<Row>& rows, size_t first, size_t last, const acc_of<scalar_t>* c, bool radial) {
  each_filter(rows, first, last, [&](const Row& row, int64_t n) {
    pull_filter<scalar_t>(row, n, static_cast<acc_of<scalar_t>>(row.scale) * c[row.offset + n], radial);
  });
}

}  // namespace

#define DISPATCH(rows, name, ...)                                                                     \
  AT_DISPATCH_FLOATING_TYPES_AND2(                                                                    \
      at::kHalf, at::kBFloat16, rows.empty() ? at::kFloat : rows[0].weight.scalar_type(), name, [&] { \
        using acc_t = acc_of<scalar_t>;                                                               \
        __VA_ARGS__                                                                                   \
      })

std::tuple<at::Tensor, at::Tensor, at::Tensor> measure(
    const Tensors& weights, const Integers& dims, bool count, bool norm) {
  Integers offsets;
  int64_t filters = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    offsets.push_back(filters);
    filters += weights[i].size(dims[i]);
  }
  const auto rows = make_rows(weights, weights, offsets, dims, 1.0);
  const auto type = acc_of_type(rows.empty() ? at::kFloat : rows[0].weight.scalar_type());
  auto magnitude = at::zeros({filters}, type), sign = at::zeros({filters}, type);
  auto norms = at::zeros({norm ? filters : 0}, type);
  DISPATCH(rows, "efreg::measure", {
    auto* m = magnitude.data_ptr<acc_t>();
    auto* s = sign.data_ptr<acc_t>();
    auto* l2 = norms.data_ptr<acc_t>();
    each_filter(rows, 0, rows.size(), [&](const Row& row, int64_t n) {
      measure_filter<scalar_t>(row, n, count, m + row.offset + n, s + row.offset + n);
      if (norm) l2[row.offset + n] = norm_of(filter<scalar_t>(row.weight, n, row.size), row.size);
    });
  });
  return {magnitude, sign, norms};
}

void pull(
    const Tensors& grads, const Tensors& weights, const at::Tensor& coefficients, const Integers& offsets,
    const Integers& dims, double scale, bool radial) {
  const auto rows = make_rows(grads, weights, offsets, dims, scale);
  check_coefficients(rows, coefficients);
  DISPATCH(rows, "efreg::pull", {
    pull_batch<scalar_t>(rows, 0, rows.size(), coefficients.const_data_ptr<acc_t>(), radial);
  });
  write_back(rows, grads, dims);
}

void shrink(
    const Tensors& weights, const at::Tensor& coefficients, const Integers& offsets, const Integers& dims,
    const std::vector<double>& scales, bool radial) {
  auto rows = make_rows(weights, weights, offsets, dims, 1.0);
  check_coefficients(rows, coefficients);
  TORCH_CHECK(scales.size() == rows.size(), "efreg: ", rows.size(), " weights need as many scales");
  for (size_t i = 0; i < rows.size(); ++i) rows[i].scale = scales[i];
  DISPATCH(rows, "efreg::shrink", {
    const auto* c = coefficients.const_data_ptr<acc_t>();
    each_filter(rows, 0, rows.size(), [&](const Row& row, int64_t n) {
      shrink_filter<scalar_t>(row, n, static_cast<acc_t>(row.scale) * c[row.offset + n], radial);
    });
  });
  write_back(rows, weights, dims);
}

at::Tensor charge(
    const Tensors& weights, const at::Tensor& coefficients, const Integers& offsets, const Integers& dims,
    const Law& law) {
  const auto rows = make_rows(weights, weights, offsets, dims, 1.0);
  check_coefficients(rows, coefficients);
  auto magnitude = at::zeros_like(coefficients), sign = at::zeros_like(coefficients);
  DISPATCH(rows, "efreg::charge", {
    charge_batch<scalar_t>(
        rows, 0, rows.size(), coefficients.data_ptr<acc_t>(), magnitude.data_ptr<acc_t>(),
        sign.data_ptr<acc_t>(), law);
  });
  return magnitude;
}

void force(
    const Tensors& grads, const Tensors& weights, const at::Tensor& coefficients, const Integers& offsets,
    const Integers& dims, int64_t charged, const Law& law, double scale) {
  const auto rows = make_rows(grads, weights, offsets, dims, scale);
  check_coefficients(rows, coefficients);
  const auto end = std::min(static_cast<size_t>(charged), rows.size());
  auto magnitude = at::zeros_like(coefficients), sign = at::zeros_like(coefficients);
  DISPATCH(rows, "efreg::force", {
    auto* c = coefficients.data_ptr<acc_t>();
    for (size_t first = 0; first < end;) {
      const auto last = batch_end(rows, first, end);
      charge_batch<scalar_t>(rows, first, last, c, magnitude.data_ptr<acc_t>(), sign.data_ptr<acc_t>(), law);
      pull_batch<scalar_t>(rows, first, last, c, false);
      first = last;
    }
    pull_batch<scalar_t>(rows, end, rows.size(), c, false);
  });
  write_back(rows, grads, dims);
}

}  // namespace efreg
