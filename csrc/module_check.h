// Whether a module of torch is still what it was when it was built: its class, its attributes, its
// hooks, its parameters' classes and shapes, its children. The same comparison as module_fault() in
// lpips_fast/trunk/legality.py, which says what differs in words; this says only whether, in a
// twentieth of the time, since it is asked at every call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "weight_watch.h"

namespace lpips_fast {

namespace py = pybind11;

inline bool are_equal(PyObject* a, PyObject* b) {
  if (a == b) return true;
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) PyErr_Clear();  // what cannot be compared is not the same
  return equal == 1;
}

class ModuleCheck {
  struct Groups {
    PyObject *parameters = nullptr, *buffers = nullptr, *modules = nullptr;
  };

 public:
  using Named = std::vector<std::pair<py::str, py::object>>;

  ModuleCheck(py::type kind, std::vector<py::str> keys, Named configuration,
              std::vector<py::str> hooks, Named shapes, std::vector<py::str> buffers,
              std::vector<std::pair<py::str, ModuleCheck>> children,
              std::vector<py::type> parameter_kinds)
      : kind_(std::move(kind)),
        keys_(std::move(keys)),
        configuration_(std::move(configuration)),
        hooks_(std::move(hooks)),
        shapes_(std::move(shapes)),
        buffers_(std::move(buffers)),
        children_(std::move(children)),
        parameter_kinds_(std::move(parameter_kinds)) {
    for (const py::str& key : keys_) entries_.push_back(entry(key));
  }

  // found: receives the parameters, in order. False: perhaps not, ask in words.
  bool matches(PyObject* module, PyObject* found) const {
    if (Py_TYPE(module) != reinterpret_cast<PyTypeObject*>(kind_.ptr())) return false;
    const py::object held =
        py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    PyObject* attributes = held.ptr();
    if (attributes == nullptr) {
      PyErr_Clear();
      return false;
    }
    if (PyDict_GET_SIZE(attributes) != Py_ssize_t(keys_.size())) return false;
    Groups groups;
    return have_attributes(attributes, groups) && have_parameters(groups, found) &&
           have_children(groups, found);
  }

 private:
  // What the value of an attribute is compared with.
  struct Entry {
    PyObject* key;
    PyObject* value = nullptr;            // must be equal to it, or is not compared
    bool hooks = false;                   // must be an empty dict
    PyObject* Groups::* group = nullptr;  // is looked into
  };

  bool have_attributes(PyObject* attributes, Groups& groups) const {
    // Attributes stand in the order in which they were set, by names that Python keeps once: a walk
    // side by side finds nearly all without a lookup.
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Entry& expected : entries_) {
      if (!PyDict_Next(attributes, &position, &key, &value)) return false;
      if (key != expected.key) {
        value = PyDict_GetItemWithError(attributes, expected.key);
        if (value == nullptr) return false;
      }
      if (expected.value != nullptr && !are_equal(value, expected.value)) return false;
      if (expected.hooks && (!PyDict_Check(value) || PyDict_GET_SIZE(value) != 0)) return false;
      if (expected.group != nullptr) {
        // Another class may keep an order of its own.
        if (!PyDict_CheckExact(value)) return false;
        groups.*expected.group = value;
      }
    }
    return groups.parameters != nullptr && groups.buffers != nullptr && groups.modules != nullptr;
  }

  Entry entry(const py::str& key) const {
    Entry result{key.ptr()};
    const std::string name = key;
    if (name == "_parameters") result.group = &Groups::parameters;
    if (name == "_buffers") result.group = &Groups::buffers;
    if (name == "_modules") result.group = &Groups::modules;
    for (const auto& [configured, value] : configuration_) {
      if (key.equal(configured)) result.value = value.ptr();
    }
    for (const py::str& hooks : hooks_) result.hooks |= key.equal(hooks);
    return result;
  }

  bool have_parameters(const Groups& groups, PyObject* found) const {
    PyObject *parameters = groups.parameters, *buffers = groups.buffers;
    if (PyDict_GET_SIZE(parameters) != Py_ssize_t(shapes_.size())) return false;
    if (PyDict_GET_SIZE(buffers) != Py_ssize_t(buffers_.size())) return false;
    for (const py::str& key : buffers_) {
      if (PyDict_GetItemWithError(buffers, key.ptr()) == nullptr) return false;
    }
    static PyObject* const shape_name = PyUnicode_InternFromString("shape");
    for (const auto& [key, shape] : shapes_) {
      PyObject* parameter = PyDict_GetItemWithError(parameters, key.ptr());
      if (parameter == nullptr) return false;
      if (shape.is_none()) {
        if (parameter != Py_None) return false;
        continue;
      }
      bool is_plain = false;
      for (const py::type& kind : parameter_kinds_) {
        is_plain |= Py_TYPE(parameter) == reinterpret_cast<PyTypeObject*>(kind.ptr());
      }
      if (!is_plain) return false;
      const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, shape_name));
      if (!now || !are_equal(now.ptr(), shape.ptr())) {
        PyErr_Clear();
        return false;
      }
      PyList_Append(found, parameter);
    }
    return true;
  }

  bool have_children(const Groups& groups, PyObject* found) const {
    PyObject* modules = groups.modules;
    if (PyDict_GET_SIZE(modules) != Py_ssize_t(children_.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key, *module;
    for (const auto& [name, child] : children_) {
      if (!PyDict_Next(modules, &position, &key, &module)) return false;
      if (!are_equal(key, name.ptr()) || !child.matches(module, found)) return false;
    }
    return true;
  }

  py::type kind_;
  std::vector<py::str> keys_;
  std::vector<Entry> entries_;  // of the keys, in their order
  Named configuration_;
  std::vector<py::str> hooks_;
  Named shapes_;
  std::vector<py::str> buffers_;
  std::vector<std::pair<py::str, ModuleCheck>> children_;
  std::vector<py::type> parameter_kinds_;
};

// Whether attributes of objects are the very objects that they were: methods nobody replaced.
class AttributeCheck {
 public:
  explicit AttributeCheck(std::vector<std::pair<py::object, py::str>> attributes) {
    for (auto& [owner, name] : attributes) {
      py::object value = py::getattr(owner, name, py::none());
      attributes_.push_back({std::move(owner), std::move(name), std::move(value)});
    }
  }

  bool unchanged() const {
    for (const Attribute& attribute : attributes_) {
      const auto now = py::reinterpret_steal<py::object>(
          PyObject_GetAttr(attribute.owner.ptr(), attribute.name.ptr()));
      if (!now) PyErr_Clear();
      if ((now ? now.ptr() : Py_None) != attribute.value.ptr()) return false;
    }
    return true;
  }

 private:
  struct Attribute {
    py::object owner;
    py::str name;
    py::object value;
  };
  std::vector<Attribute> attributes_;
};

// Whether plain tensors lie contiguous on a device, in a dtype, and (`frozen`) ask for no gradient.
// False: perhaps not, ask in words.
inline bool lie_plainly(const py::list& tensors, const py::object& device, const py::object& dtype,
                        const py::object& layout, bool frozen) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("device"),        PyUnicode_InternFromString("dtype"),
      PyUnicode_InternFromString("layout"),        PyUnicode_InternFromString("requires_grad"),
      PyUnicode_InternFromString("is_contiguous"), PyUnicode_InternFromString("data_ptr")};
  PyObject* const expected[] = {device.ptr(), dtype.ptr(), layout.ptr(), Py_False};
  const int attributes = frozen ? 4 : 3;
  for (const py::handle tensor : tensors) {
    for (int k = 0; k < attributes; ++k) {
      const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), names[k]));
      if (!now || !are_equal(now.ptr(), expected[k])) {
        PyErr_Clear();
        return false;
      }
    }
    for (int k = 4; k < 6; ++k) {
      const auto now =
          py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), names[k]));
      if (!now || PyObject_IsTrue(now.ptr()) != 1) {
        PyErr_Clear();
        return false;
      }
    }
  }
  return true;
}

