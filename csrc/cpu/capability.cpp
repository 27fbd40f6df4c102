// Which of the instruction sets this processor has, unless TORCHAO8_CPU says otherwise.
#include <cstdlib>
#include <string>

#include "cpu/kernels.h"
#include "op/checks.h"

namespace torchao8 {
namespace {

Capability processor_capability() {
#if TORCHAO8_X86
  __builtin_cpu_init();  // also asks whether the system saves the registers
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Capability::kScalar;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
    return Capability::kAvx512;
  }
  return Capability::kAvx2;
#else
  return Capability::kScalar;
#endif
}

Capability choose() {
  const Capability best = processor_capability();
  const char* variable = std::getenv("TORCHAO8_CPU");
  if (variable == nullptr || *variable == '\0') return best;
  const std::string name = variable;
  if (name == "portable") return best;  // read in Python, which does without the kernels
  TORCHAO8_CHECK(name == "avx512" || name == "avx2" || name == "scalar",
                 "TORCHAO8_CPU must be avx512, avx2, scalar or portable, got ", name);
  const Capability wanted = name == "avx512" ? Capability::kAvx512
                            : name == "avx2" ? Capability::kAvx2
                                             : Capability::kScalar;
  TORCHAO8_CHECK(wanted <= best, "TORCHAO8_CPU asks for ", name,
                 ", which this processor does not have");
  return wanted;
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

const ConvertKernels& convert_kernels() {
#if TORCHAO8_X86
  if (cpu_capability() == Capability::kAvx512) return avx512_converts();
  if (cpu_capability() == Capability::kAvx2) return avx2_converts();
#endif
  return scalar_converts();
}

AddSquares* add_squares_kernel() {
#if TORCHAO8_X86
  if (cpu_capability() == Capability::kAvx512) return avx512_add_squares;
  if (cpu_capability() == Capability::kAvx2) return avx2_add_squares;
#endif
  return scalar_add_squares;
}

}  // namespace torchao8
