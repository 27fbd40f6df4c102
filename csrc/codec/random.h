// The random numbers of stochastic rounding: a function of (seed, step, global element index), the
// same on every device, so that neither sharding nor the order of execution nor a restart changes
// them.
//
// A block gets four 32-bit coefficients by hashing. Its element 8 * j + l, l < 8, draws
//     h = c0 + c1 * t[l] + (c2 + c3 * t[l]) * j  (mod 2^23),
// of which the top 14 bits are used. With random coefficients the draws of any two elements of a
// parameter are uniform and independent but for low bits that are not used (multilinear hashing:
// Carter and Wegman, "Universal classes of hash functions", 1979), so that rounding errors add up
// as those of independent draws do, in variance; their sums have heavier tails, a lane of 32
// elements now and then being rounded one way. Three draws at equal distances that are multiples of
// 8 are an arithmetic sequence. A vector of 8 or 16 lanes goes on to its next elements by one
// addition, and 23 bits are a float's mantissa: no shift is needed to make one.
//
// A bfloat16 parameter that is rounded stochastically takes the same hash (mod 2^32) under a key of
// its own, of which the top 16 bits are used. With c0 any, one hash is uniform; given it, another
// differs from it by a uniform multiple of the largest power of two that divides the differences of
// their factors. No two t differ by a multiple of 8, and two j by less than 256, so that at most
// the low 7 bits of the difference are fixed: the top 16 bits of two draws are uniform and
// independent. Where the state has 32 bits there are no blocks, and these are of 256 elements of
// the whole tensor (ElementRandom), whatever part of it is at hand.
//
// Two parameters share draws: of the same state, at the same step, of elements with the same index
// in blocks that begin at the same element. Each is rounded without bias all the same, and as many
// independent draws make up any sum over one of them; only a sum over both at equal indices could
// tell. A key of each parameter would need an identity that is the same in every grouping, order,
// wrapper, sharding and after a restart. Positions change with groups, names with wrappers and are
// optional, and shapes are alike where draws are shared. A group has one: its seed.
#pragma once

#include "macros.h"

namespace torchao8 {

// Stafford's variant 13 of the MurmurHash3 finalizer: every input bit reaches every output bit.
TORCHAO8_HD uint64_t mix_bits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// One key serves all tensors of a step and seed. `stream` tells the states of one parameter, 0 to
// 2, and the parameter itself apart.
constexpr uint64_t kParamStream = 3;
TORCHAO8_HD uint64_t random_key(uint64_t seed, uint64_t step, uint64_t stream) {
  return mix_bits(mix_bits(seed + 0x9e3779b97f4a7c15u) ^ mix_bits(4 * step + stream));
}

// t[l]: digits of the square roots of the primes, the last three bits replaced by l (so that no
// difference is a multiple of 8, which would repeat low bits).
// Packed, so that a GPU needs no memory to look one up.
TORCHAO8_HD constexpr uint32_t lane_factor(uint32_t l) {
  const uint64_t four = l < 4 ? 0xa54b3c6abb616a08u : 0x5be71f869b05510cu;
  return uint32_t(four >> 16 * (l % 4)) & 0xffff;
}
struct LaneFactors {
  alignas(32) uint32_t t[8];
  constexpr LaneFactors() : t() {
    for (uint32_t l = 0; l < 8; l++) t[l] = lane_factor(l);
  }
};
constexpr LaneFactors kLaneFactors;

struct BlockRandom {
  uint32_t c0, c1, c2, c3;

  // first_element: global index of the block's first element.
  TORCHAO8_HD void start(uint64_t key, uint64_t first_element) {
    const uint64_t z = mix_bits(key + 0x9e3779b97f4a7c15u * first_element);
    const uint64_t w = mix_bits(z + 0x9e3779b97f4a7c15u);
    c0 = uint32_t(z);
    c1 = uint32_t(z >> 32);
    c2 = uint32_t(w);
    c3 = uint32_t(w >> 32);
  }

  TORCHAO8_HD uint32_t operator()(uint32_t i) const {
    const uint32_t t = lane_factor(i % 8), j = i / 8;
    return c0 + c1 * t + (c2 + c3 * t) * j;
  }

  // The same numbers, counted from element 8 * j on.
  TORCHAO8_HD BlockRandom from(uint32_t j) const { return {c0 + c2 * j, c1 + c3 * j, c2, c3}; }
};

// Of elements that are in no block, by their global index.
constexpr uint32_t kRandomBlock = 256;
struct ElementRandom {
  uint64_t key, first = ~uint64_t(0);  // of the block at hand: none
  BlockRandom block = {};

  TORCHAO8_HD explicit ElementRandom(uint64_t k) : key(k) {}
  TORCHAO8_HD uint32_t operator()(uint64_t element) {
    const uint32_t i = uint32_t(element % kRandomBlock);
    if (first != element - i) {
      first = element - i;
      block.start(key, first);
    }
    return block(i);
  }
};

// A hash as a float that lies as far above 1 as below 2, of 14 random bits: 1 + (r + 1/2) / 2^14.
// Fourteen, because then the position of a block's extreme element, which is off by up to a unit in
// its last place or two, gives code 255 with each of these numbers (PositionLines).
constexpr uint32_t kRandomMask = 0x007ffe00u;
constexpr uint32_t kOneBits = 0x3f800100u;
TORCHAO8_HD float one_to_two(uint32_t hash) {
  return bits_float((hash & kRandomMask) | kOneBits);
}

}  // namespace torchao8
