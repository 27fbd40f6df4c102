// The stored numbers of all states of a rule.
#pragma once

#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA::dynamic {

template <class Rule>
struct StateDecoder {
  Decoder<true> of_signed;
  Decoder<false> of_unsigned;
  TORCHAO8_HD explicit StateDecoder(const CodecTables& t = codec_tables())
      : of_signed(t), of_unsigned(t) {}

  static TORCHAO8_HD float scale(float stored) { return stored; }
  static TORCHAO8_HD float kept(float old) { return old; }

  // codes: for each state where they begin; i: the first element of the vector.
  template <class Codes>
  TORCHAO8_HD void operator()(const Codes& codes, int64_t i, F* values) const {
    for_each_state<Rule::kStates>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (Rule::kSigned[s]) {
        values[s] = of_signed(codes[s] + i);
      } else {
        values[s] = of_unsigned(codes[s] + i);
      }
    });
  }
};

}  // namespace torchao8::TORCHAO8_ISA::dynamic
