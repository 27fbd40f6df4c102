// The call of lamb_update_sums: the arguments of a step of Adam that is only looked at.
#pragma once

#include "common/step_call.h"
#include "rules/lamb.h"

namespace torchao8 {

struct LambCall {
  const TensorList none;
  const std::vector<int64_t> no_shards;
  const TensorList *values[3], *scales[3];
  const PresentStates<LambFamily> present;
  const StepCall call;

  LambCall(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
           const TensorList& exp_avg_sqs, const TensorList& exp_avg_scales,
           const TensorList& exp_avg_sq_scales, const TensorList& steps, const TensorList& factors,
           int64_t block_size, bool block_wise, const Place& place)
      : values{&exp_avgs, &exp_avg_sqs, &none},
        scales{&exp_avg_scales, &exp_avg_sq_scales, &none},
        present(values, scales),
        call{LambFamily::kOp, params,      grads,      steps, factors, none, present.lists,
             present.states,  present.has, block_size, false, false,   0,    no_shards,
             no_shards,       place,       !block_wise} {
    check_block_size(LambFamily::kOp, block_size);
  }
  LambCall(const LambCall&) = delete;
};

}  // namespace torchao8
