#include "launches.h"

#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using namespace efreg::cuda;

  m.attr("NARROW") = py::make_tuple(kNarrowFilters, kNarrowLanes);
  m.attr("WIDE") = py::make_tuple(1, kWideLanes);
  m.attr("FLAT") = py::make_tuple(kThreads, 1);

  m.def("measure", &measure, release());
  m.def("charge", &charge, release());
  m.def("pull", &pull, release());
  m.def("shrink", &shrink, release());
}
