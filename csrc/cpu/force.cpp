// The operations on CPU tensors. The definition of each is in efreg/backends/reference.py.

#include "../electrostatic.h"
#include "../operations.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

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

// The filters of one tensor and, where it is to change, of its gradient or itself: `size` numbers each, one
// filter behind the other. The statistics of the first lie at `start`.
struct Row {
  at::Tensor target, weight;
  int64_t filters, size, start;
  double scale;
  void* targets = target.defined() ? target.mutable_data_ptr() : nullptr;
  const void* weights = weight.const_data_ptr();

  int64_t elements() const { return filters * size; }

  template <typename scalar_t>
  scalar_t* target_of(int64_t n) const {
    return static_cast<scalar_t*>(targets) + n * size;
  }

  template <typename scalar_t>
  const scalar_t* weight_of(int64_t n) const {
    return static_cast<const scalar_t*>(weights) + n * size;
  }
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

Row make_row(
    const std::optional<at::Tensor>& target, const at::Tensor& weight, int64_t dim, int64_t start,
    double scale) {
  TORCH_CHECK(
      weight.device().is_cpu() && (!target || target->device().is_cpu()), "efreg: expected CPU tensors");
  const auto filters = weight.size(dim);
  const auto size = filters ? weight.numel() / filters : 0;
  if (!target) return {{}, dense(weight, dim), filters, size, start, scale};
  TORCH_CHECK(
      target->scalar_type() == weight.scalar_type(), "efreg: gradient is ", target->scalar_type(),
      ", weight is ", weight.scalar_type(), "; they must agree, or backend='reference' serves them");
  TORCH_CHECK(
      target->sizes() == weight.sizes(), "efreg: gradient ", target->sizes(), " and weight ", weight.sizes(),
      " differ in shape");
  auto rows = dense(*target, dim);
  auto weights = target->is_same(weight) ? rows : ordered_like(rows, weight, dim);
  return {std::move(rows), std::move(weights), filters, size, start, scale};
}

std::vector<Row> make_rows(const Grads& targets, const Tensors& weights, const Integers& dims, double scale) {
  TORCH_CHECK(
      targets.size() == weights.size() && dims.size() == weights.size(), "efreg: ", targets.size(),
      " targets, ", weights.size(), " weights and ", dims.size(), " dims; they must be as many");
  std::vector<Row> rows;
  rows.reserve(weights.size());
  int64_t start = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK(
        weights[i].scalar_type() == weights[0].scalar_type(),
        "efreg: weights of one call must share a dtype");
    rows.push_back(make_row(targets[i], weights[i], dims[i], start, scale));
    start += rows.back().filters;
  }
  return rows;
}

int64_t filters_of(const std::vector<Row>& rows) {
  return rows.empty() ? 0 : rows.back().start + rows.back().filters;
}

void check_coefficients(const std::vector<Row>& rows, const at::Tensor& coefficients) {
  if (rows.empty()) return;
  TORCH_CHECK(
      coefficients.is_contiguous() && coefficients.device().is_cpu() &&
          coefficients.scalar_type() == acc_of_type(rows[0].weight.scalar_type()),
      "efreg: coefficients must be contiguous, on the CPU, and ", acc_of_type(rows[0].weight.scalar_type()));
}

// Where the coefficient of each filter lies, −1 where it has none.
const int32_t* units_of(
    const std::vector<Row>& rows, const at::Tensor& units, const at::Tensor& coefficients) {
  check_coefficients(rows, coefficients);
  TORCH_CHECK(
      units.is_contiguous() && units.scalar_type() == at::kInt && units.numel() == filters_of(rows),
      "efreg: ", filters_of(rows), " filters need a unit each, int32, not ", units.numel());
  const auto* unit = units.const_data_ptr<int32_t>();
  const auto* end = unit + units.numel();
  const auto last = unit == end ? -1 : *std::max_element(unit, end);
  TORCH_CHECK(
      last < coefficients.numel(), "efreg: units up to ", last, " need as many coefficients, not ",
      coefficients.numel());
  return unit;
}

// Groups of units, as efreg/backends/rows.py packs them.
struct Groups {
  const int64_t* shapes;
  const int32_t* members;
  int64_t count;

