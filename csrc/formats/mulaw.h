// The mu-law format of 8-bit state, as arithmetic for host and device. The companding is that of
// ITU-T G.711 (1972): a number x in units of its block's scale is kept as the leading bits of the
// float 1 + x. Small numbers so are in equal steps from an exact zero on, and large ones in steps
// that grow with them. With M mantissa bits and code c = 2^M e + k,
//     value = scale * (2^e (1 + k / 2^M) - 1).
// A code of an unsigned state has 8 bits; one of a signed state has 7, and its sign above them
// (byte 128 is -0.0). Neither direction needs a table.
//
// Encoding adds bits to those of the float 1 + x and drops the lowest 23 - M: random bits, or one
// half to round to nearest. The bits of a float are linear in its value between two powers of two,
// and the code behind the last one of a binade is the first one of the next. So a random number
// rounds up with a chance that is linear in the distance between codes, everywhere.
//
// A block's scale follows from `extreme`, which no magnitude of its new state exceeds: the largest
// one, or a bound. It is rounded up to a few bits, so that the grid of values stays where it is as
// long as the extreme stays about the same. Numbers that lie on the grid, and do not move, keep
// their codes then.
#pragma once

#include "codec/block_scale.h"

namespace torchao8 {

// The least float with so many mantissa bits that is not below x, but for 64 units in the last
// place of x, 2^-17: a state at rest is decoded and scaled with a few roundings, and must get its
// scale again whichever way they went.
template <int kBits>
TORCHAO8_HD float round_up_to_bits(float x) {
  constexpr uint32_t kDropped = (1u << (23 - kBits)) - 1, kTolerance = 64;
  return bits_float((float_bits(x) + (kDropped - kTolerance)) & ~kDropped);
}

template <bool kSigned, int kMantissaBits>
struct MulawCodec {
  static constexpr int kShift = 23 - kMantissaBits;  // bits of the float that are dropped
  static constexpr uint32_t kLast = kSigned ? 127 : 255;
  static constexpr uint32_t kOneBits = 0x3f800000u;
  // The value of the last code at scale 1.
  static constexpr float kTop = bits_float(kOneBits + (kLast << kShift)) - 1.0f;

  // ---- one number -------------------------------------------------------------------------------

  // The value of a byte at scale 1, exactly.
  static TORCHAO8_HD float decode(uint32_t byte) {
    const float value = bits_float(kOneBits + ((byte & kLast) << kShift)) - 1.0f;
    return kSigned ? bits_float(float_bits(value) | (byte >> 7 << 31)) : value;
  }

  // What is added before the lowest bits are dropped.
  static constexpr uint32_t kHalf = 1u << (kShift - 1);  // to nearest, ties away from zero
  static TORCHAO8_HD uint32_t draw(uint32_t hash) {      // stochastically, by a hash's top bits
    return hash >> (32 - kShift);
  }

  // The byte of x. `floor` is least_code() of the block. A number that the tolerance of the scale
  // has left above the last code's gets that code.
  static TORCHAO8_HD uint32_t encode(float x, float inverse, uint32_t added, uint32_t floor) {
    const uint32_t bits = float_bits(fma(std::fabs(x), inverse, 1.0f)) - kOneBits;
    const uint32_t rounded = (bits + added) >> kShift, code = rounded < kLast ? rounded : kLast;
    if constexpr (kSigned) {
      return code | (float_bits(x) >> 31 << 7);
    } else {
      return code > floor ? code : floor;
    }
  }

  // ---- a block ----------------------------------------------------------------------------------

  // Of an unsigned state where the block has a scale: no second moment is rounded to zero.
  static TORCHAO8_HD uint32_t least_code(float scale) { return !kSigned && scale > 0.0f; }

  // The scale for an extreme in these units: 0 where it would be below the smallest normal float,
  // NaN where the extreme is none. kStill: of a state that a step moves by less than a code, which
  // is why a rule rounds it stochastically. A power of two then; the grid moves only when the
  // extreme has doubled or halved, and schedules of the units do not move it.
  template <bool kStill>
  static TORCHAO8_HD float scale_of(float extreme, float unit) {
    if (!usable<false>(extreme)) return bits_float(0x7fc00000u);
    const float exact = extreme * unit * (1.0f / kTop);
    return exact < kMinScale ? 0.0f : round_up_to_bits<kStill ? 0 : 7>(exact);
  }

  // What numbers in these units are multiplied by before encoding: exact where the scale is a power
  // of two.
  static TORCHAO8_HD float inverse_of(float scale, float unit) {
    return scale > 0.0f ? unit / scale : 0.0f;
  }
};

}  // namespace torchao8
