// Exact sums of squares. Each warp sums in registers, then adds to a BlockSum in shared memory,
// which is added to the output. All of these are integers, so that the order does not matter.
//
// A lane's sum is a 128-bit integer that takes 32 neighbouring exponents, the warp's window: it
// moves where the numbers are, which for most tensors is once. What is below it goes to shared
// memory by itself.
#pragma once

#include "codec/exact_sum.h"
#include "cuda/floats.cuh"
#include "cuda/table.cuh"

namespace torchao8::cuda {

constexpr int kBatch = 8;  // elements that a lane has in flight
constexpr int kWarpBatch = kBatch * kLanes;
constexpr int kUnitBatches = 4;
constexpr int kSumUnit = kUnitBatches * kWarpBatch;  // elements

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

  // A number of each lane, of any kind; all lanes call it together.
  __device__ __forceinline__ void add_one(float x) {
    if (ones_++ % (kSumUnit / kLanes) == 0 && ++units_ > kMostUnitsHeld) flush();
    const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
    if (!all_of_warp(in_window(magnitude, magnitude - 1))) move_window(magnitude);
    add_magnitude(magnitude);
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
    for (int i = int(threadIdx.x % kLanes); i < int(count); i += kLanes)
      add_magnitude(magnitude_bits(x + i));
  }

  __device__ __forceinline__ void add_magnitude(uint32_t magnitude) {
    const int exponent = int(magnitude >> 23);
    if (exponent >= lowest_ && exponent < lowest_ + kWindow) {
      add_in_window(magnitude);
    } else if (magnitude != 0 && exponent != 255) {
      const uint64_t mantissa = mantissa_of(magnitude);
      block_.add(int64_t(mantissa * mantissa), bit_of_square(exponent));
    }
  }

  BlockSum& block_;
  uint64_t low_ = 0, high_ = 0;
  int lowest_ = 1;  // biased exponent
  uint32_t units_ = 0, ones_ = 0;
};

// One thread a row. A template, as several files include it.
template <class Index>
__global__ void __launch_bounds__(kThreads) canonicalize(int64_t* sums, Index rows) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) make_canonical(sums + row * kLimbs);
}

}  // namespace torchao8::cuda