  int64_t units(int64_t g) const { return shapes[5 * g]; }
  int64_t begin(int64_t g) const { return shapes[5 * g + 1]; }
  int64_t rows(int64_t g) const { return shapes[5 * g + 2]; }
  int64_t depth(int64_t g) const { return shapes[5 * g + 3]; }
  const int32_t* of(int64_t g) const { return members + shapes[5 * g + 4]; }
};

Groups groups_of(const at::Tensor& shapes, const at::Tensor& members, const at::Tensor& coefficients) {
  TORCH_CHECK(
      shapes.is_contiguous() && shapes.scalar_type() == at::kLong && shapes.size(1) == 5 &&
          members.is_contiguous() && members.scalar_type() == at::kInt,
      "efreg: groups are int64 [G, 5], members int32");
  const Groups groups{shapes.const_data_ptr<int64_t>(), members.const_data_ptr<int32_t>(), shapes.size(0)};
  for (int64_t g = 0; g < groups.count; ++g)
    TORCH_CHECK(
        groups.begin(g) + groups.units(g) <= coefficients.numel(), "efreg: units up to ",
        groups.begin(g) + groups.units(g), " need as many coefficients, not ", coefficients.numel());
  return groups;
}

// Hands changed copies back to the tensors they were made of, and tells autograd of the change.
void write_back(const std::vector<Row>& rows, const Grads& targets, const Integers& dims) {
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!targets[i]) continue;
    if (rows[i].target.is_same(*targets[i]))
      targets[i]->unsafeGetTensorImpl()->bump_version();
    else
      targets[i]->movedim(dims[i], 0).copy_(rows[i].target);
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
void measure_filter(
    const Row& row, int64_t n, bool count, acc_of<scalar_t>* magnitude, acc_of<scalar_t>* balance) {
  const auto* w = row.weight_of<scalar_t>(n);
  const auto [m, b] = count ? sums(w, row.size, absolute, sign) : sums(w, row.size, absolute, itself);
  magnitude[row.start + n] = m;
  balance[row.start + n] = b;
}

// target_i ← update(target_i, w_i) over filter n.
template <typename scalar_t, typename F>
void update_filter(const Row& row, int64_t n, const F& update) {
  using acc_t = acc_of<scalar_t>;
  auto* __restrict__ target = row.target_of<scalar_t>(n);
  const auto* w = row.weight_of<scalar_t>(n);
  for (int64_t i = 0; i < row.size; ++i)
    target[i] = static_cast<scalar_t>(update(static_cast<acc_t>(target[i]), static_cast<acc_t>(w[i])));
}

// What is left of x when it has lost a share of itself: 0 where that is all, whatever x was.
template <typename acc_t>
acc_t without(acc_t x, acc_t share) {
  return share >= 1 ? acc_t(0) : x * (1 - share);
}

