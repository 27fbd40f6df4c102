// A block of 8-bit state: where it lies, and its extreme elements.
#pragma once

#include <type_traits>

#include "codec/block_scale.h"
#include "cuda/table.cuh"
#include "rules/update.h"

namespace torchao8::cuda {

template <int N, class Function>
TORCHAO8_HD void for_each_state(Function f) {
  if constexpr (N > 0) f(std::integral_constant<int, 0>());
  if constexpr (N > 1) f(std::integral_constant<int, 1>());
  if constexpr (N > 2) f(std::integral_constant<int, 2>());
}

// The same of all values of a rule.
template <class Rule, class Function>
TORCHAO8_HD void for_each_value(Function f) {
  for_each_state<Rule::kStates>(f);
  if constexpr (Rule::kValues > Rule::kStates) f(std::integral_constant<int, Rule::kStates>());
  static_assert(Rule::kValues <= Rule::kStates + 1);
}

struct BlockPosition {
  int64_t begin;  // of the block in the tensor
  int length;
  uint64_t first_element;  // global index, for the random numbers

  TORCHAO8_HD BlockPosition(int64_t row_length, uint32_t blocks_per_row, int block_size,
                            uint32_t block, uint64_t shard_offset, int64_t row_stride) {
    const uint32_t row = block / blocks_per_row;
    const int64_t column = int64_t(block - row * blocks_per_row) * block_size;
    begin = row * row_length + column;
    length = row_length - column < block_size ? int(row_length - column) : block_size;
    first_element = shard_offset + uint64_t(row) * uint64_t(row_stride) + uint64_t(column);
  }
  template <class Entry>
  TORCHAO8_HD BlockPosition(const Entry& e, int block_size, uint32_t block)
      : BlockPosition(e.row_length, e.blocks_per_row, block_size, block, e.shard_offset,
                      e.row_stride) {}
};

// Whether the magnitude of a float, or of NaN the bits, is not above that of another one.
TORCHAO8_HD bool is_within(float x, float extreme) {
  return (float_bits(x) & 0x7fffffffu) <= (float_bits(extreme) & 0x7fffffffu);
}

// A block's extreme element. Of floats, the largest as a signed integer is the largest positive
// one, the largest as an unsigned integer the negative one of largest magnitude, if there is one.
template <bool kSigned>
struct Extreme {
  int32_t positive = 0;
  uint32_t negative = 0;

  TORCHAO8_HD void add(float x) {
    const uint32_t u = float_bits(x);
    if (kSigned && int32_t(u) > positive) positive = int32_t(u);
    if (u > negative) negative = u;
  }
  // Whether all that this lane has added can be in a state.
  TORCHAO8_HD bool is_usable() const {
    const uint32_t most = float_bits(kOverflow);
    return kSigned ? uint32_t(positive) < most && (negative & 0x7fffffffu) < most : negative < most;
  }
  TORCHAO8_HD void add_all_of(const Extreme& other) {
    if (other.positive > positive) positive = other.positive;
    if (other.negative > negative) negative = other.negative;
  }
  // Of all that the lanes of the block have added. The positive one in a tie; NaN, or a negative
  // number in an unsigned state, if there is one.
  __device__ __forceinline__ float result(int lanes) const {
    const uint32_t low = largest_of_lanes(negative, lanes);
    if (!kSigned) return bits_float(low);
    const uint32_t high = largest_of_lanes(uint32_t(positive), lanes);
    return bits_float((low & 0x7fffffffu) > high ? low : high);
  }
  // Of numbers with signs, of all that the lanes of the block have added: the highest, or 0; the
  // lowest, which is any of them where none is negative.
  __device__ __forceinline__ float highest(int lanes) const {
    return bits_float(largest_of_lanes(uint32_t(positive), lanes));
  }
  __device__ __forceinline__ float lowest(int lanes) const {
    return bits_float(largest_of_lanes(negative, lanes));
  }
};

// The extreme elements of all states of a rule.
template <class Rule>
struct Extremes {
  Extreme<true> of_signed[Rule::kStates];
  Extreme<false> of_unsigned[Rule::kStates];

  template <class S>
  TORCHAO8_HD void add(S s, float x) {
    if constexpr (Rule::kSigned[s]) {
      of_signed[s].add(x);
    } else {
      of_unsigned[s].add(x);
    }
  }
  template <class S>
  TORCHAO8_HD bool is_usable(S s) const {
    if constexpr (Rule::kSigned[s]) {
      return of_signed[s].is_usable();
    } else {
      return of_unsigned[s].is_usable();
    }
  }
  TORCHAO8_HD void add_all_of(const Extremes& other) {
    for_each_state<Rule::kStates>([&](auto s) {
      of_signed[s].add_all_of(other.of_signed[s]);
      of_unsigned[s].add_all_of(other.of_unsigned[s]);
    });
  }
  template <class S>
  __device__ __forceinline__ float result(S s, int lanes) const {
    if constexpr (Rule::kSigned[s]) {
      return of_signed[s].result(lanes);
    } else {
      return of_unsigned[s].result(lanes);
    }
  }
};

}  // namespace torchao8::cuda
