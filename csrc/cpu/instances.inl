// The tables of an instruction set but for the formats of state. An isa_*.cpp includes this behind
// the loops, with TORCHAO8_ISA naming their namespace and the other macros what it defines.
namespace torchao8 {

namespace TORCHAO8_ISA {
template <class... Rule>
constexpr ElementTable make_elements(Types<Rule...>) {
  return {{ElementKernels<Rule>{{step_elements<Rule, float>, step_elements<Rule, BFloat16>}}...},
          measure_elements<LambRule>};
}
}  // namespace TORCHAO8_ISA

const ElementTable& TORCHAO8_ELEMENTS() {
  static constexpr ElementTable table = TORCHAO8_ISA::make_elements(AllRules());
  return table;
}

const ConvertKernels& TORCHAO8_CONVERTS() {
  static constexpr ConvertKernels kernels = {TORCHAO8_ISA::widen, TORCHAO8_ISA::narrow};
  return kernels;
}

void TORCHAO8_ADD_SQUARES(const float* x, int64_t n, SquareSum& sum) {
  TORCHAO8_ISA::add_squares(x, n, sum);
}

}  // namespace torchao8
