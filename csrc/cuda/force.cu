// The operations on CUDA tensors. The definition of each is in efreg/backends/reference.py.

#include "../electrostatic.h"
#include "launches.h"

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <limits>

namespace efreg::cuda {
namespace {

template <typename scalar_t>
using acc_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// What a thread loads and stores at a time.
template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t x[kSize];
};

// The arrays of a table as kernels/force.py lays them out.
struct Table {
  const int* tiles;
  const int64_t* layout;
  const int64_t* weights;
};

// The filters of one block, seen from one of its threads: filter n, of which the thread's numbers are those
// at (v · threads + thread) · kSize + e of each stretch of threads · kEach.
struct Tile {
  int64_t row, weight, target, start;
  int filters, size, turn, n, thread, threads;

  __device__ Tile(const Table& table, int64_t t) {
    row = table.tiles[2 * t];
    const auto* fields = table.layout + 3 * row;
    filters = fields[0], size = fields[1], start = fields[2];
    weight = target = table.weights[row], turn = 1;
    threads = size == 1 ? 1 : size <= kNarrowLanes ? kWarp : kThreads;
    thread = threadIdx.x % threads;
    n = table.tiles[2 * t + 1] + threadIdx.x / threads;
  }

  __device__ bool has_filter() const { return n < filters; }

  template <typename scalar_t>
  __device__ bool aligned() const {
    return ((weight | target | size * static_cast<int64_t>(sizeof(scalar_t))) & 15) == 0 && turn == 1;
  }

