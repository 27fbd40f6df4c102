// The tables of formats on the device, a part of the program.
#pragma once

#include "cuda/formats/dynamic.cuh"
#include "cuda/formats/four_bit.cuh"
#include "cuda/formats/mulaw.cuh"
#include "cuda/launch.h"

namespace torchao8::cuda {

const dynamic::Tables* dynamic_tables_on(const Launcher& launcher);

// On the launcher's device, which is the current one. Null where a format does not copy any.
template <class Format>
const TablesOf<Format>* tables_on(const Launcher& launcher) {
  if constexpr (std::is_same_v<Format, DynamicFormat>) {
    return dynamic_tables_on(launcher);
  } else {
    return nullptr;
  }
}

}  // namespace torchao8::cuda
