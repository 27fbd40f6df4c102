// The step kernels, for any rule of rules/. A warp takes a block of 8-bit state, and nothing but
// the table of tensors, in the kernel's arguments, ties the warps of a launch together.
//
// An aligned block of up to 256 elements goes through registers, 8 neighbouring elements a lane:
// each byte is read and written once. Every other block (other block sizes, odd rows and addresses,
// mixed dtypes, an element that is not usable, a scale that is none) takes the slow path of the
// same bits, which reads twice.
#pragma once

#include "common/block_scale.h"
#include "common/floats.h"
#include "cuda/codec.cuh"
#include "cuda/device.cuh"

namespace torchao8::cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;  // of a thread block
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocksPerProcessor = 3;  // thread blocks that are resident together
constexpr int kPerLane = 8;
constexpr int kFastBlock = kLanes * kPerLane;
constexpr int kArgumentBytes = 32764;  // that a kernel may have

// What a step's numbers (step, lr, grad_scale) make of a rule, for one tensor. Computed on the
// device, so that the host need not wait for them.
template <class Rule>
struct Prepared {
  Rule rule;
  uint32_t skip;  // found_inf
  uint64_t keys[kMaxStates];
};

struct Places {
  void* param;
  const void* grad;
  uint32_t first_unit;  // number of its first block or chunk in the launch
  uint32_t index;       // of its Prepared
  FloatType param_type, grad_type;
};

template <int N>
struct BlockEntry : Places {
  uint8_t* codes[N];
  float* scales[N];
  int64_t row_length, row_stride;
  uint64_t shard_offset;
  uint32_t blocks_per_row;
  uint32_t fast;  // aligned, rows of multiples of 8, param and grad of the launch's type
};

template <int N>
struct ElementEntry : Places {
  float* states[N];
  int64_t count;
};

// The tensors of a launch.
template <class Entry>
struct Table {
  static constexpr int kCapacity = (kArgumentBytes - 32) / int(sizeof(Entry));
  Entry entries[kCapacity];
  uint32_t count;
  uint32_t units;
  int32_t block_size;
  bool stochastic;
};

// ---- floats of any type ----------------------------------------------------------------------

TORCHAO8_HD float load_as(FloatType type, const void* from, int64_t i) {
  switch (type) {
    case FloatType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(from)[i]);
    case FloatType::kFloat16:
      return to_float(static_cast<const Half*>(from)[i]);
    default:
      return static_cast<const float*>(from)[i];
  }
}
TORCHAO8_HD void store_as(FloatType type, void* to, int64_t i, float x) {
  switch (type) {
    case FloatType::kBFloat16:
      static_cast<BFloat16*>(to)[i] = to_bfloat16(x);
      break;
    case FloatType::kFloat16:
      static_cast<Half*>(to)[i] = to_half(x);
      break;
    default:
      static_cast<float*>(to)[i] = x;
  }
}

// Eight neighbouring elements, in 16-byte words.
template <class T>
struct Eight {
  static constexpr int kWords = int(sizeof(T)) / 2;
  uint4 words[kWords];

  TORCHAO8_HD uint32_t word(int i) const {
    const uint4& q = words[i / 4];
    return i % 4 == 0 ? q.x : i % 4 == 1 ? q.y : i % 4 == 2 ? q.z : q.w;
  }
  TORCHAO8_HD void set_word(int i, uint32_t w) {
    uint4& q = words[i / 4];
    (i % 4 == 0 ? q.x : i % 4 == 1 ? q.y : i % 4 == 2 ? q.z : q.w) = w;
  }
  TORCHAO8_HD void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; i++) words[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  TORCHAO8_HD void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; i++) reinterpret_cast<uint4*>(to)[i] = words[i];
  }
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return bits_float(word(i));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return bits_float(i % 2 ? word(i / 2) & 0xffff0000u : word(i / 2) << 16);
    } else {
      return widen_half(uint16_t(word(i / 2) >> 16 * (i % 2)));
    }
  }
  __device__ __forceinline__ void set_pair(int pair, float low, float high) {
    if constexpr (sizeof(T) == 4) {
      set_word(2 * pair, float_bits(low));
      set_word(2 * pair + 1, float_bits(high));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      set_word(pair, round_to_bfloat16s(low, high));
    } else {
      set_word(pair, round_to_halves(low, high));
    }
  }
};

// ---- the extreme element of a block ----------------------------------------------------------

// Of floats, one a lane at a time: the largest as a signed integer is the largest positive one, the
// largest as an unsigned integer the negative one of largest magnitude, if there is one.
template <bool kSigned>
struct WarpExtreme {
  int32_t positive = 0;
  uint32_t negative = 0;