  template <typename scalar_t>
  __device__ scalar_t* filter(int64_t address) const {
    return reinterpret_cast<scalar_t*>(address) + static_cast<int64_t>(n) * size;
  }
};

template <typename T>
__device__ T sgn(T x) {
  return static_cast<T>(x > 0) - static_cast<T>(x < 0);
}

// max(x, 0), and NaN for NaN.
template <typename T>
__device__ T positive_part(T x) {
  return x < 0 ? T(0) : x;
}

// Numbers i to i + kSize of a filter, 0 beyond its end.
template <bool aligned, typename scalar_t>
__device__ Vector<scalar_t> load(const scalar_t* p, int i, int size, int turn = 1) {
  Vector<scalar_t> v{};
  if constexpr (aligned) {
    if (i < size) v = *reinterpret_cast<const Vector<scalar_t>*>(p + i);
  } else {
    for (int e = 0; e < v.kSize; ++e)
      if (i + e < size) v.x[e] = p[turn == 1 ? i + e : (i + e) % turn * (size / turn) + (i + e) / turn];
  }
  return v;
}

template <bool aligned, typename scalar_t>
__device__ void store(scalar_t* p, int i, int size, const Vector<scalar_t>& v) {
  if constexpr (aligned) {
    if (i < size) *reinterpret_cast<Vector<scalar_t>*>(p + i) = v;
  } else {
    for (int e = 0; e < v.kSize; ++e)
      if (i + e < size) p[i + e] = v.x[e];
  }
}

// Calls f(i, k) for each vector of this thread: where it begins, and which of the thread's kEach lanes is
// first.
template <typename scalar_t, typename F>
__device__ void each_vector(const Tile& tile, const F& f) {
  constexpr int kSize = Vector<scalar_t>::kSize;
  for (int start = 0; start < tile.size; start += tile.threads * kEach)
#pragma unroll
    for (int k = 0; k < kEach; k += kSize) f(start + k * tile.threads + tile.thread * kSize, k);
}

// The sum over a filter's threads, neighbour to neighbour; every thread of the filter gets it.
template <typename T>
__device__ T over_threads(T x, int threads) {
  if (threads == 1) return x;
  for (int other = 1; other < kWarp; other *= 2) x += __shfl_xor_sync(0xffffffff, x, other);
  if (threads == kWarp) return x;
  __shared__ T warps[kThreads / kWarp];
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  return (warps[0] + warps[1]) + (warps[2] + warps[3]);
}

// Σ over the lanes of a filter in the order of kernels/force.py: _fold.
template <typename scalar_t>
__device__ acc_of<scalar_t> fold(acc_of<scalar_t> (&lanes)[kEach], int threads) {
  constexpr int kSize = Vector<scalar_t>::kSize;
  for (int step = 1; step < kSize; step *= 2)
    for (int k = 0; k < kEach; k += 2 * step) lanes[k] += lanes[k + step];
  for (int k = 0; k < kEach; k += kSize) lanes[k] = over_threads(lanes[k], threads);
  for (int step = kSize; step < kEach; step *= 2)
    for (int k = 0; k < kEach; k += 2 * step) lanes[k] += lanes[k + step];
  return lanes[0];
}

// ‖w_n‖₂ of the thread's filter.
template <bool aligned, typename scalar_t>
__device__ acc_of<scalar_t> norm_of(const Tile& tile) {
  using acc_t = acc_of<scalar_t>;
  acc_t squares[kEach] = {};
  each_vector<scalar_t>(tile, [&](int i, int k) {
    const auto w = load<aligned>(tile.filter<scalar_t>(tile.weight), i, tile.size);
    for (int e = 0; e < w.kSize; ++e)
      squares[k + e] += static_cast<acc_t>(w.x[e]) * static_cast<acc_t>(w.x[e]);
  });
  return sqrt(fold<scalar_t>(squares, tile.threads));
}

template <bool aligned, typename scalar_t>
__device__ void measure_filter(
    const Tile& tile, bool count, acc_of<scalar_t>* magnitude, acc_of<scalar_t>* balance,
    acc_of<scalar_t>* norm) {
  using acc_t = acc_of<scalar_t>;
  acc_t lengths[kEach] = {}, balances[kEach] = {};
  each_vector<scalar_t>(tile, [&](int i, int k) {
    const auto w = load<aligned>(tile.filter<scalar_t>(tile.weight), i, tile.size);
    for (int e = 0; e < w.kSize; ++e) {
      const auto x = static_cast<acc_t>(w.x[e]);
      lengths[k + e] += abs(x);
      balances[k + e] += count ? sgn(x) : x;
    }
  });
  const auto m = fold<scalar_t>(lengths, tile.threads);
  const auto b = fold<scalar_t>(balances, tile.threads);
  if (norm != nullptr) {
    const auto length = norm_of<aligned, scalar_t>(tile);
    if (tile.thread == 0) norm[tile.start + tile.n] = length;
  }
  if (tile.thread == 0) {
    magnitude[tile.start + tile.n] = m;
    balance[tile.start + tile.n] = b;
  }
}

// w/‖w_n‖₂ needs the factor 1/‖w_n‖₂, and 0 where there is no direction.
template <bool aligned, typename scalar_t>
__device__ acc_of<scalar_t> inverse_norm(const Tile& tile) {
  const auto norm = norm_of<aligned, scalar_t>(tile);
  return norm > 0 && isfinite(norm) ? 1 / norm : acc_of<scalar_t>(0);
}

// What is left of x when it has lost a share of itself: 0 where that is all, whatever x was.
template <typename T>
__device__ T without(T x, T share) {
  return share >= 1 ? T(0) : x * (1 - share);
}

template <bool aligned, typename scalar_t>
__device__ void pull_filter(const Tile& tile, acc_of<scalar_t> c, int64_t along) {
  using acc_t = acc_of<scalar_t>;
  if (along == kRadial) c *= inverse_norm<aligned, scalar_t>(tile);
  auto* target = tile.filter<scalar_t>(tile.target);
  each_vector<scalar_t>(tile, [&](int i, int) {
    const auto w = load<aligned>(tile.filter<scalar_t>(tile.weight), i, tile.size, tile.turn);
    auto g = load<aligned>(target, i, tile.size);
    for (int e = 0; e < w.kSize; ++e) {
      const auto x = static_cast<acc_t>(w.x[e]), old = static_cast<acc_t>(g.x[e]);
      g.x[e] = static_cast<scalar_t>(
          along == kShare ? without(old, c) : old + c * (along == kRadial ? x : sgn(x)));
    }
    store<aligned>(target, i, tile.size, g);
  });
}

// The share of a filter that the radial shrink leaves: max(1 − c/‖w_n‖₂, 0), all of one that is not finite.
template <typename acc_t>
__device__ acc_t kept_of(acc_t norm, acc_t c) {
  if (norm <= c) return 0;
  return norm > 0 && isfinite(norm) ? 1 - c / norm : acc_t(1);
}

template <bool aligned, typename scalar_t>
__device__ void shrink_filter(const Tile& tile, acc_of<scalar_t> c, int64_t along) {
  using acc_t = acc_of<scalar_t>;
  const auto kept = along == kRadial ? kept_of(norm_of<aligned, scalar_t>(tile), c) : acc_t(0);
  auto* weight = tile.filter<scalar_t>(tile.weight);
  each_vector<scalar_t>(tile, [&](int i, int) {
    auto w = load<aligned>(weight, i, tile.size);
    for (int e = 0; e < w.kSize; ++e) {
      const auto x = static_cast<acc_t>(w.x[e]);
      w.x[e] = static_cast<scalar_t>(
          along == kRadial      ? x * kept
              : along == kShare ? without(x, c)
                                : sgn(x) * positive_part(abs(x) - c));
    }
    store<aligned>(weight, i, tile.size, w);
  });
}

// The units of a group, and the statistics of what writes them.
template <typename T>
struct Group {
  int units, depth;
  int64_t begin;
  const int* members;
  const T *magnitudes, *balances;

