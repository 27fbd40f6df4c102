// The ops of the families on CUDA. Their kernels are in rules/.
#include <torch/csrc/stable/library.h>

#include "cuda/step_engine.cuh"
#include "rules/families.h"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  torchao8::for_each_type(torchao8::Families(), [&](auto type) {
    torchao8::implement<torchao8::cuda::CudaStep, typename decltype(type)::type>(m);
  });
}