  TORCHAO8_HD void add(float x) {
    const uint32_t u = float_bits(x);
    if (kSigned && int32_t(u) > positive) positive = int32_t(u);
    if (u > negative) negative = u;
  }
  // The positive one in a tie; NaN, or a negative number in an unsigned state, if there is one.
  __device__ __forceinline__ float result() const {
    const uint32_t low = largest_of_warp(negative);
    if (!kSigned) return bits_float(low);
    const uint32_t high = largest_of_warp(uint32_t(positive));
    return bits_float((low & 0x7fffffffu) > high ? low : high);
  }
};

// ---- one block -------------------------------------------------------------------------------

template <int N, class Function>
TORCHAO8_HD void for_each_state(Function f) {
  f(std::integral_constant<int, 0>());
  if constexpr (N > 1) f(std::integral_constant<int, 1>());
  if constexpr (N > 2) f(std::integral_constant<int, 2>());
}

struct BlockPlace {
  int64_t begin;  // of the block in the tensor
  int length;
  uint64_t first_element;  // global index, for the random numbers
  TORCHAO8_HD BlockPlace(int64_t row_length, int64_t row_stride, uint64_t shard_offset,
                         uint32_t blocks_per_row, int block_size, uint32_t block) {
    const uint32_t row = block / blocks_per_row;
    const int64_t column = int64_t(block - row * blocks_per_row) * block_size;
    begin = row * row_length + column;
    length = row_length - column < block_size ? int(row_length - column) : block_size;
    first_element = shard_offset + uint64_t(row) * uint64_t(row_stride) + uint64_t(column);
  }
};

// Any block. A lane takes every 32nd element, computes the moments once for the extremes and again
// to use them; only the lane itself reads what it writes.
template <class Rule>
__device__ __noinline__ void slow_block(const BlockEntry<Rule::kStates>& entry,
                                        const Prepared<Rule>& prepared, const Tables& tables,
                                        int block_size, bool stochastic, uint32_t block, int lane) {
  constexpr int N = Rule::kStates;
  const BlockPlace place(entry.row_length, entry.row_stride, entry.shard_offset,
                         entry.blocks_per_row, block_size, block);
  float scale[N];
  for_each_state<N>([&](auto s) { scale[s] = entry.scales[s][block]; });
  const Rule rule = prepared.rule.with_scales(scale);

  // The new moments; whether the element is updated.
  const auto moments = [&](int i, float* state) {
    const int64_t at = place.begin + i;
    float old[N];
    Real x[N], p(0.0f);
    for_each_state<N>([&](auto s) {
      old[s] = decode<Rule::kSigned[s]>(tables, entry.codes[s][at]);
      x[s] = Real(old[s]);
    });
    if constexpr (Rule::kMomentsNeedParam) p = Real(load_as(entry.param_type, entry.param, at));
    rule.template moments<true>(p, Real(load_as(entry.grad_type, entry.grad, at)), x);
    bool good = true;
    for_each_state<N>([&](auto s) { good = good && usable<Rule::kSigned[s]>(x[s].x); });
    for_each_state<N>([&](auto s) {
      state[s] = good ? x[s].x : (Real(old[s]) * Real(scale[s] / rule.unit[s])).x;
    });
    return good;
  };

  float extreme[N], inverse[N];
  {
    WarpExtreme<true> of_signed[N];
    WarpExtreme<false> of_unsigned[N];
    for (int i = lane; i < place.length; i += kLanes) {
      float state[N];
      moments(i, state);
      for_each_state<N>([&](auto s) {
        if constexpr (Rule::kSigned[s]) {
          of_signed[s].add(state[s]);
        } else {
          of_unsigned[s].add(state[s]);
        }
      });
    }
    for_each_state<N>([&](auto s) {
      extreme[s] = Rule::kSigned[s] ? of_signed[s].result() : of_unsigned[s].result();
      inverse[s] = inverse_of<Rule::kSigned[s]>(extreme[s]);
    });
  }
  bool encodes[N];
  BlockRandom random[N];
  for_each_state<N>([&](auto s) {
    encodes[s] = has_scale<Rule::kSigned[s]>(extreme[s], rule.unit[s]);
    if (!Rule::kSigned[s]) random[s].start(prepared.keys[s], place.first_element);
  });
  warp_barrier();  // every lane has read the scales
  for (int i = lane; i < place.length; i += kLanes) {
    const int64_t at = place.begin + i;
    float state[N];
    if (moments(i, state)) {
      Real x[N];
      for_each_state<N>([&](auto s) { x[s] = Real(state[s]); });
      const Real p(load_as(entry.param_type, entry.param, at));
      store_as(entry.param_type, entry.param, at, rule.template update<true>(p, x).x);
    }
    for_each_state<N>([&](auto s) {
      uint32_t code = zero_code<Rule::kSigned[s]>();
      if (encodes[s] && !Rule::kSigned[s] && stochastic) {
        code = encode_stochastic(tables, state[s], inverse[s], one_to_two(random[s](uint32_t(i))));
      } else if (encodes[s]) {
        code = encode_nearest<Rule::kSigned[s]>(tables, state[s], inverse[s]);
      }
      entry.codes[s][at] = uint8_t(code);
    });
  }
  if (lane == 0) {
    for_each_state<N>([&](auto s) {
      const float product = extreme[s] * rule.unit[s];
      const bool finite = usable<Rule::kSigned[s]>(extreme[s]) && usable<true>(product);
      entry.scales[s][block] = encodes[s] ? product : finite ? 0.0f : bits_float(0x7fc00000u);
    });
  }
}

