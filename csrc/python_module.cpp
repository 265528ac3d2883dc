// What Python calls without torch's dispatcher: how this extension was built (setup.py passes the
// facts as JSON), and the watch over packed weights, whose call costs less than a dispatch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "weight_watch.h"

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Build information and the watch over packed weights; importing it registers the operators' "
      "schemas.";
  m.def(
      "build_info", [] { return LPIPS_FAST_BUILD_INFO; },
      "Facts of the build as a JSON object of strings.");
  pybind11::class_<lpips_fast::WeightWatch>(m, "WeightWatch")
      .def(pybind11::init<std::uintptr_t, int64_t, const std::vector<int64_t>&,
                          const std::vector<int64_t>&>())
      .def_property_readonly("rounds", &lpips_fast::WeightWatch::rounds)
      .def("look", [](lpips_fast::WeightWatch& watch, std::uintptr_t address) {
        return static_cast<int>(watch.look(address));
      });
}
