// The tables of an instruction set. An isa_*.cpp includes this behind the loops, with TORCHAO8_ISA
// naming their namespace and the other macros the tables.
#include "rules/lamb.h"

namespace torchao8 {

namespace TORCHAO8_ISA {
template <class... Rule>
constexpr KernelTableOf<Types<Rule...>> make_kernel_table(Types<Rule...>) {
  return {{make_step_kernels<Rule>()}...};
}
}  // namespace TORCHAO8_ISA

const KernelTable& TORCHAO8_KERNELS() {
  static constexpr KernelTable table = TORCHAO8_ISA::make_kernel_table(AllRules());
  return table;
}

template <class Rule>
const MeasureKernels<Rule>& TORCHAO8_MEASURES() {
  static constexpr MeasureKernels<Rule> kernels = TORCHAO8_ISA::make_measure_kernels<Rule>();
  return kernels;
}
template const MeasureKernels<LambRule>& TORCHAO8_MEASURES<LambRule>();

const CodecKernels& TORCHAO8_CODEC() {
  static constexpr CodecKernels kernels = TORCHAO8_ISA::make_codec_kernels();
  return kernels;
}

void TORCHAO8_ADD_SQUARES(const float* x, int64_t n, SquareSum& sum) {
  TORCHAO8_ISA::add_squares(x, n, sum);
}

}  // namespace torchao8
