#include "rules/lion.h"

#include "cuda/step_op.cuh"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("lion_step_", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::LionFamily>::run));
  m.impl("lion_extremes", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::LionFamily>::extremes));
}
