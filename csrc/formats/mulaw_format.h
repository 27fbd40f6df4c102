// The mu-law format: its constants, and what a step must know of a block before it decodes one.
//
// A block's scale follows from a bound of its new states, which one look at the gradients, the
// parameters and the codes gives: the rule's own moments(), at the largest magnitudes of each
// (Rule::magnitudes()). So the block is decoded, stepped and encoded in one pass.
#pragma once

#include "formats/mulaw.h"

namespace torchao8 {

struct MulawFormat {
  static constexpr const char* kName = "mulaw";
  static constexpr int kBits = 8, kStep = 32;
  static constexpr bool kBlocksOnly = false;
  template <class Rule>
  static constexpr bool kTakes = true;
  template <class Rule>
  static constexpr bool draws(int s) {
    return Rule::kStochastic[s];
  }
  static constexpr int kMantissaBits[2] = {4, 4};  // [signed]

  template <bool kSigned>
  using Codec = MulawCodec<kSigned, kMantissaBits[kSigned]>;

  template <bool kSigned>
  static constexpr uint8_t zero_byte() {
    return 0;
  }
  template <bool kSigned, bool kStill>
  static TORCHAO8_HD float scale_of(float extreme, float unit) {
    return Codec<kSigned>::template scale_of<kStill>(std::fabs(extreme), unit);
  }
};

// A stored scale as steps take it: what cannot be one is NaN, and so are the new states then.
TORCHAO8_HD float mulaw_scale(float stored) {
  return usable<false>(stored) ? stored : bits_float(0x7fc00000u);
}

// Bounds of the magnitudes of a block's new states, in units. rule: of the block, with scales;
// largest_values: of each state's codes.
template <class Rule>
TORCHAO8_HD void mulaw_bounds(const Rule& rule, float largest_param, float largest_grad,
                              const float* largest_values, float* bounds) {
  float values[Rule::kValues] = {};
  for (int s = 0; s < Rule::kStates; s++) values[s] = largest_values[s];
  rule.magnitudes().template moments<true>(largest_param, largest_grad, values);
  for (int s = 0; s < Rule::kStates; s++) bounds[s] = values[s];
}

// How one state of a block is encoded, by what no magnitude of it exceeds, in units.
struct MulawScale {
  float scale, inverse;
  uint32_t least_code;

  template <bool kSigned, bool kStill>
  TORCHAO8_HD void set(float extreme, float unit) {
    using Codec = MulawFormat::Codec<kSigned>;
    scale = MulawFormat::scale_of<kSigned, kStill>(extreme, unit);
    inverse = Codec::inverse_of(scale, unit);
    least_code = Codec::least_code(scale);
  }
};

// How a block of floats is encoded to nearest, without a rule, by their largest magnitude: also one
// of 2^126 or more, which no step leaves. NaN or infinite: they are not encoded. Unsigned numbers
// are taken for those of a state that is rounded stochastically, as all unsigned states are. What
// is close to the largest float gets the largest scale at which the value of the last code is
// finite. (Of unsigned numbers, no such one gets a code whose value is not.)
template <bool kSigned>
TORCHAO8_HD MulawScale mulaw_scale_of_largest(float largest) {
  const float factor = largest < kOverflow ? 1.0f : 4.0f;
  MulawScale to = {};
  to.set<kSigned, !kSigned>(largest / factor, 1.0f);
  to.scale *= factor;
  to.inverse /= factor;
  constexpr float kTop = MulawFormat::Codec<kSigned>::kTop;
  constexpr float kMost = bits_float(float_bits(0x1.fffffep127f / kTop) & 0xffff0000u);
  if (kSigned && to.scale > kMost) {
    to.scale = kMost;
    to.inverse = 1.0f / kMost;
  }
  return to;
}

template <bool kSigned>
TORCHAO8_HD MulawScale mulaw_scale_of_block(const float* x, int n) {
  float largest = 0.0f;
  bool good = true;
  for (int i = 0; i < n; i++) {
    largest = max(std::fabs(x[i]), largest);
    good = good && std::isfinite(x[i]) && (kSigned || x[i] >= 0.0f);
  }
  return mulaw_scale_of_largest<kSigned>(good ? largest : bits_float(0x7fc00000u));
}

}  // namespace torchao8
