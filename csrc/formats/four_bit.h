// The 4-bit format of state, as arithmetic for host and device. Two numbers share a byte, the first
// one in its low half. Neither direction needs a table.
//
// An unsigned state, an average of squares, is a float of three exponent bits and one mantissa bit.
// With code n = 2 e + k,
//     value = scale * 2^(e - 7) (1 + k / 2),
// from 1/128 to 1.5, the scale being a power of two. There is no zero, so no second moment becomes
// one; where the scale is 0 all codes are. Encoding adds bits to those of the float in units of the
// scale and drops the lowest 22: random bits, or one half to round to nearest. The bits of a float
// are linear in its value between two powers of two, so a random number rounds up with a chance
// that is linear in the distance between codes, everywhere.
//
// A signed state is a number of steps of an eighth of its scale, -7 .. 8:
//     value = root * scale * (n - 7) / 8.
// The root is that of the element's stored second moment, where the rule has one (kRootOf), else 1:
// m / sqrt(v) is of one magnitude in a block of which m is not. The scale has the sign of the
// quotient of largest magnitude, and there are eight steps in this direction and seven in the
// other. Its magnitude is the least at which all quotients lie within these: that of the extreme
// one, or 8/7 of the largest on the other side. Else what is larger than seven eighths of the
// extreme would be cut to them, at every step. Zero is exact, and so is the extreme quotient where
// the scale is made of it.
//
// Quotients are rounded to nearest. A state without roots is rounded stochastically: to nearest,
// what is below a sixteenth of the largest number would become 0 at every step, and a slow average
// would stay there.
#pragma once

#include "codec/block_scale.h"
#include "formats/mulaw.h"

namespace torchao8 {

// Of an unsigned state.
struct FourBitSquares {
  static constexpr int kShift = 22;                          // bits of the float that are dropped
  static constexpr uint32_t kFirst = 240, kLast = 240 + 15;  // the rest of the first and last codes
  static constexpr float kTop = 1.5f;

  // The value of a code at scale 1.
  static TORCHAO8_HD float decode(uint32_t code) { return bits_float((kFirst + code) << kShift); }

  // What is added before the lowest bits are dropped.
  static constexpr uint32_t kHalf = 1u << (kShift - 1);  // to nearest, ties up
  static TORCHAO8_HD uint32_t draw(uint32_t hash) { return hash >> (32 - kShift); }

  // The code of x, which is not negative. What is below the first value gets its code, and what the
  // tolerance of the scale has left above the last one gets that code.
  static TORCHAO8_HD uint32_t encode(float x, float inverse, uint32_t added) {
    const uint32_t rounded = (float_bits(x * inverse) + added) >> kShift;
    return (rounded < kFirst ? kFirst : rounded > kLast ? kLast : rounded) - kFirst;
  }

  // The scale for the largest number, in these units: 0 where it would be below the smallest normal
  // float, NaN where the number is none. It is below 2^126, as all scales are, which is less than
  // needed only where a number is almost 2^126 itself and its unit almost 1.
  static TORCHAO8_HD float scale_of(float largest, float unit) {
    if (!usable<false>(largest)) return bits_float(0x7fc00000u);
    const float exact = largest * unit * (1.0f / kTop);
    if (exact < kMinScale) return 0.0f;
    return exact < 0x1p125f ? round_up_to_bits<0>(exact) : 0x1p125f;
  }

  // What numbers in these units are multiplied by before encoding, exact as the scale is a power of
  // two. Also of a scale that is NaN: the block is then not encoded, its codes are 0.
  static TORCHAO8_HD float inverse_of(float scale, float unit) {
    return scale > 0.0f ? unit / scale : 0.0f;
  }
};

// Of a signed state.
struct FourBitLevels {
  static constexpr uint32_t kZero = 7;
  // To this float integers of a few bits are added exactly, and all else is rounded to nearest, a
  // tie to an even number. The integer is then in its lowest bits.
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kLeast = 0x1p-123f;  // the inverse of anything smaller may be infinite
  static constexpr float kLargest = 0x1.fffffp125f;     // scale of 20 bits behind the point
  static constexpr float kRoundings = 1.0f + 0x1p-20f;  // more than a stored number goes through

  // The value of a code at scale 1 and root 1, exactly.
  static TORCHAO8_HD float decode(uint32_t code) { return float(int32_t(code) - 7) * 0.125f; }

  // To this float, steps are added with 16 bits behind the point. Random bits are added to these.
  static constexpr float kFine = 0x1.8p7f;
  static TORCHAO8_HD uint32_t draw(uint32_t hash) { return hash >> 16; }

