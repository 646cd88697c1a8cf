// The paper's law, for the CPU and for CUDA (efreg/force/laws.py: Electrostatic.coefficients).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define EFREG_ANYWHERE __host__ __device__
#else
#define EFREG_ANYWHERE
#endif

namespace efreg {

// False for infinities and NaN.
template <typename T>
EFREG_ANYWHERE bool finite(T x) {
  return x - x == 0;
}

// √(a² + b²) of numbers ≥ 0, without overflow on the way.
template <typename T>
EFREG_ANYWHERE T hypotenuse(T a, T b) {
  if (b == 0) return a;
  const T large = a > b ? a : b, ratio = (a > b ? b : a) / large;
  return large * std::sqrt(1 + ratio * ratio);
}

// c_n = strength · m_src / (r² + (softening · m_src)²), r = |q_src − q_n| (Eq. 10); of a unit that is not the
// source. strength is α · k_e.
template <typename T>
EFREG_ANYWHERE T electrostatic(T m, T s, T m_src, T s_src, T strength, T softening) {
  const T distance = s_src * m_src - s * m;
  const T r = hypotenuse(distance < 0 ? -distance : distance, softening * m_src);
  const T c = (strength / r) * (m_src / r);
  return s != 0 && s_src != 0 && finite(m) && finite(c) ? c : T(0);
}

}  // namespace efreg
