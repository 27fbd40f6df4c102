// The call of adam_step_: its arguments, and every check that does not read a number from memory.
// What an engine adds is where those numbers are.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/block_layout.h"
#include "common/checks.h"
#include "common/numbers.h"
#include "rules/adam.h"

namespace torchao8 {

constexpr const char* kAdamOp = "adam_step_";
constexpr int kMoments = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

// The arguments as they came.
struct AdamCall {
  const TensorList &params, &grads;
  const TensorList* moments[kMoments];
  const TensorList* scales[kMoments];
  const TensorList& steps;
  int64_t block_size;
  bool stochastic;
  int64_t seed;
  const std::vector<int64_t>&shard_offsets, &shard_row_strides;
  Place place;

  bool amsgrad() const { return !moments[2]->empty(); }
  int states() const { return amsgrad() ? 3 : 2; }
  bool quantized() const {
    return !params.empty() && (*moments[0])[0].scalar_type() == ScalarType::Byte;
  }
};

constexpr const char* kMomentNames[kMoments] = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
constexpr const char* kScaleNames[kMoments] = {"exp_avg_scales", "exp_avg_sq_scales",
                                               "max_exp_avg_sq_scales"};

template <class List>
void check_length(const char* name, const List& list, size_t expected, const char* why) {
  TORCHAO8_CHECK(list.size() == expected, kAdamOp, ": ", name, " must have ", expected,
                 " elements (", why, "), got ", list.size());
}

inline void check_lengths(const AdamCall& call) {
  const size_t n = call.params.size();
  const char* why = "one per parameter";
  check_length("grads", call.grads, n, why);
  check_length("steps", call.steps, n, why);
  check_length("exp_avgs", *call.moments[0], n, why);
  check_length("exp_avg_sqs", *call.moments[1], n, why);
  if (call.amsgrad()) check_length("max_exp_avg_sqs", *call.moments[2], n, why);
  const bool quantized = call.quantized();
  for (int s = 0; s < kMoments; s++) {
    const bool present = quantized && s < call.states();
    const char* reason = present      ? "one per parameter, exp_avgs[0] being uint8"
                         : !quantized ? "none, exp_avgs[0] not being uint8"
                                      : "none, max_exp_avg_sqs being empty";
    check_length(kScaleNames[s], *call.scales[s], present ? n : 0, reason);
  }
  check_length("shard_row_strides", call.shard_row_strides, call.shard_offsets.size(),
               "as many as shard_offsets");
  if (!call.shard_offsets.empty())
    check_length("shard_offsets", call.shard_offsets, n, "none, or one per parameter");
}

inline void check_state(const AdamCall& call, int s, int64_t i, const BlockLayout& layout) {
  const auto sizes = call.params[i].sizes();
  const Argument moment{kAdamOp, kMomentNames[s], i};
  const Tensor& m = (*call.moments[s])[i];
  check_place(moment, m, call.place);
  check_dtype(moment, m, call.quantized() ? ScalarType::Byte : ScalarType::Float);
  check_shape(moment, m, sizes, "that of the parameter");
  check_contiguous(moment, m);
  if (!call.quantized()) return;
  const Argument scale{kAdamOp, kScaleNames[s], i};
  const Tensor& t = (*call.scales[s])[i];
  check_place(scale, t, call.place);
  check_dtype(scale, t, ScalarType::Float);
  check_shape(scale, t, layout.scale_shape, "one scale per block of a row");
  check_contiguous(scale, t);
}

inline void check_parameter(const AdamCall& call, int64_t i) {
  const Argument param{kAdamOp, "params", i}, grad{kAdamOp, "grads", i}, step{kAdamOp, "steps", i};
  check_place(param, call.params[i], call.place);
  check_place(grad, call.grads[i], call.place);
  check_float_type(param, call.params[i]);
  check_float_type(grad, call.grads[i]);
  check_shape(grad, call.grads[i], call.params[i].sizes(), "that of the parameter");
  check_no_overlap(param, call.params[i]);
  check_step(step, call.steps[i], call.place);
  const BlockLayout layout = block_layout(call.params[i].sizes(), call.block_size);
  for (int s = 0; s < call.states(); s++) check_state(call, s, i, layout);
}

inline void check_options(const AdamOptions& o) {
  const auto in_unit = [](double beta) { return beta >= 0 && beta < 1; };
  TORCHAO8_CHECK(in_unit(o.beta1), kAdamOp, ": beta1 must be in [0, 1), got ", o.beta1);
  TORCHAO8_CHECK(in_unit(o.beta2), kAdamOp, ": beta2 must be in [0, 1), got ", o.beta2);
  TORCHAO8_CHECK(std::isfinite(o.lr), kAdamOp, ": lr must be finite, got ", o.lr);
  TORCHAO8_CHECK(o.eps >= 0, kAdamOp, ": eps must not be negative, got ", o.eps);
  TORCHAO8_CHECK(o.weight_decay >= 0, kAdamOp, ": weight_decay must not be negative, got ",
                 o.weight_decay);
  TORCHAO8_CHECK(o.grad_scale > 0 && std::isfinite(o.grad_scale), kAdamOp,
                 ": grad_scale must be positive and finite, got ", o.grad_scale);
}

// All that can be told without reading a number.
inline void check_call(const AdamCall& call) {
  check_lengths(call);
  for (size_t i = 0; i < call.params.size(); i++) check_parameter(call, int64_t(i));
  check_distinct(kAdamOp, "params", call.params);
  check_distinct(kAdamOp, "exp_avgs", *call.moments[0]);
  check_distinct(kAdamOp, "exp_avg_sqs", *call.moments[1]);
}

}  // namespace torchao8
