// The arguments of a step kernel, and how its work is shared out: a table of tensors, units of work
// numbered through them, a contiguous range of units for each thread block.
#pragma once

#include <memory>
#include <type_traits>

#include "codec/block_scale.h"
#include "codec/floats.h"
#include "codec/random.h"
#include "cuda/device.cuh"
#include "rules/rule.h"

namespace torchao8::cuda {

constexpr int kBlocksPerProcessor = 3;  // thread blocks that are resident together

// The most that a kernel's arguments may have. Drivers of 2024 crashed where a graph got a node
// with more than 4,096 bytes of them; for a driver that does, build with NVCC_APPEND_FLAGS set to
// -DTORCHAO8_ARGUMENT_BYTES=4096. A step of many tensors then takes more launches.
#ifndef TORCHAO8_ARGUMENT_BYTES
#define TORCHAO8_ARGUMENT_BYTES 32764
#endif
constexpr int kArgumentBytes = TORCHAO8_ARGUMENT_BYTES;

// A number that lies on the device, or is known to the host.
struct Scalar {
  const void* address;  // null: value
  double value;
  bool is_double;
  TORCHAO8_HD double get() const {
    if (!address) return value;
    return is_double ? *static_cast<const double*>(address)
                     : double(*static_cast<const float*>(address));
  }
};

// The numbers that all tensors of a step share. What changes from step to step is read by the
// device, so that the host waits for nothing and a graph of the step can be replayed.
template <class Rule>
struct Numbers {
  typename Rule::Options options;  // but for lr and grad_scale, and what `rest` holds
  Scalar lr, grad_scale, found_inf;
  uint64_t seed;
  bool scaled_state;
  const double* rest = nullptr;  // where the numbers of the options lie, if the host has not
};

TORCHAO8_HD bool is_aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}
constexpr size_t bytes_of(FloatType type) {
  return type == FloatType::kFloat32 ? 4 : 2;
}

// What every entry of a table has.
struct Addresses {
  void* param;
  const void* grad;
  const float* step;      // the steps that the tensor has made
  const double* factors;  // null: all are 1
  uint32_t first_unit;    // number of its first unit in the launch
  FloatType param_type, grad_type;

  // Whether runs of so many elements, the launch's type being this one, can be loaded as words.
  bool fits(FloatType type, size_t elements) const {
    const size_t bytes = elements * bytes_of(type), word = bytes < 16 ? bytes : 16;
    return param_type == type && grad_type == type && is_aligned(param, word) &&
           is_aligned(grad, word);
  }
};

constexpr int kPerLane = 8;               // neighbouring elements that a lane takes
constexpr int kSpan = kLanes * kPerLane;  // elements that a warp takes at a time

// The elements of a tensor whose eights have numbers of 32 bits: 2^35, or 34 billion.
constexpr int64_t kMostOfFastPath = int64_t(kPerLane) << 32;

// Of 32-bit state: neighbouring elements of a thread, and elements of a unit.
constexpr int kPerThread = 4;
constexpr int kChunk = kPerThread * kLanes * 8;

// How many blocks a warp takes at a time: several short ones, one, or a part of a long one.
enum class Blocks { kShort, kSpan, kLong };

// The size of an array with an element for each of N states. C++ has no empty arrays.
template <int N>
constexpr int kSlots = N > 0 ? N : 1;

// Where a tensor's scalar states lie: in entries of rules that have some.
template <int kScalars>
struct ScalarAddresses {
  float* scalars[kScalars];
};
template <>
struct ScalarAddresses<0> {};

// N: states of the rule, kScalars: its scalar ones. A unit of work is what is numbered through a
// table's entries.
//
// Of 8-bit state. A unit is a block, or the neighbouring blocks of a row that fill a warp.
template <int N, int kScalars = 0>
struct BlockEntry : Addresses, ScalarAddresses<kScalars> {
  static constexpr bool kOneScale = false;
  uint8_t* codes[N];
  float* scales[N];
  int64_t rows, row_length, row_stride;
  uint64_t shard_offset;
  uint32_t blocks_per_row;
  // finish() sets these from the others.
  uint32_t units_per_row;
  uint32_t fast_units;  // the fast path takes the units before this one
  bool whole_spans;     // whether every unit has kSpan elements, right behind those of the last

