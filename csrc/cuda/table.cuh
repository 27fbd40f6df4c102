// The arguments of a step kernel, and how its work is shared out: a table of tensors, units of work
// numbered through them, a contiguous range of units for each thread block.
#pragma once

#include "common/block_scale.h"
#include "common/floats.h"
#include "common/random.h"
#include "cuda/device.cuh"

namespace torchao8::cuda {

constexpr int kBlocksPerProcessor = 3;  // thread blocks that are resident together
constexpr int kArgumentBytes = 32764;   // that a kernel may have

// A number that lies on the device, or is known to the host.
struct Scalar {
  const void* place;  // null: value
  double value;
  bool is_double;
  TORCHAO8_HD double get() const {
    if (!place) return value;
    return is_double ? *static_cast<const double*>(place)
                     : double(*static_cast<const float*>(place));
  }
};

// The numbers that all tensors of a step share. What changes from step to step is read by the
// device, so that the host waits for nothing and a graph of the step can be replayed.
template <class Rule>
struct Numbers {
  typename Rule::Options options;  // but for lr and grad_scale
  Scalar lr, grad_scale, found_inf;
  uint64_t seed;
  bool scaled_state;
};

struct Places {
  void* param;
  const void* grad;
  const float* step;    // the steps that the tensor has made
  uint32_t first_unit;  // number of its first unit in the launch
  FloatType param_type, grad_type;
};

constexpr int kPerLane = 8;               // neighbouring elements that a lane takes
constexpr int kSpan = kLanes * kPerLane;  // elements that a warp takes at a time

// How blocks lie in the warps that take them: several to a warp, one, or longer than it takes.
enum class Blocks { kShort, kSpan, kLong };

// Of 8-bit state. A unit is a block, or the neighbouring blocks of a row that fill a warp.
template <int N>
struct BlockEntry : Places {
  bool fast;         // aligned, rows of multiples of 8, param and grad of the launch's type
  bool whole_spans;  // rows of multiples of a warp's elements
  uint8_t* codes[N];
  float* scales[N];
  int64_t row_length, row_stride;
  uint64_t shard_offset;
  uint32_t blocks_per_row, units_per_row;
};

// Of 32-bit state. A unit is a chunk of elements.
template <int N>
struct ElementEntry : Places {
  bool fast;  // aligned, param and grad of the launch's type
  float* states[N];
  int64_t count;
};

// The tensors of a launch.
template <class Rule, class Entry>
struct Table {
  static constexpr int kCapacity =
      (kArgumentBytes - 32 - int(sizeof(Numbers<Rule>))) / int(sizeof(Entry));
  Numbers<Rule> numbers;
  Entry entries[kCapacity];
  uint32_t count;
  uint32_t units;
  int32_t block_size, log_of_block;
  bool stochastic;
};

// What a tensor's step makes of the numbers.
template <class Rule>
struct Prepared {
  Rule rule;
  bool is_bounded;
  uint64_t keys[kMaxStates];

  TORCHAO8_HD void set(Numbers<Rule> numbers, float steps_made) {
    const int64_t step = int64_t(steps_made) + 1;
    numbers.options.lr = numbers.lr.get();
    numbers.options.grad_scale = numbers.grad_scale.get();
    rule = Rule::at_step(numbers.options, step, numbers.scaled_state);
    is_bounded = rule.is_bounded();
    for (int s = 0; s < Rule::kStates; s++)
      keys[s] = random_key(numbers.seed, uint64_t(step), uint64_t(s));
  }
};

// The entry that holds unit number `unit`, which is not before entry i.
template <class T>
TORCHAO8_HD uint32_t find_entry(const T& table, uint32_t i, uint32_t unit) {
  uint32_t low = i, high = table.count - 1;
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (table.entries[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}
template <class T>
TORCHAO8_HD uint32_t end_of_entries(const T& table, uint32_t end) {
  return end < table.count ? table.entries[end].first_unit : table.units;
}

// The Prepared of neighbouring entries, in shared memory: a thread makes one, for all warps.
constexpr uint32_t kWindow = 32;

// Goes through a thread block's units. For each of its warps, worker.enter(entry, prepared) comes
// before the first unit of an entry, and again after each worker(unit of the entry) that returns
// false.
template <class Rule, class Entry, class Worker>
__device__ __forceinline__ void for_each_unit(const Table<Rule, Entry>& table,
                                              Prepared<Rule>* window, Worker& worker) {
  const uint32_t share = (table.units + gridDim.x - 1) / gridDim.x;
  const uint64_t begin_of_share = uint64_t(share) * blockIdx.x;
  const uint32_t end_of_share =
      begin_of_share + share < table.units ? uint32_t(begin_of_share) + share : table.units;
  if (begin_of_share >= end_of_share) return;
  uint32_t begin = uint32_t(begin_of_share), first = find_entry(table, 0, begin);
  while (begin < end_of_share) {
    const uint32_t last = first + kWindow < table.count ? first + kWindow : table.count;
    const uint32_t end_of_window = end_of_entries(table, last);
    const uint32_t end = end_of_window < end_of_share ? end_of_window : end_of_share;
    __syncthreads();  // no warp needs the last window any more
    if (first + threadIdx.x < last)
      window[threadIdx.x].set(table.numbers, *table.entries[first + threadIdx.x].step);
    __syncthreads();
    uint32_t i = first, end_of_entry = 0;
    for (uint32_t unit = begin + threadIdx.x / kLanes; unit < end; unit += kWarps) {
      if (unit >= end_of_entry) {
        i = find_entry(table, i, unit);
        end_of_entry = end_of_entries(table, i + 1);
        worker.enter(table.entries[i], window[i - first]);
      }
      const auto& entry = table.entries[i];
      if (!worker(entry, window[i - first], unit - entry.first_unit)) end_of_entry = 0;
    }
    begin = end;
    first = last;
  }
}

}  // namespace torchao8::cuda
