// The 4-bit format: which rules it takes, how two codes share a byte, and how a block of floats is
// encoded without a rule.
#pragma once

#include "formats/four_bit.h"
#include "rules/rule.h"

namespace torchao8 {

struct FourBitFormat {
  static constexpr const char* kName = "4bit";
  static constexpr int kBits = 4, kStep = 32;
  static constexpr bool kBlocksOnly = true;
  // What a signed state is divided by must be known.
  template <class Rule>
  static constexpr bool kTakes = kNamesRoots<Rule>;

  // Whether a state is rounded stochastically, if the caller says so: also signed ones of rules
  // that do not say it, where they have no roots (four_bit.h has the reason).
  template <class Rule>
  static constexpr bool draws(int s) {
    return Rule::kStochastic[s] || (Rule::kSigned[s] && Rule::kRootOf[s] < 0);
  }

  template <bool kSigned>
  static constexpr uint8_t zero_byte() {
    return kSigned ? FourBitLevels::kZero * 17 : 0;
  }
};

// The code of element i of a row, or of a part that begins with a whole byte.
TORCHAO8_HD uint32_t four_bit_code(const uint8_t* bytes, int64_t i) {
  return bytes[i >> 1] >> (i & 1) * 4 & 15;
}

// Stored scales as steps take them: what cannot be one is NaN, and so are the new states then.
template <bool kSigned>
TORCHAO8_HD float four_bit_scale(float stored) {
  return usable<kSigned>(stored) ? stored : bits_float(0x7fc00000u);
}

// How a block of floats is encoded to nearest, without a rule: signed ones with roots of 1.
struct FourBitScale {
  float scale, inverse;
};

// By the highest and the lowest number, where unsigned only the highest counts: also of 2^126 or
// more, which no step leaves. NaN or infinite: they are not encoded.
template <bool kSigned>
TORCHAO8_HD FourBitScale four_bit_scale_of_ends(float highest, float lowest) {
  const bool is_large = !(std::fabs(highest) < kOverflow && std::fabs(lowest) < kOverflow);
  const float factor = is_large ? 4.0f : 1.0f;
  FourBitScale to;
  if constexpr (kSigned) {
    to.scale = FourBitLevels::scale_of(highest / factor, lowest / factor, 1.0f);
    to.inverse = FourBitLevels::inverse_of(to.scale, 1.0f);
  } else {
    to.scale = FourBitSquares::scale_of(highest / factor, 1.0f);
    to.inverse = FourBitSquares::inverse_of(to.scale, 1.0f);
  }
  to.scale *= factor;
  to.inverse /= factor;
  return to;
}

template <bool kSigned>
TORCHAO8_HD FourBitScale four_bit_scale_of_block(const float* x, int n) {
  float highest = 0.0f, lowest = 0.0f;
  bool good = true;
  for (int i = 0; i < n; i++) {
    highest = x[i] > highest ? x[i] : highest;
    lowest = x[i] < lowest ? x[i] : lowest;
    good = good && std::isfinite(x[i]) && (kSigned || x[i] >= 0.0f);
  }
  return four_bit_scale_of_ends<kSigned>(good ? highest : bits_float(0x7fc00000u), lowest);
}

}  // namespace torchao8
