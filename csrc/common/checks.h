// Argument checks. Each message names the op and the argument, what was expected and what came, and
// each is made before anything is written.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "common/floats.h"

namespace torchao8 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "dtype number " + std::to_string(int(type));
  }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t d = 0; d < sizes.size(); d++) out << (d ? ", " : "") << sizes[d];
  out << "]";
  return out.str();
}

template <class A, class B>
bool same_shape(const A& a, const B& b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); d++) {
    if (a[d] != b[d]) return false;
  }
  return true;
}

// An argument's place: its op, its name, and its index if it is an element of a list.
struct Argument {
  const char* op;
  const char* name;
  int64_t index = -1;
  std::string text() const {
    std::ostringstream out;
    out << op << ": " << name;
    if (index >= 0) out << "[" << index << "]";
    return out.str();
  }
};

inline void check_cpu(const Argument& a, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), a.text(),
                  " must be on the CPU, as the other arguments are; it is on another device");
}

inline void check_dtype(const Argument& a, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, a.text(), " must be ", dtype_name(expected),
                  ", got ", dtype_name(t.scalar_type()));
}

template <class Sizes>
void check_shape(const Argument& a, const Tensor& t, const Sizes& expected, const char* why) {
  STD_TORCH_CHECK(same_shape(t.sizes(), expected), a.text(), " must have shape ",
                  shape_text(expected), " (", why, "), got ", shape_text(t.sizes()));
}

inline void check_contiguous(const Argument& a, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), a.text(), " must be contiguous, got strides ",
                  shape_text(t.strides()), " for shape ", shape_text(t.sizes()));
}

inline FloatType check_float_type(const Argument& a, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    default:
      STD_TORCH_CHECK(false, a.text(), " must be float32, bfloat16 or float16, got ",
                      dtype_name(t.scalar_type()));
  }
  return FloatType::kFloat32;
}

inline void check_block_size(const char* op, int64_t block_size) {
  STD_TORCH_CHECK(block_size >= 64 && block_size <= 2048 && (block_size & (block_size - 1)) == 0,
                  op, ": block_size must be a power of two from 64 to 2048, got ", block_size);
}

}  // namespace torchao8
