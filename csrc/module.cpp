#include "operations.h"

#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using efreg::Electrostatic;

  py::class_<Electrostatic>(m, "Electrostatic")
      .def(py::init<double, double, bool>(), py::arg("strength"), py::arg("softening"), py::arg("count"));

  m.def("measure", &efreg::measure, release());
  m.def("pull", &efreg::pull, release());
  m.def("shrink", &efreg::shrink, release());
  m.def("charge", &efreg::charge, release());
  m.def("force", &efreg::force, release());
}
