#include "force.h"

#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using efreg::Law;

  py::class_<Law> law(m, "Law");
  py::enum_<Law::Kind>(law, "Kind")
      .value("electrostatic", Law::kElectrostatic)
      .value("ladder", Law::kLadder)
      .value("l1", Law::kL1);
  law.def(
      py::init<Law::Kind, double, double, bool>(), py::arg("kind"), py::arg("strength"), py::arg("shape"),
      py::arg("count"));

  m.def("measure", &efreg::measure, release());
  m.def("pull", &efreg::pull, release());
  m.def("shrink", &efreg::shrink, release());
  m.def("charge", &efreg::charge, release());
  m.def("force", &efreg::force, release());
}
