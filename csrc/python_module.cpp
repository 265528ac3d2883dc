// What Python calls without torch's dispatcher: how this extension was built (setup.py passes the
// facts as JSON), and what is asked at every call: whether modules and packed weights are as they
// were.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "module_check.h"
#include "weight_watch.h"

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Build information, and the checks of modules and packed weights; importing it registers the "
      "operators' schemas.";
  m.def(
      "build_info", [] { return LPIPS_FAST_BUILD_INFO; },
      "Facts of the build as a JSON object of strings.");
  pybind11::class_<lpips_fast::WeightWatch, std::shared_ptr<lpips_fast::WeightWatch>>(m,
                                                                                      "WeightWatch")
      .def(pybind11::init<std::uintptr_t, int64_t, const std::vector<int64_t>&,
                          const std::vector<int64_t>&>())
      .def_property_readonly("rounds", &lpips_fast::WeightWatch::rounds)
      .def("look", [](lpips_fast::WeightWatch& watch, std::uintptr_t address) {
        return static_cast<int>(watch.look(address));
      });
  using lpips_fast::ModuleCheck;
  namespace py = pybind11;
  py::class_<ModuleCheck>(m, "ModuleCheck")
      .def(py::init<py::type, std::vector<py::str>, ModuleCheck::Named, std::vector<py::str>,
                    ModuleCheck::Named, std::vector<py::str>,
                    std::vector<std::pair<py::str, ModuleCheck>>, std::vector<py::type>>())
      .def("matches", [](const ModuleCheck& check, py::handle module, const py::list& found) {
        return check.matches(module.ptr(), found.ptr());
      });
  py::class_<lpips_fast::AttributeCheck>(m, "AttributeCheck")
      .def(py::init<std::vector<std::pair<py::object, py::str>>>())
      .def("unchanged", &lpips_fast::AttributeCheck::unchanged);
  py::class_<lpips_fast::WeightsCheck>(m, "WeightsCheck")
      .def(py::init<const py::list&, std::vector<std::shared_ptr<lpips_fast::WeightWatch>>>())
      .def("unchanged", &lpips_fast::WeightsCheck::unchanged);
  m.def("lie_plainly", &lpips_fast::lie_plainly);
}