  // Σ over what writes unit n.
  __device__ T sum(const T* statistic, int n) const {
    T total = 0;
    for (int k = 0; k < depth; ++k)
      if (const int member = members[n * depth + k]; member >= 0) total += __ldcg(statistic + member);
    return total;
  }

  __device__ T magnitude(int n) const { return sum(magnitudes, n); }
  __device__ T sign(int n) const { return finite(magnitude(n)) ? sgn(sum(balances, n)) : T(0); }
};

// The source of a group: the largest finite magnitude, −1 if there is none, and the first unit that has it.
template <typename T>
struct Source {
  T magnitude;
  int n;

  __device__ void consider(const Source& other) {
    if (other.magnitude > magnitude || (other.magnitude == magnitude && other.n < n)) *this = other;
  }
};

// Called by all threads of a block; each gets the answer.
template <typename T>
__device__ Source<T> source_of(const Group<T>& group) {
  Source<T> best{T(-1), 0};
  for (int n = threadIdx.x; n < group.units; n += kThreads)
    if (const T m = group.magnitude(n); finite(m)) best.consider({m, n});
  __shared__ T magnitudes[kThreads];
  __shared__ int indices[kThreads];
  magnitudes[threadIdx.x] = best.magnitude, indices[threadIdx.x] = best.n;
  __syncthreads();
  for (int t = 0; t < kThreads; ++t) best.consider({magnitudes[t], indices[t]});
  return best;
}

template <typename T>
__device__ void charge_group(const Group<T>& group, T* coefficients, const T* law) {
  const auto source = source_of(group);
  const T s_src = group.units ? group.sign(source.n) : T(0);
  for (int n = threadIdx.x; n < group.units; n += kThreads)
    coefficients[group.begin + n] = n == source.n || source.magnitude < 0
        ? T(0)
        : electrostatic(group.magnitude(n), group.sign(n), source.magnitude, s_src, law[0], law[1]);
}

template <typename scalar_t>
__device__ void measure_tile(
    const Tile& tile, bool count, acc_of<scalar_t>* magnitude, acc_of<scalar_t>* balance,
    acc_of<scalar_t>* norm) {
  if (!tile.has_filter()) return;
  if (tile.aligned<scalar_t>())
    measure_filter<true, scalar_t>(tile, count, magnitude, balance, norm);
  else
    measure_filter<false, scalar_t>(tile, count, magnitude, balance, norm);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) measure_kernel(
    Table table, acc_of<scalar_t>* magnitude, acc_of<scalar_t>* balance, acc_of<scalar_t>* norm, bool count) {
  measure_tile<scalar_t>(Tile(table, blockIdx.x), count, magnitude, balance, norm);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) charge_kernel(
    Table table, const int* owners, const int64_t* groups, const int* members, int* done,
    acc_of<scalar_t>* magnitude, acc_of<scalar_t>* balance, acc_of<scalar_t>* coefficients,
    const acc_of<scalar_t>* law, bool count) {
  const Tile tile(table, blockIdx.x);
  measure_tile<scalar_t>(tile, count, magnitude, balance, nullptr);
  // The last block of a group to come here finds all statistics written. It applies the law.
  const auto owner = owners[tile.row];
  const auto* shape = groups + 5 * static_cast<int64_t>(owner);
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done + owner, 1) == shape[2] - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const Group<acc_of<scalar_t>> group{static_cast<int>(shape[0]),
                                      static_cast<int>(shape[3]),
                                      shape[1],
                                      members + shape[4],
                                      magnitude,
                                      balance};
  charge_group(group, coefficients, law);
  if (threadIdx.x == 0) done[owner] = 0;
}

