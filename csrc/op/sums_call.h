// The calls of sum_squares and norms: what is checked and made on every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "codec/exact_sum.h"
#include "op/checks.h"

namespace torchao8 {

constexpr const char* kSumOp = "sum_squares";
constexpr const char* kNormOp = "norms";

inline FloatType check_summand(const TensorList& tensors, size_t i, const Device& device) {
  const Argument argument = {kSumOp, "tensors", int64_t(i)};
  check_device(argument, tensors[i], device);
  return check_float_type(argument, tensors[i]);
}

// Of the list's device; rows that hold nothing.
inline Tensor new_sums(const TensorList& tensors) {
  const std::vector<int64_t> shape = {int64_t(tensors.size()), kLimbs};
  return torch::stable::new_zeros(
      tensors[0].tensor(), torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()),
      ScalarType::Long);
}

// Whether a tensor's elements are a piece of memory without gaps, in whatever order: a sum does not
// ask for it.
inline bool is_packed(const TensorView& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t d = 0; d < sizes.size(); d++) {
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != extent) return false;
    extent *= size;
  }
  return true;
}

// Returns the rows.
inline int64_t check_norms(const Tensor& sums) {
  const Argument argument = {kNormOp, "sums"};
  check_dtype(argument, sums, ScalarType::Long);
  const auto sizes = sums.sizes();
  TORCHAO8_CHECK(sizes.size() == 2 && sizes[1] == kLimbs, argument.text(), " must have shape [n, ",
                 kLimbs, "], as sum_squares gives it, got ", shape_text(sizes));
  return sizes[0];
}

inline Tensor new_norms(const Tensor& sums) {
  const int64_t rows = sums.sizes()[0];
  return torch::stable::new_empty(sums, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1),
                                  ScalarType::Double);
}

}  // namespace torchao8
