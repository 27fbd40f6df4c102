// Codes of the dynamic map (codec/dynamic_map.h), the scale being the element of largest magnitude
// with its sign (codec/block_scale.h).
#pragma once

#include "codec/block_scale.h"

namespace torchao8 {

struct DynamicFormat {
  static constexpr const char* kName = "dynamic";
  static constexpr int kBits = 8, kStep = 16;
  static constexpr bool kBlocksOnly = false;
  template <class Rule>
  static constexpr bool kTakes = true;
  template <class Rule>
  static constexpr bool draws(int s) {
    return Rule::kStochastic[s];
  }

  template <bool kSigned>
  static constexpr uint8_t zero_byte() {
    return zero_code<kSigned>();
  }
  template <bool kSigned, bool kStill>
  static TORCHAO8_HD float scale_of(float extreme, float unit) {
    return torchao8::scale_of<kSigned>(extreme, unit);
  }
};

}  // namespace torchao8
