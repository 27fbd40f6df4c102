// The table of a format for an instruction set. An isa_*_*.cpp includes this behind the format's
// loops, which are in the namespace TORCHAO8_ISA::TORCHAO8_LOOPS: step_blocks_of, quantize_block,
// dequantize_block and StateDecoder (which a format that has blocks only need not define).
// TORCHAO8_KERNELS is the function that gives the table of TORCHAO8_FORMAT.
#include "cpu/step/extremes.inl"
#include "cpu/step/measure.inl"

namespace torchao8 {

namespace TORCHAO8_ISA::TORCHAO8_LOOPS {

template <class Rule>
constexpr BlockKernels<Rule> make_block_kernels() {
  if constexpr (Rule::kStates == 0 || !TORCHAO8_FORMAT::template kTakes<Rule>) {
    return {};
  } else if constexpr (TORCHAO8_FORMAT::kBlocksOnly) {
    return {{step_blocks_of<Rule, float>, step_blocks_of<Rule, BFloat16>}, {}};
  } else {
    using Decoder = StateDecoder<Rule>;
    return {{step_blocks_of<Rule, float>, step_blocks_of<Rule, BFloat16>},
            {find_extremes<Decoder, Rule, float>, find_extremes<Decoder, Rule, BFloat16>}};
  }
}

template <class Rule>
constexpr decltype(FormatKernels::measure) make_measure() {
  if constexpr (TORCHAO8_FORMAT::kBlocksOnly) {
    return nullptr;
  } else {
    return measure_block<StateDecoder<Rule>, Rule>;
  }
}

template <class... Rule>
constexpr FormatKernels make_kernels(Types<Rule...>) {
  return {{make_block_kernels<Rule>()...},
          make_measure<LambRule>(),
          {{quantize_block<false>, quantize_block<true>},
           {dequantize_block<false>, dequantize_block<true>}}};
}

}  // namespace TORCHAO8_ISA::TORCHAO8_LOOPS

template <class Format>
const FormatKernels& TORCHAO8_KERNELS() {
  static constexpr FormatKernels kernels = TORCHAO8_ISA::TORCHAO8_LOOPS::make_kernels(AllRules());
  return kernels;
}
template const FormatKernels& TORCHAO8_KERNELS<TORCHAO8_FORMAT>();

}  // namespace torchao8
