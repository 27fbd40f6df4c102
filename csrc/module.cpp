// The Python module torchao8._C. It is empty: importing it loads the library, whose static
// initializers register the ops (register.cpp), and Python calls them as torch.ops.torchao8.*.

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&module);
}
