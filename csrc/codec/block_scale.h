// A block's extreme element, its scale, and what its values are multiplied by before encoding.
#pragma once

#include "codec/dynamic_map.h"

namespace torchao8 {

// Whether a number can be a block's extreme element: below 2^126, and not negative in an unsigned
// state. The bits of a negative number, and of NaN, are above those of 2^126.
template <bool kSigned>
TORCHAO8_HD bool usable(float x) {
  return (float_bits(x) & (kSigned ? 0x7fffffffu : 0xffffffffu)) < float_bits(kOverflow);
}

// The number of largest magnitude that can be an extreme element, with the sign of x, if x is
// larger than that; else x.
constexpr float kLargestUsable = 0x1.fffffep125f;
TORCHAO8_HD float clamp_to_usable(float x) {
  return x > kLargestUsable ? kLargestUsable : x < -kLargestUsable ? -kLargestUsable : x;
}

// A stored number in units, where a step leaves the state as it is. A format whose codes may lie
// above the number they were rounded from takes this one: what was almost 2^126 would be no number
// any more, and make that of its block.
TORCHAO8_HD float kept_value(float old, float scale, float unit) {
  return clamp_to_usable(old * clamp_to_usable(scale / unit));
}

// What a block's values are multiplied by before encoding: zero where its scale counts as zero, or
// cannot be one (a corrupt state stays visibly corrupt).
template <bool kSigned>
TORCHAO8_HD float inverse_of(float extreme) {
  if (!usable<kSigned>(extreme) || std::fabs(extreme) < kMinScale) return 0.0f;
  return 1.0f / extreme;
}

// Whether a block of this extreme element, in these units, has a scale: neither it nor the scale is
// too large, or so small that the scale counts as zero.
template <bool kSigned>
TORCHAO8_HD bool has_scale(float extreme, float unit) {
  const auto within = [](float x) TORCHAO8_LAMBDA {
    const uint32_t magnitude = float_bits(x) & 0x7fffffffu, least = float_bits(kMinScale);
    return magnitude - least < float_bits(kOverflow) - least;
  };
  return within(extreme) && within(extreme * unit) && usable<kSigned>(extreme);
}

// The scale to store for an extreme element: zero where it counts as zero, NaN where it is none.
template <bool kSigned>
TORCHAO8_HD float scale_of(float extreme, float unit) {
  if (has_scale<kSigned>(extreme, unit)) return extreme * unit;
  return usable<kSigned>(extreme) && usable<true>(extreme * unit) ? 0.0f : bits_float(0x7fc00000u);
}

// The extreme element of a whole tensor as an integer, so that those of its parts are compared by
// one maximum: magnitude first, then whether it is positive. The key is 0 if all elements are 0. A
// number that cannot be an extreme element has the largest key.
constexpr int64_t kNoExtreme = 0xffffffff;
template <bool kSigned>
TORCHAO8_HD int64_t key_of_extreme(float x) {
  if (!usable<kSigned>(x)) return kNoExtreme;
  if (x == 0.0f) return 0;
  const uint32_t u = float_bits(x);
  return int64_t(kSigned ? (u << 1) | (~u >> 31) : u);
}
template <bool kSigned>
TORCHAO8_HD float extreme_of_key(int64_t key) {
  const uint32_t u = uint32_t(key);
  return bits_float(kSigned ? (u >> 1) | (~u << 31) : u);
}

}  // namespace torchao8
