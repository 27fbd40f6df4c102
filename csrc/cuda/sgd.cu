#include "rules/sgd.h"

#include "cuda/step_op.cuh"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("sgd_step_", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::SgdFamily>::run));
  m.impl("sgd_extremes", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::SgdFamily>::extremes));
}
