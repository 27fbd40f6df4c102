// Numbers that come as tensors, so that they can change without a new trace. One element: lr,
// grad_scale, found_inf, the step count of a parameter. Several: the numbers of a rule, the two
// factors of a parameter's step.
#pragma once

#include <cmath>
#include <vector>

#include "op/checks.h"
#include "rules/rule.h"

namespace torchao8 {

inline void check_one_element(const Argument& a, const TensorView& t) {
  TORCHAO8_CHECK(t.numel() == 1, a.text(), " must have one element, got shape ",
                 shape_text(t.sizes()));
}

inline void check_number(const Argument& a, const TensorView& t) {
  check_one_element(a, t);
  TORCHAO8_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                 a.text(), " must be float32 or float64, got ", dtype_name(t.scalar_type()));
}

// What a number on the CPU is.
inline double read_number(const TensorView& t) {
  const void* data = t.const_data_ptr();
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                               : double(*static_cast<const float*>(data));
}

// The numbers of a rule, in one tensor.
inline void check_numbers(const Argument& a, const TensorView& t, int count, const Device& device) {
  if (t.is_cpu() || device.has_doubles() || t.scalar_type() != ScalarType::Float)
    check_dtype(a, t, ScalarType::Double);
  const int64_t shape = count;
  check_shape(a, t, Sizes(&shape, 1), "one for each number of the rule");
  check_contiguous(a, t);
}

inline void check_step(const Argument& a, const TensorView& step, const Device& device) {
  check_device(a, step, device);
  check_dtype(a, step, ScalarType::Float);
  check_one_element(a, step);
}

// What a parameter's gradient and the learning rate are multiplied by.
inline void check_factors(const Argument& a, const TensorView& factors, const Device& device) {
  check_device(a, factors, device);
  if (device.has_doubles() || factors.scalar_type() != ScalarType::Float)
    check_dtype(a, factors, ScalarType::Double);
  const int64_t shape = kFactors;
  check_shape(a, factors, Sizes(&shape, 1), "of the gradient and of the learning rate");
  check_contiguous(a, factors);
}

// Of factors on the CPU, the numbers that they hold. A first one that is NaN makes every gradient
// element NaN, so that the parameter and its states stay as they are.
inline void check_factor_values(const Argument& a, const TensorView& factors) {
  const double* values = factors.const_data_ptr<double>();
  for (int i = 0; i < kFactors; i++) {
    if (i == 0 && std::isnan(values[i])) continue;
    TORCHAO8_CHECK(values[i] >= 0 && std::isfinite(values[i]), a.text(),
                   " must hold finite numbers that are not negative (the first may be NaN), got ",
                   values[i]);
  }
}

constexpr float kLastStep = 16777216.0f;

// Of a step on the CPU, the number that it holds.
inline int64_t check_count(const Argument& a, const TensorView& step) {
  const float value = *step.const_data_ptr<float>();
  TORCHAO8_CHECK(value >= 0 && value < kLastStep && std::floor(value) == value, a.text(),
                 " must be a whole number from 0 to 2^24 - 1, up to which float32 counts, got ",
                 value);
  return int64_t(value);
}

}  // namespace torchao8
