// The Python module torchao8._C. Importing it loads the library, whose static initializers register
// the ops (register.cpp); Python calls them as torch.ops.torchao8.*. What it holds itself is
// FAMILIES, the names of the families' ops, states, numbers and flags, FORMATS, the formats of
// state, and DYNAMIC_MAPS, what the codec in Python looks up (torchao8/_C.pyi).

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <algorithm>

#include "codec/dynamic_map.h"
#include "formats/formats.h"
#include "op/family_ops.h"
#include "rules/families.h"

namespace torchao8 {
namespace {

// Owns a reference; null after an error, which Python has been told of.
class Object {
 public:
  explicit Object(PyObject* object) : object_(object) {}
  Object(const Object&) = delete;
  ~Object() { Py_DecRef(object_); }
  bool append(PyObject* item) {  // to a list; takes over the item
    const Object owner(item);
    return object_ != nullptr && item != nullptr && PyList_Append(object_, item) == 0;
  }
  PyObject* get() const { return object_; }
  PyObject* as_tuple() const { return object_ == nullptr ? nullptr : PyList_AsTuple(object_); }

 private:
  PyObject* object_;
};

// What a family's states are like, as told by the rule that has all of them.
struct StateFlags {
  bool is_signed[kMaxStates] = {}, is_stochastic[kMaxStates] = {};
  int known = -1;

  template <class Rule>
  void add() {
    if (Rule::kStates <= known) return;
    known = Rule::kStates;
    for (int s = 0; s < Rule::kStates; s++) {
      is_signed[s] = Rule::kSigned[s];
      is_stochastic[s] = Rule::kStochastic[s];
    }
  }
};

template <class Family>
PyObject* states_of() {
  StateFlags flags;
  for_each_type(typename Family::Rules(),
                [&](auto type) { flags.add<typename decltype(type)::type>(); });
  Object states(PyList_New(0));
  int s = 0;  // of those that are no scalars
  for (const State& state : Family::kStates) {
    const bool is_scalar = state.presence == Presence::kScalar;
    // Not Py_True and Py_False: these are data, without which a program that has no Python could
    // not load the library.
    PyObject* const item = Py_BuildValue(
        "(sNNNN)", state.name, PyBool_FromLong(state.presence == Presence::kOptional),
        PyBool_FromLong(!is_scalar && flags.is_signed[s]),
        PyBool_FromLong(!is_scalar && flags.is_stochastic[s]), PyBool_FromLong(is_scalar));
    if (!states.append(item)) return nullptr;
    if (!is_scalar) s++;
  }
  return states.as_tuple();
}

// The names of a family's numbers or flags.
template <class Arguments>
PyObject* names_of(const Arguments& arguments) {
  Object names(PyList_New(0));
  for (const auto& argument : arguments) {
    if (!names.append(Py_BuildValue("s", argument.name))) return nullptr;
  }
  return names.as_tuple();
}

// For each of a family's rules, how many states it has.
template <class Family>
PyObject* rules_of() {
  Object rules(PyList_New(0));
  bool good = true;
  for_each_type(typename Family::Rules(), [&](auto type) {
    good = good && rules.append(Py_BuildValue("i", decltype(type)::type::kStates));
  });
  return good ? rules.as_tuple() : nullptr;
}

template <class Family>
PyObject* family_of() {
  // Py_BuildValue takes over what "N" stands for, and fails if one of them is null.
  return Py_BuildValue("(sssNNNN)", Family::kName, step_op<Family>(), extremes_op<Family>(),
                       states_of<Family>(), names_of(Family::Options::kNumbers),
                       names_of(Family::Options::kFlags), rules_of<Family>());
}

// Every format of state, in the order of their numbers.
PyObject* formats() {
  Object formats(PyList_New(0));
  bool good = true;
  for_each_type(Formats(), [&](auto type) {
    using Format = typename decltype(type)::type;
    good = good && formats.append(Py_BuildValue("(si)", Format::kName, Format::kBits));
  });
  return good ? formats.as_tuple() : nullptr;
}

// Of the unsigned map, or the signed one: the codebook, then the lines of stochastic rounding.
PyObject* dynamic_map(bool is_signed) {
  struct {
    float codebook[256], start[16], a[32], b[32], c[32];
  } data;
  PositionLines lines;
  build_position_lines(lines, is_signed);
  for (int code = 0; code < 256; code++) data.codebook[code] = value_of_code(is_signed, code);
  std::copy_n(lines.cell_start, 16, data.start);
  std::copy_n(lines.cell_a, 32, data.a);
  std::copy_n(lines.cell_b, 32, data.b);
  std::copy_n(lines.cell_c, 32, data.c);
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&data), sizeof(data));
}

int add_constants(PyObject* module) {
  PyObject* const maps = Py_BuildValue("(NN)", dynamic_map(false), dynamic_map(true));
  const Object owner(maps);
  if (maps == nullptr || PyModule_AddObjectRef(module, "DYNAMIC_MAPS", maps) != 0) return -1;

  const Object format_tuple(formats());
  if (format_tuple.get() == nullptr ||
      PyModule_AddObjectRef(module, "FORMATS", format_tuple.get()) != 0) {
    return -1;
  }

  Object families(PyList_New(0));
  bool good = true;
  for_each_type(Families(), [&](auto type) {
    good = good && families.append(family_of<typename decltype(type)::type>());
  });
  const Object tuple(good ? families.as_tuple() : nullptr);
  return tuple.get() == nullptr ? -1 : PyModule_AddObjectRef(module, "FAMILIES", tuple.get());
}

}  // namespace
}  // namespace torchao8

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef_Slot slots[] = {
      {Py_mod_exec, reinterpret_cast<void*>(&torchao8::add_constants)}, {0, nullptr}};
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&module);
}