  // The code of a quotient, to nearest.
  static TORCHAO8_HD uint32_t encode(float quotient, float inverse) {
    const float rounded = fma(quotient, inverse, kRound);
    return code_of(int32_t(float_bits(rounded) - float_bits(kRound)));
  }
  // The same, with what is drawn: up with a chance that is linear in the distance.
  static TORCHAO8_HD uint32_t encode(float quotient, float inverse, uint32_t drawn) {
    const float fine = fma(quotient, inverse, kFine);
    return code_of(int32_t(float_bits(fine) - float_bits(kFine) + drawn) >> 16);
  }

  // The scale for the highest and the lowest quotient of a block, in units: 0 where it counts as
  // zero, NaN where it would be none.
  //
  // Values that were encoded and decoded get the same values again, however a few roundings between
  // the two went:
  // - With one of 8 eighths of the scale, no other side is above 7 of them. 8/7 of it are not above
  //   the extreme but by roundings, for which kRoundings is there. So the scale is the extreme's.
  // - Else the scale was rounded, to 20 bits behind the point: by at most 2^-21 of it. So what it
  //   was made of lies within 2^-18 of level -7, and gets its code whatever is drawn. The extreme
  //   has got 7. Both are exact, as 7 eighths of 21 bits fit into a float, and 8/7 of them, rounded
  //   to 20 bits, are the scale again. It may have the other sign, and each code then that of the
  //   other level.
  static TORCHAO8_HD float scale_of(float highest, float lowest, float unit) {
    if (!usable<true>(highest) || !usable<true>(lowest)) return bits_float(0x7fc00000u);
    const bool is_positive = highest >= -lowest;
    const float extreme = is_positive ? highest : lowest, other = is_positive ? -lowest : highest;
    const float needed = other * (8.0f / 7.0f);  // negative: all quotients have one sign
    float scale = extreme * unit;
    if (!usable<true>(scale)) return bits_float(0x7fc00000u);
    if (needed > std::fabs(extreme) * kRoundings) {
      scale = rounded(needed * unit);
      scale = scale < kLargest ? scale : kLargest;
      if (!is_positive) scale = -scale;
    }
    return std::fabs(extreme) < kLeast || std::fabs(scale) < kMinScale ? 0.0f : scale;
  }

  // To 20 bits behind the point.
  static TORCHAO8_HD float rounded(float scale) {
    return bits_float((float_bits(scale) + 4u) & ~7u);
  }

  // What quotients in units are multiplied by before encoding. Of a scale that is 0 or NaN: 0.
  static TORCHAO8_HD float inverse_of(float scale, float unit) {
    return std::fabs(scale) > 0.0f ? reciprocal(scale) * (8.0f * unit) : 0.0f;
  }

 private:
  // There is no -8.
  static TORCHAO8_HD uint32_t code_of(int32_t steps) {
    return steps < -7 ? 0u : uint32_t(steps + 7);
  }
};

// The roots of a block's second moments by their codes, each rounded once. A scale times a value is
// 2^(e / 2) with e = code + 2 * (exponent of the scale) - 14, if a half code counts as a factor of
// 1.5: so four mantissas and a power of two make all of them.
struct FourBitRoots {
  uint32_t base;  // what is added to a code

  // sqrt(2), sqrt(3), 2 and sqrt(6), and the reciprocals of these floats.
  static constexpr uint32_t kRoots[4] = {0x3fb504f3u, 0x3fddb3d7u, 0x40000000u, 0x401cc471u};
  static constexpr uint32_t kReciprocals[4] = {0x3f3504f3u, 0x3f13cd3au, 0x3f000000u, 0x3ed105ebu};

  // Of a stored scale. Without one all codes are 0, and the root of this is 1.
  TORCHAO8_HD explicit FourBitRoots(float scale) {
    const uint32_t exponent = scale >= kMinScale ? float_bits(scale) >> 23 : 127 + 7;
    base = 2 * exponent + 2;
  }

  // What an exponent field goes up by for the root of this code, modulo 2^32.
  TORCHAO8_HD uint32_t shift(uint32_t code) const {
    return ((base + code) >> 2 << 23) - (68u << 23);
  }

  TORCHAO8_HD float root(uint32_t code) const {
    return bits_float(pick<kRoots[0], kRoots[1], kRoots[2], kRoots[3]>(base + code) + shift(code));
  }
  TORCHAO8_HD float reciprocal_of_root(uint32_t code) const {
    return bits_float(
        pick<kReciprocals[0], kReciprocals[1], kReciprocals[2], kReciprocals[3]>(base + code) -
        shift(code));
  }

 private:
  // The one of number i modulo 4. By selections, so that a GPU needs no memory to look one up.
  template <uint32_t k0, uint32_t k1, uint32_t k2, uint32_t k3>
  static TORCHAO8_HD uint32_t pick(uint32_t i) {
    const uint32_t low = i & 1 ? k1 : k0, high = i & 1 ? k3 : k2;
    return i & 2 ? high : low;
  }
};

}  // namespace torchao8
