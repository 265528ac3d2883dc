// How this extension was built, for `python -m lpips_fast info`. setup.py passes the facts as JSON.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of lpips_fast; importing it registers the operators' schemas.";
  m.def(
      "build_info", [] { return LPIPS_FAST_BUILD_INFO; },
      "Facts of the build as a JSON object of strings.");
}
