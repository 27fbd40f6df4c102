#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include "op/interpreter.h"

// A program without Python may load the library too. There these are null.
#if defined(__GNUC__) && !defined(_WIN32)
#pragma weak Py_IsInitialized
#pragma weak PyGILState_Ensure
#pragma weak PyGILState_Release
#endif

namespace torchao8 {
namespace {

bool has_interpreter() {
#if defined(__GNUC__) && !defined(_WIN32)
  if (&Py_IsInitialized == nullptr) return false;
#endif
  return Py_IsInitialized() != 0;
}

}  // namespace

InterpreterLock::InterpreterLock() {
  if (has_interpreter()) state_ = int(PyGILState_Ensure());
}

InterpreterLock::~InterpreterLock() {
  if (state_ >= 0) PyGILState_Release(PyGILState_STATE(state_));
}

}  // namespace torchao8
