// The format of state that a check is of: the dynamic one, or what the compiler is told with
// -DFORMAT.
#pragma once

#include "cuda/formats/dynamic.cuh"
#include "cuda/formats/four_bit.cuh"
#include "cuda/formats/mulaw.cuh"

#ifndef FORMAT
#define FORMAT DynamicFormat
#endif
using Format = torchao8::FORMAT;

constexpr torchao8::cuda::dynamic::Tables make_tables(torchao8::DynamicFormat) {
  return torchao8::cuda::dynamic::make_tables();
}
template <class Other>  // these copy nothing from memory
constexpr torchao8::cuda::TablesOf<Other> make_tables(Other) {
  return {};
}
// In memory, as a GPU has them.
inline const torchao8::cuda::TablesOf<Format> kTables = make_tables(Format());
