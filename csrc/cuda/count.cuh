// Counts a step: one thread a tensor. A step count that is not whole is rounded down, as the update
// does.
#pragma once

#include <algorithm>
#include <memory>

#include "cuda/table.cuh"

namespace torchao8::cuda {

struct StepTable {
  static constexpr int kCapacity = (kArgumentBytes - 32) / int(sizeof(float*));
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

// Goes through `count` step counts, whose addresses `address_of` tells, a table at a time.
template <class AddressOf, class Launch>
void for_each_step_table(size_t count, AddressOf address_of, Launch launch) {
  auto table = std::make_unique<StepTable>();
  for (size_t first = 0; first < count; first += StepTable::kCapacity) {
    table->count = uint32_t(std::min<size_t>(count - first, StepTable::kCapacity));
    for (uint32_t i = 0; i < table->count; i++) table->steps[i] = address_of(first + i);
    launch((table->count + kThreads - 1) / kThreads, *table);
  }
}

}  // namespace torchao8::cuda
