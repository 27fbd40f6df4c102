#include "cuda/device_codec.h"

#include "cuda/codec.cuh"

namespace torchao8::cuda {
namespace {

__device__ const Tables device_tables = make_tables();

}  // namespace

const Tables* tables_on(const Launcher& launcher) {
  void* address = nullptr;
  launcher.check(cudaGetSymbolAddress(&address, device_tables));
  return static_cast<const Tables*>(address);
}

}  // namespace torchao8::cuda
