// The random numbers of stochastic rounding: a function of (seed, step, global element index), the
// same on every device, so that neither sharding nor the order of execution nor a restart changes
// them.
//
// A block gets three 32-bit coefficients by hashing; its element i draws
//     h(i) = c0 + c1 * i + c2 * i^2  (mod 2^23),
// of which the top 16 bits are used. With random coefficients such a polynomial is uniform and its
// values are independent in pairs, and in threes but for the lowest bits (polynomial hashing:
// Carter and Wegman, "Universal classes of hash functions", 1979). A vector loop produces it with
// two additions, and 23 bits are a float's mantissa: no shift is needed to make one of it.
#pragma once

#include "common/macros.h"

namespace torchao8 {

// Stafford's variant 13 of the MurmurHash3 finalizer: every input bit reaches every output bit.
TORCHAO8_HD uint64_t mix_bits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// One key serves all tensors of a step. `stream` tells the states of one parameter apart.
TORCHAO8_HD uint64_t random_key(uint64_t seed, uint64_t step, uint64_t stream) {
  return mix_bits(mix_bits(seed + 0x9e3779b97f4a7c15u) ^ mix_bits(4 * step + stream));
}

struct BlockRandom {
  uint32_t c0, c1, c2;

  // first_element: global index of the block's first element.
  TORCHAO8_HD void start(uint64_t key, uint64_t first_element) {
    const uint64_t z = mix_bits(key + 0x9e3779b97f4a7c15u * first_element);
    c0 = uint32_t(z);
    c1 = uint32_t(z >> 32);
    c2 = uint32_t((z * 0xd6e8feb86659fd93u) >> 32);
  }

  TORCHAO8_HD uint32_t operator()(uint32_t i) const { return c0 + (c1 + c2 * i) * i; }
};

// A hash as a float in [1, 2) of 16 random bits. Sixteen, because a code position below 256 has at
// least 16 fraction bits in a float, so that the sum of the two is exact and the rounding unbiased.
constexpr uint32_t kRandomMask = 0x007fff80u;
constexpr uint32_t kOneBits = 0x3f800000u;
TORCHAO8_HD float one_to_two(uint32_t hash) {
  return bits_float((hash & kRandomMask) | kOneBits);
}

}  // namespace torchao8
