// The Python module torchao8._C_cuda. Importing it registers the CUDA kernels of the ops that
// torchao8._C defines (../register.cpp). What it holds is CUDA_VERSION, of the toolkit that it was
// built with: 13000 is 13.0.

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>
#include <cuda_runtime_api.h>

namespace {

int set_names(PyObject* module) {
  return PyModule_AddIntConstant(module, "CUDA_VERSION", CUDART_VERSION);
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(&set_names)}, {0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&module);
}
