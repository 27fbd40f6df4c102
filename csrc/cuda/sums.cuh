// sum_squares and norms.
#pragma once

#include "cuda/warp_sum.cuh"

namespace torchao8::cuda {

struct SumEntry {
  const void* data;  // elements without gaps
  int64_t count;
  int64_t row;
  uint32_t first_unit;
  FloatType type;

  int64_t units() const { return (count + kSumUnit - 1) / kSumUnit; }
};

struct SumTable {
  static constexpr int kCapacity = (kArgumentBytes - 32) / int(sizeof(SumEntry));
  SumEntry entries[kCapacity];
  int64_t* sums;
  uint32_t count;
  uint32_t units;
};

// Fills a table and launches it when it is full.
template <class Launch>
class SumFiller {
 public:
  SumFiller(int64_t* sums, Launch launch) : table_(std::make_unique<SumTable>()), launch_(launch) {
    table_->sums = sums;
  }
  void add(SumEntry entry) {
    const int64_t units = entry.units();
    if (units == 0) return;
    if (table_->count == uint32_t(SumTable::kCapacity) || table_->units + units > kMostUnits)
      flush();
    entry.first_unit = table_->units;
    table_->entries[table_->count++] = entry;
    table_->units += uint32_t(units);
  }
  void flush() {
    if (table_->count > 0) launch_(*table_);
    table_->count = table_->units = 0;
  }

 private:
  std::unique_ptr<SumTable> table_;
  Launch launch_;
};

__global__ void __launch_bounds__(kThreads) sum_squares(const __grid_constant__ SumTable table) {
  static_assert(sizeof table <= kArgumentBytes);
  TORCHAO8_SHARED(BlockSum, block);
  const uint32_t share = (table.units + gridDim.x - 1) / gridDim.x;
  const uint64_t first = uint64_t(share) * blockIdx.x;
  const uint32_t end = first + share < table.units ? uint32_t(first) + share : table.units;
  if (first >= end) return;
  if (threadIdx.x < kLimbs) block.limbs[threadIdx.x] = 0;
  __syncthreads();
  uint32_t begin = uint32_t(first);
  for (uint32_t i = find_entry(table, 0, begin); begin < end; i++) {
    const SumEntry& entry = table.entries[i];
    const uint32_t end_of_entry = end_of_entries(table, i + 1);
    const uint32_t stop = end_of_entry < end ? end_of_entry : end;
    WarpSum sum(block);
    for (uint32_t unit = begin + threadIdx.x / kLanes; unit < stop; unit += kWarps) {
      const int64_t at = int64_t(unit - entry.first_unit) * kSumUnit, count = entry.count - at;
      if (entry.type == FloatType::kFloat32) {
        sum.add_unit(static_cast<const float*>(entry.data) + at, count);
      } else if (entry.type == FloatType::kBFloat16) {
        sum.add_unit(static_cast<const BFloat16*>(entry.data) + at, count);
      } else {
        sum.add_unit(static_cast<const Half*>(entry.data) + at, count);
      }
    }
    sum.flush();
    __syncthreads();
    if (threadIdx.x < kLimbs && block.limbs[threadIdx.x] != 0) {
      add_atomically(&table.sums[entry.row * kLimbs + threadIdx.x], block.limbs[threadIdx.x]);
      block.limbs[threadIdx.x] = 0;
    }
    __syncthreads();
    begin = stop;
  }
}

// One thread a row.
__global__ void __launch_bounds__(kThreads)
    round_norms(const int64_t* sums, double* norms, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) norms[row] = root_of_double(round_sum(sums + row * kLimbs));
}

}  // namespace torchao8::cuda