  int64_t units() const { return rows * units_per_row; }

  void finish(FloatType type, int block_size) {
    const int unit = block_size > kSpan ? block_size : kSpan;
    units_per_row = uint32_t((row_length + unit - 1) / unit);
    bool fits_words = this->fits(type, kPerLane) && rows * row_length < kMostOfFastPath;
    for (int s = 0; s < N; s++) fits_words = fits_words && is_aligned(codes[s], kPerLane);
    // Of a single row, a vector, only the end may be of any length.
    fast_units = !fits_words                  ? 0
                 : rows == 1                  ? uint32_t(row_length / unit)
                 : row_length % kPerLane == 0 ? ~uint32_t(0)
                                              : 0;
    whole_spans = rows == 1 || row_length % kSpan == 0;
  }
};

// Of 32-bit state. A unit is a chunk of elements.
template <int N, int kScalars = 0>
struct ElementEntry : Addresses, ScalarAddresses<kScalars> {
  float* states[kSlots<N>];
  int64_t count;
  bool fast;  // whether runs of elements can be loaded as words; finish() sets it

  int64_t units() const { return (count + kChunk - 1) / kChunk; }

  void finish(FloatType type) {
    fast = this->fits(type, kPerThread);
    for (int s = 0; s < N; s++) fast = fast && is_aligned(states[s], kPerThread * sizeof(float));
  }
};

// The same where parameters are rounded stochastically, by the place of an element in the whole
// tensor: rows of a shard, as in BlockEntry, or one where there are no gaps between them.
template <int N, int kScalars = 0>
struct PlacedEntry : ElementEntry<N, kScalars> {
  int64_t row_length, row_stride;
  uint64_t shard_offset;

  void finish(FloatType type) {
    ElementEntry<N, kScalars>::finish(type);
    this->fast = this->fast && (row_length == this->count || row_length % kPerThread == 0);
  }
  TORCHAO8_HD uint64_t element(int64_t at) const {
    if (row_length == this->count) return shard_offset + uint64_t(at);
    const int64_t row = at / row_length;
    return shard_offset + uint64_t(row) * uint64_t(row_stride) + uint64_t(at - row * row_length);
  }
};

template <class Rule>
using BlockEntryOf = BlockEntry<Rule::kStates, kScalarsOf<Rule>>;
template <class Rule, bool kRounds>
using ElementEntryOf = std::conditional_t<kRounds, PlacedEntry<Rule::kStates, kScalarsOf<Rule>>,
                                          ElementEntry<Rule::kStates, kScalarsOf<Rule>>>;

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

constexpr int64_t kMostUnits = int64_t(1) << 31;  // of one launch, and of one tensor

// Fills a table and launches it when it is full.
template <class Rule, class Entry, class Launch>
class Filler {
 public:
  Filler(const Numbers<Rule>& numbers, int block_size, bool stochastic, Launch launch)
      : table_(std::make_unique<Table<Rule, Entry>>()), launch_(launch) {
    table_->numbers = numbers;
    table_->block_size = block_size;
    while (1 << table_->log_of_block < block_size) table_->log_of_block++;
    table_->stochastic = stochastic;
  }
  void add(Entry entry) {
    const int64_t units = entry.units();
    if (units == 0) return;
    if (table_->count == uint32_t(table_->kCapacity) || table_->units + units > kMostUnits) flush();
    entry.first_unit = table_->units;
    table_->entries[table_->count++] = entry;
    table_->units += uint32_t(units);
  }
  void flush() {
    if (table_->count > 0) launch_(*table_);
    table_->count = table_->units = 0;
  }

 private:
  std::unique_ptr<Table<Rule, Entry>> table_;
  Launch launch_;
};

