// The op count_step_ on CUDA.
#include "cuda/count.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/count.h"
#include "cuda/launch.h"
#include "op/boxed.h"
#include "op/count_call.h"

namespace torchao8::cuda {

void count_steps(const Launcher& launcher, const TensorList& steps, const Scalar& found_inf) {
  for_each_step_table(
      steps.size(), [&](size_t i) { return steps[i].mutable_data_ptr<float>(); },
      [&](unsigned blocks, const StepTable& table) {
        launcher.launch(count_step, blocks, 0, table, found_inf);
      });
}

namespace {

void count_step_cuda(const TensorList& steps, const std::optional<Tensor>& found_inf) {
  if (steps.empty()) return;
  const Device device = device_of({kCountOp, "steps", 0}, steps[0]);
  check_count_call(steps, device);
  const Scalar found = scalar_argument({kCountOp, "found_inf"}, found_inf, 0, device);
  count_steps(Launcher(kCountOp, device.index), steps, found);
}

}  // namespace
}  // namespace torchao8::cuda

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("count_step_", torchao8::boxed<torchao8::cuda::count_step_cuda>);
}
