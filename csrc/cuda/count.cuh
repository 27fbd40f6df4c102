// Counts a step: one thread a tensor. A step count that is not whole is rounded down, as the update
// does.
#pragma once

#include "cuda/table.cuh"

namespace torchao8::cuda {

struct StepTable {
  static constexpr int kCapacity = 4000;
  float* steps[kCapacity];
  uint32_t count;
};

__global__ void __launch_bounds__(kThreads)
    count_step(const __grid_constant__ StepTable table, const Scalar found_inf) {
  static_assert(sizeof table + sizeof found_inf <= kArgumentBytes);
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < table.count && found_inf.get() == 0)
    *table.steps[i] = float(int64_t(*table.steps[i]) + 1);
}

}  // namespace torchao8::cuda