// Whether weights lie in the very storages, are of the version, at the address, in the order and
// with the memory that were packed: WeightWatch for all of a slice in one call. Storages are looked
// at, not tensors: torch swaps no tensor (torch.utils.swap_tensors) that has a weak reference.
class WeightsCheck {
 public:
  WeightsCheck(const py::list& weights, std::vector<std::shared_ptr<WeightWatch>> watches) {
    for (size_t k = 0; k < watches.size(); ++k) {
      PyObject* weight = PyList_GET_ITEM(weights.ptr(), Py_ssize_t(k));
      weights_.push_back({py::weakref(called(weight, "untyped_storage")), version(weight),
                          address(weight), described(weight), std::move(watches[k])});
    }
  }

  // False: perhaps not, ask each of them.
  bool unchanged(const py::list& weights) const {
    if (weights.size() != weights_.size()) return false;
    static PyObject* const name = PyUnicode_InternFromString("untyped_storage");
    for (size_t k = 0; k < weights_.size(); ++k) {
      const One& one = weights_[k];
      PyObject* weight = PyList_GET_ITEM(weights.ptr(), Py_ssize_t(k));
      const py::object storage = called(weight, name);
      if (PyWeakref_GET_OBJECT(one.storage.ptr()) != storage.ptr()) return false;
      if (version(weight) != one.version || address(weight) != one.address) return false;
      if (!are_equal(described(weight).ptr(), one.described.ptr())) return false;
      if (one.watch->look(one.address) != WeightWatch::Verdict::kSame) return false;
    }
    return true;
  }

 private:
  struct One {
    py::weakref storage;
    long version;
    std::uintptr_t address;
    py::object described;
    std::shared_ptr<WeightWatch> watch;
  };

  static py::object called(PyObject* tensor, PyObject* method) {
    PyObject* result = PyObject_CallMethodNoArgs(tensor, method);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  static py::object called(PyObject* tensor, const char* method) {
    return called(tensor, py::str(method).ptr());
  }

  // -1 for a tensor of inference_mode, which counts none.
  static long version(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
    if (!found) PyErr_Clear();
    return found ? PyLong_AsLong(found.ptr()) : -1;
  }

  static std::uintptr_t address(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    return PyLong_AsSize_t(called(tensor, name).ptr());
  }

  // Shape, strides, dtype: `p.data = …` may have the same memory read in another way.
  static py::object described(PyObject* tensor) {
    static PyObject* const shape = PyUnicode_InternFromString("shape");
    static PyObject* const stride = PyUnicode_InternFromString("stride");
    static PyObject* const dtype = PyUnicode_InternFromString("dtype");
    const auto sizes = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, shape));
    const auto kind = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, dtype));
    if (!sizes || !kind) throw py::error_already_set();
    return py::make_tuple(sizes, called(tensor, stride), kind);
  }

  std::vector<One> weights_;
};

}  // namespace lpips_fast