// The rule of a tensor at a step. `options` are written to; so are `scalars`: the new ones.
template <class Rule, class Entry>
TORCHAO8_HD Rule rule_of(const Numbers<Rule>& numbers, const Entry& entry, int64_t step,
                         typename Rule::Options& options, float* scalars) {
  options = numbers.options;
  if (numbers.rest) set_numbers(options, numbers.rest);
  options.lr = numbers.lr.get();
  options.grad_scale = numbers.grad_scale.get();
  if (entry.factors) options.multiply(entry.factors);
  if constexpr (kScalarsOf<Rule> > 0) {
    for (int s = 0; s < kScalarsOf<Rule>; s++) scalars[s] = *entry.scalars[s];
  }
  return rule_at_step<Rule>(options, step, numbers.scaled_state, scalars);
}

// What a tensor's step makes of the numbers.
template <class Rule>
struct Prepared {
  Rule rule;
  bool is_bounded;  // whether the fast path can take blocks, if their numbers are in range, too
  uint64_t keys[kMaxStates], param_key;
  typename Rule::Options options;  // here, in shared memory: in registers they would spill

  template <class Entry>
  TORCHAO8_HD void set(const Numbers<Rule>& numbers, const Entry& entry) {
    const int64_t step = int64_t(*entry.step) + 1;
    for (int s = 0; s < Rule::kStates; s++)
      keys[s] = random_key(numbers.seed, uint64_t(step), uint64_t(s));
    param_key = random_key(numbers.seed, uint64_t(step), kParamStream);
    float scalars[kMaxScalars];
    rule = rule_of(numbers, entry, step, options, scalars);
    is_bounded = rule.is_bounded();
    if constexpr (Rule::kStates > 0) {
      for (int s = 0; s < Rule::kStates; s++) is_bounded = is_bounded && rule.unit[s] <= 1;
    }
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

// How many neighbouring entries have their Prepared in shared memory at a time. One thread prepares
// one entry, for all warps.
constexpr uint32_t kWindow = 32;

// Goes through a thread block's units. Each of its warps takes every kWarps-th one: worker(entry,
// prepared, unit, end) takes those of an entry from `unit` up to `end`, or the first few, and
// returns the one that comes next. Units count from the entry's first one.
template <class Rule, class Entry, class Worker>
__device__ __forceinline__ void for_each_unit(const Table<Rule, Entry>& table,
                                              Prepared<Rule>* window, Worker& worker) {
  const uint32_t share = (table.units + gridDim.x - 1) / gridDim.x;
  const uint64_t begin_of_share = uint64_t(share) * blockIdx.x;
  const uint32_t end_of_share =
      begin_of_share + share < table.units ? uint32_t(begin_of_share) + share : table.units;
  if (begin_of_share >= end_of_share) return;
  uint32_t begin = uint32_t(begin_of_share), first = find_entry(table, 0, begin);
  for (;;) {
    const uint32_t last = first + kWindow < table.count ? first + kWindow : table.count;
    const uint32_t end_of_window = end_of_entries(table, last);
    const uint32_t end = end_of_window < end_of_share ? end_of_window : end_of_share;
    __syncthreads();  // no warp needs the last window any more
    if (first + threadIdx.x < last)
      window[threadIdx.x].set(table.numbers, table.entries[first + threadIdx.x]);
    __syncthreads();
    uint32_t i = first;
    for (uint32_t unit = begin + threadIdx.x / kLanes; unit < end;) {
      i = find_entry(table, i, unit);
      const auto& entry = table.entries[i];
      const uint32_t end_of_entry = end_of_entries(table, i + 1);
      const uint32_t stop = (end_of_entry < end ? end_of_entry : end) - entry.first_unit;
      unit = worker(entry, window[i - first], unit - entry.first_unit, stop) + entry.first_unit;
    }
    begin = end;
    // Not a comparison of end_of_window, which would stay in a register for it: kernels have none
    // to spare.
    if (last == table.count || begin == end_of_share) return;
    first = last;
  }
}

}  // namespace torchao8::cuda