// An aligned block of 256 elements or fewer, of a row that is a multiple of 8. False: an element is
// not usable or a scale is none, and nothing has been written.
template <class Rule, class T>
__device__ __forceinline__ bool fast_block(const BlockEntry<Rule::kStates>& entry,
                                           const Rule& unscaled, const Prepared<Rule>& prepared,
                                           const Tables& tables, bool stochastic, uint32_t block,
                                           int lane) {
  constexpr int N = Rule::kStates;
  const BlockPlace place(entry.row_length, entry.row_stride, entry.shard_offset,
                         entry.blocks_per_row, kFastBlock, block);
  // Lanes past a row's end repeat its last 8 elements: what they write is the same.
  const int last = place.length - kPerLane;
  const int first = lane * kPerLane < last ? lane * kPerLane : last;
  const int64_t at = place.begin + first;
  T* param = static_cast<T*>(entry.param) + at;
  float scale[N];
  uint2 codes[N];
  Eight<T> p, g;
  for_each_state<N>([&](auto s) {
    scale[s] = entry.scales[s][block];
    codes[s] = *reinterpret_cast<const uint2*>(entry.codes[s] + at);
  });
  g.load(static_cast<const T*>(entry.grad) + at);
  p.load(param);
  warp_barrier();  // every lane has read before any writes; and the loads stay up here

  const Rule rule = unscaled.with_scales(scale);
  float moments[kPerLane][N];
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    Real state[N];
    for_each_state<N>([&](auto s) {
      const uint32_t word = i < 4 ? codes[s].x : codes[s].y;
      state[s] = Real(decode<Rule::kSigned[s]>(tables, permute_bytes(word, 0, 0x4440 + i % 4)));
    });
    rule.template moments<true>(Real(p.get(i)), Real(g.get(i)), state);
    for_each_state<N>([&](auto s) { moments[i][s] = state[s].x; });
  }
  float extreme[N], inverse[N];
  bool good = true;
  for_each_state<N>([&](auto s) {
    WarpExtreme<Rule::kSigned[s]> warp;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) warp.add(moments[i][s]);
    extreme[s] = warp.result();
    inverse[s] = inverse_of<Rule::kSigned[s]>(extreme[s]);
    good = good && usable<Rule::kSigned[s]>(scale[s]) && usable<true>(rule.decay[s]) &&
           (has_scale<Rule::kSigned[s]>(extreme[s], rule.unit[s]) || extreme[s] == 0);
  });
  if (!good) return false;  // the same in all lanes

#pragma unroll
  for (int i = 0; i < kPerLane; i += 2) {
    float updated[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      BoundedReal state[N];
      for_each_state<N>([&](auto s) { state[s] = BoundedReal(moments[i + j][s]); });
      updated[j] = rule.template update<true>(BoundedReal(p.get(i + j)), state).x;
    }
    p.set_pair(i / 2, updated[0], updated[1]);
  }
  p.store(param);
  for_each_state<N>([&](auto s) {
    uint32_t code[kPerLane];
    if (!Rule::kSigned[s] && stochastic) {  // the same in all lanes
      BlockRandom random;
      random.start(prepared.keys[s], place.first_element);
      const uint32_t j = uint32_t(first) / 8;  // the elements 8 * j to 8 * j + 7 of the block
      const uint32_t start = random.c0 + random.c2 * j, slope = random.c1 + random.c3 * j;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        const float u = one_to_two(start + slope * lane_factor(uint32_t(i)));
        code[i] = encode_stochastic(tables, moments[i][s], inverse[s], u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; i++)
        code[i] = encode_nearest<Rule::kSigned[s]>(tables, moments[i][s], inverse[s]);
    }
    uint32_t half[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t* c = code + 4 * h;
      half[h] = permute_bytes(permute_bytes(c[0], c[1], 0x0040), permute_bytes(c[2], c[3], 0x0040),
                              0x5410);
    }
    *reinterpret_cast<uint2*>(entry.codes[s] + at) = make_uint2(half[0], half[1]);
    if (lane == 0) entry.scales[s][block] = (Real(extreme[s]) * Real(rule.unit[s])).x;
  });
  return true;
}

