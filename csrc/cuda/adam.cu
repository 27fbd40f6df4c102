#include "rules/adam.h"

#include "cuda/step_op.cuh"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("adam_step_", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::AdamFamily>::run));
  m.impl("adam_extremes", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::AdamFamily>::extremes));
}
