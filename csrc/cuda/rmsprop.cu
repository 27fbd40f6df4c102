#include "rules/rmsprop.h"

#include "cuda/step_op.cuh"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("rmsprop_step_", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::RmspropFamily>::run));
  m.impl("rmsprop_extremes", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::RmspropFamily>::extremes));
}
