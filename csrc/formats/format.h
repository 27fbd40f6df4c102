// What a format of state is: how a block of a state's numbers is stored as codes and a scale.
//
// A format is to a state what a rule is to an optimizer: rules know nothing of formats, formats
// nothing of rules. Here is what both host and engines must know of one. It has
//     kName           in messages
//     kBits           of a code
//     kStep           the vector kernels take blocks whose length is a multiple of this
//     zero_byte<kSigned>()   a byte of codes that stand for 0 in a block without a scale
//     scale_of<kSigned, kStill>(extreme, unit)   the scale to store for the element of largest
//                     magnitude of a tensor with one scale, in units. kStill: whether a rule rounds
//                     the state stochastically, as steps move it by less than a code
// The loops of a format for each instruction set are in cpu/formats/. formats.h lists all formats.
#pragma once

#include "macros.h"
#include "rules/rule.h"

namespace torchao8 {

// The same at run time.
struct FormatInfo {
  const char* name;
  int bits, step;
  uint8_t zero_byte[2];                                // [signed]
  float (*scale_of[2][2])(float extreme, float unit);  // [signed][still]
  int64_t bytes(int64_t elements) const { return (elements * bits + 7) >> 3; }
  // Of a length, what is missing to a multiple of step, a power of two: no division for each row.
  int padding(int length) const { return -length & (step - 1); }
};

template <class Format>
constexpr FormatInfo make_format_info() {
  static_assert((Format::kStep & (Format::kStep - 1)) == 0);
  return {Format::kName,
          Format::kBits,
          Format::kStep,
          {Format::template zero_byte<false>(), Format::template zero_byte<true>()},
          {{Format::template scale_of<false, false>, Format::template scale_of<false, true>},
           {Format::template scale_of<true, false>, Format::template scale_of<true, true>}}};
}

}  // namespace torchao8
