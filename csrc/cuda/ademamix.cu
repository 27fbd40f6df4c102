#include "rules/ademamix.h"

#include "cuda/step_op.cuh"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("ademamix_step_", TORCH_BOX(&torchao8::cuda::StepOp<torchao8::AdemamixFamily>::run));
  m.impl("ademamix_extremes",
         TORCH_BOX(&torchao8::cuda::StepOp<torchao8::AdemamixFamily>::extremes));
}
