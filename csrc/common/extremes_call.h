// The call of an op like adam_extremes: the arguments of a step with one scale a tensor, which is
// looked at before it is made.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/step_call.h"

namespace torchao8 {

template <class Family>
struct ExtremesCall {
  const TensorList none;
  const std::vector<int64_t> no_shards;
  const PresentStates<Family> present;
  const StepCall call;

  ExtremesCall(const TensorList& params, const TensorList& grads, const TensorList* const* values,
               const TensorList* const* scales, const TensorList& steps, const TensorList& factors,
               const Place& place)
      : present(values, scales),
        call{Family::kExtremesOp, params,      grads, steps, factors, none, present.lists,
             present.states,      present.has, 256,   false, false,   0,    no_shards,
             no_shards,           place,       true} {}
  ExtremesCall(const ExtremesCall&) = delete;

  void check() const {
    TORCHAO8_CHECK(!call.params.empty(), call.op, ": params must not be empty");
    check_call(call);
    const std::string first = call.lists[0].name;
    TORCHAO8_CHECK(
        call.quantized(), call.op, ": ", first, " must be uint8, as 8-bit state is, got ",
        call.states.empty() ? "none" : dtype_name((*call.states[0].values)[0].scalar_type()));
  }
};

// Of the list's device.
inline Tensor new_extremes(const StepCall& call) {
  const std::vector<int64_t> shape = {int64_t(call.params.size()), int64_t(call.states.size())};
  return torch::stable::new_zeros(
      call.params[0], torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()),
      ScalarType::Long);
}

}  // namespace torchao8
