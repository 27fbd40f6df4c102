#include "rules/nadam.h"

#include "cuda/step_engine.cuh"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  torchao8::implement<torchao8::cuda::CudaStep, torchao8::NadamFamily>(m);
}
