// Every format of state that has kernels. This is the one list: the position of a format in it is
// its number, which the ops take as state_format and Python reads from torchao8._C.FORMATS.
#pragma once

#include "formats/dynamic.h"
#include "formats/format.h"
#include "formats/four_bit_format.h"
#include "formats/mulaw_format.h"

namespace torchao8 {

using Formats = Types<DynamicFormat, MulawFormat, FourBitFormat>;

// Those in which LAMB's updates are measured.
using MeasuredFormats = Types<DynamicFormat, MulawFormat>;

template <class... Format>
constexpr int64_t count_formats(Types<Format...>) {
  return sizeof...(Format);
}

// Calls visit(Type<Format>()) for the format of a number, which must be one of the list.
template <class... Format, class Visit>
void visit_format(Types<Format...>, int64_t number, Visit visit) {
  int64_t next = 0;
  ((next++ == number ? visit(Type<Format>()) : void()), ...);
}

inline const FormatInfo& format_info(int64_t number) {
  const FormatInfo* found = nullptr;
  visit_format(Formats(), number, [&](auto type) {
    static constexpr FormatInfo info = make_format_info<typename decltype(type)::type>();
    found = &info;
  });
  return *found;
}

}  // namespace torchao8
