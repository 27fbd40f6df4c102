#include "cuda/device_codec.h"

namespace torchao8::cuda {
namespace {

__device__ const dynamic::Tables device_tables = dynamic::make_tables();

}  // namespace

const dynamic::Tables* dynamic_tables_on(const Launcher& launcher) {
  void* address = nullptr;
  launcher.check(cudaGetSymbolAddress(&address, device_tables));
  return static_cast<const dynamic::Tables*>(address);
}

}  // namespace torchao8::cuda
