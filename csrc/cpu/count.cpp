// The op count_step_ on the CPU.
#include "common/count_call.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace torchao8 {
namespace {

void count_step_cpu(TensorList steps, std::optional<Tensor> found_inf) {
  check_count_call(steps, kCpu);
  for (size_t i = 0; i < steps.size(); i++) check_count({kCountOp, "steps", int64_t(i)}, steps[i]);
  if (found_inf) {
    check_place({kCountOp, "found_inf"}, *found_inf, kCpu);
    check_number({kCountOp, "found_inf"}, *found_inf);
    if (read_number(*found_inf) != 0) return;
  }
  for (const Tensor& step : steps) *step.mutable_data_ptr<float>() += 1;
}

}  // namespace
}  // namespace torchao8

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  m.impl("count_step_", TORCH_BOX(&torchao8::count_step_cpu));
}
