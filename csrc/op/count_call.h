// The call of count_step_: its arguments, and every check that does not read a number from memory.
#pragma once

#include "op/numbers.h"

namespace torchao8 {

constexpr const char* kCountOp = "count_step_";

inline void check_count_call(const TensorList& steps, const Device& device) {
  for (size_t i = 0; i < steps.size(); i++)
    check_step({kCountOp, "steps", int64_t(i)}, steps[i], device);
  check_distinct(kCountOp, "steps", "", steps);
}

}  // namespace torchao8
