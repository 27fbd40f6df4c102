#include "rules/adagrad.h"

#include "cuda/step_op.cuh"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("adagrad_step_", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::AdagradFamily>::run));
  m.impl("adagrad_extremes", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::AdagradFamily>::extremes));
}
