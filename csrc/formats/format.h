// What a format of state is: how a block of a state's numbers is stored as codes and a scale.
//
// A format is to a state what a rule is to an optimizer: rules know nothing of formats, formats
// nothing of rules. Here is what both host and engines must know of one. It has
//     kName           in messages
//     kBits           of a code: 8, or 4, two codes sharing a byte
//     kStep           the vector kernels take blocks whose length is a multiple of this
//     kTakes<Rule>    whether there are kernels of a rule
//     draws<Rule>(s)  whether a state is rounded stochastically, if the caller says so
//     kBlocksOnly     whether each block has a scale of its own, and no step is looked at before it
//                     is made: no tensor has one scale, and LAMB's updates are not measured
//     zero_byte<kSigned>()   a byte of codes that stand for 0 in a block without a scale
//     scale_of<kSigned, kStill>(extreme, unit)   the scale to store for the element of largest
//                     magnitude of a tensor with one scale, in units. kStill: whether a rule rounds
//                     the state stochastically, as steps move it by less than a code. Not of
//                     kBlocksOnly
// The loops of a format for each instruction set are in cpu/formats/. formats.h lists all formats.
#pragma once

#include "macros.h"
#include "rules/rule.h"

namespace torchao8 {

// The same at run time.
struct FormatInfo {
  const char* name;
  int bits, step;
  bool blocks_only;
  uint8_t zero_byte[2];                                // [signed]
  float (*scale_of[2][2])(float extreme, float unit);  // [signed][still]; null: blocks only
  int64_t bytes(int64_t elements) const { return (elements * bits + 7) >> 3; }
  // Sets what the last byte of a row of this length has left over, if anything.
  void clear_after(int length, uint8_t* codes, uint8_t zero) const {
    if (bits == 8 || length % 2 == 0) return;
    codes[length / 2] = uint8_t((codes[length / 2] & 15) | (zero & 0xf0));
  }
  // Of a length, what is missing to a multiple of step, a power of two: no division for each row.
  int padding(int length) const { return -length & (step - 1); }
};

template <class Format>
constexpr FormatInfo make_format_info() {
  static_assert((Format::kStep & (Format::kStep - 1)) == 0);
  FormatInfo info = {Format::kName,
                     Format::kBits,
                     Format::kStep,
                     Format::kBlocksOnly,
                     {Format::template zero_byte<false>(), Format::template zero_byte<true>()},
                     {}};
  if constexpr (!Format::kBlocksOnly) {
    info.scale_of[false][false] = Format::template scale_of<false, false>;
    info.scale_of[false][true] = Format::template scale_of<false, true>;
    info.scale_of[true][false] = Format::template scale_of<true, false>;
    info.scale_of[true][true] = Format::template scale_of<true, true>;
  }
  return info;
}

}  // namespace torchao8
