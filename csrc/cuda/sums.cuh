// sum_squares and norms. A warp adds up squares in registers, a thread block in shared memory, all
// of them in the output; integers all the way, so that the order does not matter.
//
// A lane's sum is a 128-bit integer that takes 32 neighbouring exponents, the warp's window: it
// moves where the numbers are, which for most tensors is once. What is below it goes to shared
// memory by itself.
#pragma once

#include "common/exact_sum.h"
#include "cuda/floats.cuh"
#include "cuda/table.cuh"

namespace torchao8::cuda {

constexpr int kBatch = 8;  // elements that a lane has in flight
constexpr int kWarpBatch = kBatch * kLanes;
constexpr int kUnitBatches = 4;
constexpr int kSumUnit = kUnitBatches * kWarpBatch;  // elements

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

struct BlockSum {
  int64_t limbs[kLimbs];
  __device__ __forceinline__ void add(int64_t value, int bit) {
    add_at(value, bit, [this](int k, int64_t x) {
      if (x != 0) add_atomically(&limbs[k], x);
    });
  }
};

__device__ __forceinline__ uint32_t magnitude_bits(const float* x) {
  return float_bits(*x) & 0x7fffffffu;
}
__device__ __forceinline__ uint32_t magnitude_bits(const BFloat16* x) {
  return uint32_t(x->bits & 0x7fffu) << 16;
}
__device__ __forceinline__ uint32_t magnitude_bits(const Half* x) {
  return float_bits(widen_half(x->bits)) & 0x7fffffffu;
}

// A warp's sum. All lanes call everything together.
class WarpSum {
 public:
  __device__ __forceinline__ explicit WarpSum(BlockSum& block) : block_(block) {}

  template <class T>
  __device__ __forceinline__ void add_unit(const T* x, int64_t count) {
    if (++units_ > kMostUnitsHeld) flush();
    const int lane = int(threadIdx.x % kLanes);
    for (int64_t begin = 0; begin < count && begin < kSumUnit; begin += kWarpBatch) {
      if (begin + kWarpBatch > count) return add_any(x + begin, count - begin);
      uint32_t magnitudes[kBatch], largest = 0, smallest = ~0u;  // smallest: less 1, without zeros
#pragma unroll
      for (int i = 0; i < kBatch; i++)
        magnitudes[i] = magnitude_bits(x + begin + lane + kLanes * i);
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        largest = magnitudes[i] > largest ? magnitudes[i] : largest;
        smallest = magnitudes[i] - 1 < smallest ? magnitudes[i] - 1 : smallest;
      }
      if (!all_of_warp(in_window(largest, smallest)) &&
          !(move_window(largest) && all_of_warp(in_window(largest, smallest)))) {
        add_any(x + begin, kWarpBatch);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kBatch; i++) add_in_window(magnitudes[i]);
    }
  }

  // Adds what the lanes hold to the thread block's sum.
  __device__ __forceinline__ void flush() {
    // Words of 32 bits, whose sum over the lanes has 37; a lane adds one of the four.
    const int lane = int(threadIdx.x % kLanes);
    int64_t mine = 0;
#pragma unroll
    for (int word = 0; word < 4; word++) {
      const uint32_t x = uint32_t((word < 2 ? low_ : high_) >> 32 * (word % 2));
      const uint64_t sum = sum_of_lanes(x & 0xffffu) + (uint64_t(sum_of_lanes(x >> 16)) << 16);
      if (lane == word) mine = int64_t(sum);
    }
    if (mine != 0) block_.add(mine, bit_of_square(lowest_) + 32 * lane);
    low_ = high_ = 0;
    units_ = 0;
  }

 private:
  static constexpr int kWindow = 32;  // exponents
  static constexpr int kAbove = 4;    // those that a new window has above what it was moved for
  static constexpr int kHighestWindow = 255 - kWindow;
  // 48 bits and twice 31, and 2^18 elements.
  static constexpr uint32_t kMostUnitsHeld = (1u << 18) / (kSumUnit / kLanes) - 1;

  __device__ __forceinline__ bool in_window(uint32_t largest, uint32_t smallest_less_1) const {
    return largest < uint32_t(lowest_ + kWindow) << 23 &&
           smallest_less_1 >= (uint32_t(lowest_) << 23) - 1;
  }

  // Moves the window to the largest finite number of the lanes, unless that is in it already.
  __device__ __forceinline__ bool move_window(uint32_t largest) {
    const uint32_t key = largest < 0x7f800000u ? largest : 0;
    const int exponent = int(largest_of_lanes(key, kLanes) >> 23);
    if (exponent >= lowest_ && exponent < lowest_ + kWindow) return false;
    flush();
    const int lowest = exponent + kAbove + 1 - kWindow;
    lowest_ = lowest < 1 ? 1 : lowest > kHighestWindow ? kHighestWindow : lowest;
    return true;
  }

  // A normal number of the window, or zero.
  __device__ __forceinline__ void add_in_window(uint32_t magnitude) {
    const uint32_t mantissa = magnitude ? (magnitude & 0x7fffffu) | 0x800000u : 0;
    const uint32_t shift = 2 * ((magnitude >> 23) - uint32_t(lowest_)) & 63;
    const uint64_t square = uint64_t(mantissa) * mantissa;
    const uint64_t low = low_ + (square << shift);
    high_ += (square >> 1 >> (63 - shift)) + (low < low_);
    low_ = low;
  }

  // Elements of any kind, at most kWarpBatch.
  template <class T>
  __device__ __forceinline__ void add_any(const T* x, int64_t count) {
#pragma unroll 1
    for (int i = int(threadIdx.x % kLanes); i < int(count); i += kLanes) {
      const uint32_t magnitude = magnitude_bits(x + i);
      const int exponent = int(magnitude >> 23);
      if (exponent >= lowest_ && exponent < lowest_ + kWindow) {
        add_in_window(magnitude);
      } else if (magnitude != 0 && exponent != 255) {
        const uint64_t mantissa = mantissa_of(magnitude);
        block_.add(int64_t(mantissa * mantissa), bit_of_square(exponent));
      }
    }
  }

  BlockSum& block_;
  uint64_t low_ = 0, high_ = 0;
  int lowest_ = 1;  // biased exponent
  uint32_t units_ = 0;
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

// One thread a row, as below.
__global__ void __launch_bounds__(kThreads) canonicalize(int64_t* sums, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) make_canonical(sums + row * kLimbs);
}

__global__ void __launch_bounds__(kThreads)
    round_norms(const int64_t* sums, double* norms, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) norms[row] = root_of_double(round_sum(sums + row * kLimbs));
}

}  // namespace torchao8::cuda