// The coefficient of the tile's filter, 0 where it has none.
template <typename T>
__device__ T coefficient_of(const Tile& tile, const int* units, const T* coefficients) {
  const int unit = units[tile.start + tile.n];
  return unit < 0 ? T(0) : coefficients[unit];
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) pull_kernel(
    Table table, const int* units, const int64_t* targets, const acc_of<scalar_t>* coefficients,
    const acc_of<scalar_t>* scale, int64_t along) {
  Tile tile(table, gridDim.x - 1 - blockIdx.x);  // backwards: what was measured last is still in the cache
  tile.target = targets[2 * tile.row], tile.turn = targets[2 * tile.row + 1];
  if (tile.target == 0 || !tile.has_filter()) return;
  const auto c = coefficient_of(tile, units, coefficients) * *scale;
  if (c == 0) return;
  if (tile.aligned<scalar_t>())
    pull_filter<true, scalar_t>(tile, c, along);
  else
    pull_filter<false, scalar_t>(tile, c, along);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) shrink_kernel(
    Table table, const int* units, const acc_of<scalar_t>* coefficients, const acc_of<scalar_t>* rates,
    const acc_of<scalar_t>* found_inf, int64_t along) {
  const Tile tile(table, gridDim.x - 1 - blockIdx.x);
  if (!tile.has_filter()) return;
  const auto by = *found_inf == 0 ? rates[tile.row] : acc_of<scalar_t>(0);
  const auto c = coefficient_of(tile, units, coefficients) * by;
  if (c == 0) return;
  if (tile.aligned<scalar_t>())
    shrink_filter<true, scalar_t>(tile, c, along);
  else
    shrink_filter<false, scalar_t>(tile, c, along);
}

Table table_of(const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights) {
  for (const auto& array : {tiles, layout, weights})
    TORCH_CHECK(array.is_cuda() && array.is_contiguous(), "efreg: expected the arrays of a table on a GPU");
  return {tiles.const_data_ptr<int>(), layout.const_data_ptr<int64_t>(), weights.const_data_ptr<int64_t>()};
}

}  // namespace

// Runs its last argument with scalar_t and acc_t, and launches `kernel<scalar_t>` for each of the tiles.
#define LAUNCH(tiles, dtype, kernel, ...)                                                     \
  if (const auto blocks = tiles.size(0)) {                                                    \
    const c10::cuda::CUDAGuard guard(tiles.device());                                         \
    const auto stream = c10::cuda::getCurrentCUDAStream();                                    \
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "efreg::" #kernel, [&] { \
      using acc_t = acc_of<scalar_t>;                                                         \
      kernel<scalar_t><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(__VA_ARGS__);  \
      C10_CUDA_KERNEL_LAUNCH_CHECK();                                                         \
    });                                                                                       \
  }

void measure(
    const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights, const at::Tensor& magnitude,
    const at::Tensor& balance, const std::optional<at::Tensor>& norm, bool count, at::ScalarType dtype) {
  const auto table = table_of(tiles, layout, weights);
  LAUNCH(
      tiles, dtype, measure_kernel, table, magnitude.data_ptr<acc_t>(), balance.data_ptr<acc_t>(),
      norm ? norm->data_ptr<acc_t>() : nullptr, count);
}

void charge(
    const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights, const at::Tensor& owners,
    const at::Tensor& groups, const at::Tensor& members, const at::Tensor& done, const at::Tensor& magnitude,
    const at::Tensor& balance, const at::Tensor& coefficients, const at::Tensor& law, bool count,
    at::ScalarType dtype) {
  const auto table = table_of(tiles, layout, weights);
  LAUNCH(
      tiles, dtype, charge_kernel, table, owners.const_data_ptr<int>(), groups.const_data_ptr<int64_t>(),
      members.const_data_ptr<int>(), done.data_ptr<int>(), magnitude.data_ptr<acc_t>(),
      balance.data_ptr<acc_t>(), coefficients.data_ptr<acc_t>(), law.const_data_ptr<acc_t>(), count);
}

void pull(
    const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights, const at::Tensor& units,
    const at::Tensor& targets, const at::Tensor& coefficients, const at::Tensor& scale, int64_t along,
    at::ScalarType dtype) {
  const auto table = table_of(tiles, layout, weights);
  LAUNCH(
      tiles, dtype, pull_kernel, table, units.const_data_ptr<int>(), targets.const_data_ptr<int64_t>(),
      coefficients.const_data_ptr<acc_t>(), scale.const_data_ptr<acc_t>(), along);
}

void shrink(
    const at::Tensor& tiles, const at::Tensor& layout, const at::Tensor& weights, const at::Tensor& units,
    const at::Tensor& coefficients, const at::Tensor& rates, const at::Tensor& found_inf, int64_t along,
    at::ScalarType dtype) {
  const auto table = table_of(tiles, layout, weights);
  LAUNCH(
      tiles, dtype, shrink_kernel, table, units.const_data_ptr<int>(), coefficients.const_data_ptr<acc_t>(),
      rates.const_data_ptr<acc_t>(), found_inf.const_data_ptr<acc_t>(), along);
}

}  // namespace efreg::cuda