template <typename scalar_t>
void pull_filter(const Row& row, int64_t n, acc_of<scalar_t> c, int64_t along) {
  using acc_t = acc_of<scalar_t>;
  if (c == 0) return;
  if (along == kSign)
    return update_filter<scalar_t>(row, n, [c](acc_t g, acc_t w) { return g + c * sgn(w); });
  if (along == kShare) return update_filter<scalar_t>(row, n, [c](acc_t g, acc_t) { return without(g, c); });
  const auto norm = norm_of(row.weight_of<scalar_t>(n), row.size);
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
void shrink_filter(const Row& row, int64_t n, acc_of<scalar_t> c, int64_t along) {
  using acc_t = acc_of<scalar_t>;
  auto* w = row.target_of<scalar_t>(n);
  if (c == 0) return;
  const auto each = [&](const auto& shrunk) {
    for (int64_t i = 0; i < row.size; ++i) w[i] = static_cast<scalar_t>(shrunk(static_cast<acc_t>(w[i])));
  };
  if (along == kShare) return each([c](acc_t x) { return without(x, c); });
  if (along == kSign) return each([c](acc_t x) { return sgn(x) * std::max(std::abs(x) - c, acc_t(0)); });
  each([kept = kept_of(norm_of(w, row.size), c)](acc_t x) { return x * kept; });
}

// A statistic of each unit of a group: the sum over what writes it, in `sums`, or where one row writes them
// all, in order, the statistics of this row themselves.
template <typename acc_t>
const acc_t* of_units(const Groups& groups, int64_t g, const acc_t* of_filters, std::vector<acc_t>& sums) {
  const auto units = groups.units(g), depth = groups.depth(g);
  const auto* members = groups.of(g);
  int64_t in_a_row = 0;
  while (depth == 1 && in_a_row < units && members[in_a_row] == members[0] + in_a_row) ++in_a_row;
  if (in_a_row == units && units > 0 && members[0] >= 0) return of_filters + members[0];
  sums.assign(units, 0);
  for (int64_t n = 0; n < units; ++n)
    for (int64_t k = 0; k < depth; ++k)
      if (const auto member = members[n * depth + k]; member >= 0) sums[n] += of_filters[member];
  return sums.data();
}

// Eq. 10 for a group whose filters have been measured.
template <typename acc_t>
void charge_group(
    const Groups& groups, int64_t g, const acc_t* magnitude, const acc_t* balance, acc_t* coefficients,
    const Electrostatic& law) {
  std::vector<acc_t> magnitudes, balances;
  const auto* m = of_units(groups, g, magnitude, magnitudes);
  const auto* b = of_units(groups, g, balance, balances);
  const auto units = groups.units(g);
  auto* c = coefficients + groups.begin(g);
  int64_t source = -1;
  for (int64_t n = 0; n < units; ++n)
    if (finite(m[n]) && (source < 0 || m[n] > m[source])) source = n;
  if (source < 0) return static_cast<void>(std::fill_n(c, units, acc_t(0)));
  const auto strength = static_cast<acc_t>(law.strength), softening = static_cast<acc_t>(law.softening);
  for (int64_t n = 0; n < units; ++n)
    c[n] = electrostatic(m[n], sgn(b[n]), m[source], sgn(b[source]), strength, softening);
  c[source] = 0;
}

// A few rows, and the groups that they are.
struct Batch {
  size_t first_row, last_row;
  int64_t first_group, last_group;
};

// The batch behind another, of whole groups.
Batch batch_behind(const std::vector<Row>& rows, const Groups& groups, const Batch& before) {
  Batch batch{before.last_row, before.last_row, before.last_group, before.last_group};
  int64_t bytes = 0;
  do {
    for (const auto end = batch.last_row + groups.rows(batch.last_group); batch.last_row < end;
         ++batch.last_row)
      bytes += rows[batch.last_row].elements() * rows[batch.last_row].weight.element_size();
    ++batch.last_group;
  } while (batch.last_group < groups.count && bytes < kBatchBytes);
  return batch;
}

// Measures the rows of a batch and applies the law to its groups.
template <typename scalar_t>
void charge_batch(
    const std::vector<Row>& rows, const Groups& groups, const Batch& batch, acc_of<scalar_t>* magnitude,
    acc_of<scalar_t>* balance, acc_of<scalar_t>* coefficients, const Electrostatic& law) {
  each_filter(rows, batch.first_row, batch.last_row, [&](const Row& row, int64_t n) {
    measure_filter<scalar_t>(row, n, law.count, magnitude, balance);
  });
  for (auto g = batch.first_group; g < batch.last_group; ++g)
    charge_group(groups, g, magnitude, balance, coefficients, law);
}

template <typename scalar_t>
void pull_rows(
    const std::vector<Row>& rows, size_t first, size_t last, const int32_t* units, const acc_of<scalar_t>* c,
    int64_t along) {
  each_filter(rows, first, last, [&](const Row& row, int64_t n) {
    const auto unit = units[row.start + n];
    if (unit >= 0 && row.targets)
      pull_filter<scalar_t>(row, n, static_cast<acc_of<scalar_t>>(row.scale) * c[unit], along);
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
  const at::NoGradGuard no_grad;
  const auto rows = make_rows(Grads(weights.size()), weights, dims, 1.0);
  const auto filters = filters_of(rows);
  const auto type = acc_of_type(rows.empty() ? at::kFloat : rows[0].weight.scalar_type());
  auto magnitude = at::zeros({filters}, type), balance = at::zeros({filters}, type);
  auto norms = at::zeros({norm ? filters : 0}, type);
  DISPATCH(rows, "efreg::measure", {
    auto* m = magnitude.data_ptr<acc_t>();
    auto* b = balance.data_ptr<acc_t>();
    auto* l2 = norms.data_ptr<acc_t>();
    each_filter(rows, 0, rows.size(), [&](const Row& row, int64_t n) {
      measure_filter<scalar_t>(row, n, count, m, b);
      if (norm) l2[row.start + n] = norm_of(row.weight_of<scalar_t>(n), row.size);
    });
  });
  return {magnitude, balance, norms};
}

void pull(
    const Grads& grads, const Tensors& weights, const at::Tensor& coefficients, const at::Tensor& units,
    const Integers& dims, double scale, int64_t along) {
  const at::NoGradGuard no_grad;
  const auto rows = make_rows(grads, weights, dims, scale);
  const auto* unit = units_of(rows, units, coefficients);
  DISPATCH(rows, "efreg::pull", {
    pull_rows<scalar_t>(rows, 0, rows.size(), unit, coefficients.const_data_ptr<acc_t>(), along);
  });
  write_back(rows, grads, dims);
}

void shrink(
    const Tensors& weights, const at::Tensor& coefficients, const at::Tensor& units, const Integers& dims,
    const std::vector<double>& scales, int64_t along) {
  const at::NoGradGuard no_grad;
  const Grads targets(weights.begin(), weights.end());
  auto rows = make_rows(targets, weights, dims, 1.0);
  const auto* unit = units_of(rows, units, coefficients);
  TORCH_CHECK(scales.size() == rows.size(), "efreg: ", rows.size(), " weights need as many scales");
  for (size_t i = 0; i < rows.size(); ++i) rows[i].scale = scales[i];
  DISPATCH(rows, "efreg::shrink", {
    const auto* c = coefficients.const_data_ptr<acc_t>();
    each_filter(rows, 0, rows.size(), [&](const Row& row, int64_t n) {
      const auto own = unit[row.start + n];
      if (own >= 0) shrink_filter<scalar_t>(row, n, static_cast<acc_t>(row.scale) * c[own], along);
    });
  });
  write_back(rows, targets, dims);
}

void charge(
    const Tensors& weights, const at::Tensor& coefficients, const at::Tensor& groups,
    const at::Tensor& members, const Integers& dims, const Electrostatic& law) {
  const at::NoGradGuard no_grad;
  const auto rows = make_rows(Grads(weights.size()), weights, dims, 1.0);
  check_coefficients(rows, coefficients);
  const auto charged = groups_of(groups, members, coefficients);
  auto magnitude = at::zeros({filters_of(rows)}, coefficients.options()), balance = at::zeros_like(magnitude);
  DISPATCH(rows, "efreg::charge", {
    charge_batch<scalar_t>(
        rows, charged, {0, rows.size(), 0, charged.count}, magnitude.data_ptr<acc_t>(),
        balance.data_ptr<acc_t>(), coefficients.data_ptr<acc_t>(), law);
  });
}

void force(
    const Grads& grads, const Tensors& weights, const at::Tensor& coefficients, const at::Tensor& groups,
    const at::Tensor& members, const at::Tensor& units, const Integers& dims, const Electrostatic& law,
    double scale) {
  const at::NoGradGuard no_grad;
  const auto rows = make_rows(grads, weights, dims, scale);
  const auto* unit = units_of(rows, units, coefficients);
  const auto charged = groups_of(groups, members, coefficients);
  auto magnitude = at::zeros({filters_of(rows)}, coefficients.options()), balance = at::zeros_like(magnitude);
  DISPATCH(rows, "efreg::force", {
    auto* c = coefficients.data_ptr<acc_t>();
    Batch batch{};
    while (batch.last_group < charged.count) {
      batch = batch_behind(rows, charged, batch);
      charge_batch<scalar_t>(
          rows, charged, batch, magnitude.data_ptr<acc_t>(), balance.data_ptr<acc_t>(), c, law);
      pull_rows<scalar_t>(rows, batch.first_row, batch.last_row, unit, c, kSign);
    }
    pull_rows<scalar_t>(rows, batch.last_row, rows.size(), unit, c, kSign);
  });
  write_back(rows, grads, dims);
}

}  // namespace efreg