// ---- kernels ---------------------------------------------------------------------------------

// The entry whose units hold number `unit`, from entry i on.
template <class Entry>
TORCHAO8_HD uint32_t find_entry(const Table<Entry>& table, uint32_t i, uint32_t unit) {
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

// A contiguous share of the units for each thread block, so that a warp rarely meets a new tensor.
struct Share {
  uint32_t begin, end;
  TORCHAO8_HD Share(uint32_t units, uint32_t part, uint32_t parts) {
    const uint64_t share = (uint64_t(units) + parts - 1) / parts;
    const uint64_t first = share * part, last = first + share;
    begin = first < units ? uint32_t(first) : units;
    end = last < units ? uint32_t(last) : units;
  }
};

__device__ __forceinline__ void copy_tables(Tables& to, const Tables& from) {
  const uint4* source = reinterpret_cast<const uint4*>(&from);
  uint4* target = reinterpret_cast<uint4*>(&to);
  for (uint32_t i = threadIdx.x; i < sizeof(Tables) / sizeof(uint4); i += kThreads)
    target[i] = source[i];
  __syncthreads();
}

// T: the type that fast entries have.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor -
                                                (Rule::kStates > 2 || Rule::kMomentsNeedParam))
    step_blocks(const __grid_constant__ Table<BlockEntry<Rule::kStates>> table,
                const Prepared<Rule>* prepared, const Tables* source) {
  TORCHAO8_SHARED(Tables, tables);
  copy_tables(tables, *source);
  const int lane = int(threadIdx.x % kLanes);
  const Share share(table.units, blockIdx.x, gridDim.x);
  uint32_t i = 0, end_of_entry = 0;
  Rule rule = {};
  bool skip = false;
  for (uint32_t unit = share.begin + threadIdx.x / kLanes; unit < share.end; unit += kWarps) {
    if (unit >= end_of_entry) {
      i = find_entry(table, i, unit);
      end_of_entry = i + 1 < table.count ? table.entries[i + 1].first_unit : table.units;
      const Prepared<Rule>& mine = prepared[table.entries[i].index];
      rule = mine.rule;
      skip = mine.skip != 0;
    }
    if (skip) continue;
    const auto& entry = table.entries[i];
    const uint32_t block = unit - entry.first_unit;
    if (entry.fast && fast_block<Rule, T>(entry, rule, prepared[entry.index], tables,
                                          table.stochastic, block, lane)) {
      continue;
    }
    slow_block<Rule>(entry, prepared[entry.index], tables, table.block_size, table.stochastic,
                     block, lane);
    end_of_entry = 0;  // read the rule again: keeping it across the call would take a stack
  }
}

// 32-bit state. A unit is a chunk of elements, a thread takes 4 neighbouring ones at a time.
constexpr int kChunk = 4 * kLanes * 8;

template <class Rule>
__device__ __forceinline__ void step_element(const ElementEntry<Rule::kStates>& entry,
                                             const Rule& rule, int64_t at) {
  constexpr int N = Rule::kStates;
  Real old[N], state[N];
  for_each_state<N>([&](auto s) { state[s] = old[s] = Real(entry.states[s][at]); });
  const Real p(load_as(entry.param_type, entry.param, at));
  rule.template moments<false>(p, Real(load_as(entry.grad_type, entry.grad, at)), state);
  bool good = true;
  for_each_state<N>([&](auto s) { good = good && usable<Rule::kSigned[s]>(state[s].x); });
  if (!good) return;
  for_each_state<N>([&](auto s) { entry.states[s][at] = state[s].x; });
  store_as(entry.param_type, entry.param, at, rule.template update<false>(p, state).x);
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_elements(const __grid_constant__ Table<ElementEntry<Rule::kStates>> table,
                  const Prepared<Rule>* prepared) {
  const int lane = int(threadIdx.x % kLanes);
  const Share share(table.units, blockIdx.x, gridDim.x);
  uint32_t i = 0;
  for (uint32_t unit = share.begin + threadIdx.x / kLanes; unit < share.end; unit += kWarps) {
    i = find_entry(table, i, unit);
    const auto& entry = table.entries[i];
    const Prepared<Rule>& mine = prepared[entry.index];
    if (mine.skip) continue;
    const Rule rule = mine.rule;
    const int64_t begin = int64_t(unit - entry.first_unit) * kChunk;
    const int64_t end = begin + kChunk < entry.count ? begin + kChunk : entry.count;
#pragma unroll 2
    for (int64_t at = begin + lane; at < end; at += kLanes) step_element(entry, rule, at);
  }
}

}  // namespace torchao8::cuda
