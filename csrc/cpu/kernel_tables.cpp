// The kernels of the path in use.
#include "cpu/kernel_tables.h"

namespace torchao8 {
namespace {

template <class Format>
const FormatKernels& kernels_in_use() {
#if TORCHAO8_X86
  if (cpu_capability() == Capability::kAvx512) return avx512_kernels<Format>();
  if (cpu_capability() == Capability::kAvx2) return avx2_kernels<Format>();
#endif
  return scalar_kernels<Format>();
}

}  // namespace

const FormatKernels& format_kernels(int64_t number) {
  const FormatKernels* found = nullptr;
  visit_format(Formats(), number,
               [&](auto type) { found = &kernels_in_use<typename decltype(type)::type>(); });
  return *found;
}

const ElementTable& element_table() {
#if TORCHAO8_X86
  if (cpu_capability() == Capability::kAvx512) return avx512_elements();
  if (cpu_capability() == Capability::kAvx2) return avx2_elements();
#endif
  return scalar_elements();
}

}  // namespace torchao8
