// The codec's tables on the device: part of the program, for each file that includes this.
#pragma once

#include "cuda/codec.cuh"
#include "cuda/launch.h"

namespace torchao8::cuda {
namespace {

__device__ const Tables device_tables = make_tables();

const Tables* tables_on(const Launcher& launcher) {
  void* address = nullptr;
  launcher.check(cudaGetSymbolAddress(&address, device_tables));
  return static_cast<const Tables*>(address);
}

}  // namespace
}  // namespace torchao8::cuda
