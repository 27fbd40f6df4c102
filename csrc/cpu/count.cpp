// The op count_step_ on the CPU.
#include "op/count_call.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "op/boxed.h"

namespace torchao8 {
namespace {

void count_step_cpu(const TensorList& steps, const std::optional<Tensor>& found_inf) {
  check_count_call(steps, kCpu);
  for (size_t i = 0; i < steps.size(); i++) check_count({kCountOp, "steps", int64_t(i)}, steps[i]);
  if (found_inf) {
    check_device({kCountOp, "found_inf"}, *found_inf, kCpu);
    check_number({kCountOp, "found_inf"}, *found_inf);
    if (read_number(*found_inf) != 0) return;
  }
  for (const TensorView& step : steps) *step.mutable_data_ptr<float>() += 1;
}

}  // namespace
}  // namespace torchao8

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  m.impl("count_step_", torchao8::boxed<torchao8::count_step_cpu>);
}
