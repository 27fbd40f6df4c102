// The kernels of every rule, a table per instruction set, and per format of state for blocks.
//
// An isa_*.cpp includes this, and with it the rules, where functions are compiled for its set: a
// rule is inlined in the loops there.
#pragma once

#include "cpu/kernels.h"
#include "formats/formats.h"
#include "rules/families.h"
#include "rules/lamb.h"
#include "rules/update.h"

namespace torchao8 {

template <template <class> class Kernels, class List>
struct TableOf;
template <template <class> class Kernels, class... Rule>
struct TableOf<Kernels, Types<Rule...>> : Kernels<Rule>... {};

// Those of one format. `measure` gives what the updates of a block would be, as float32.
struct FormatKernels {
  TableOf<BlockKernels, AllRules> blocks;
  void (*measure)(const LambRule&, const BlockRun&, float* updates);
  CodecKernels codec;
};

// Those of 32-bit state.
struct ElementTable {
  TableOf<ElementKernels, AllRules> elements;
  void (*measure)(const LambRule&, const ElementRun&, float* updates);
};

template <class Format>
const FormatKernels& scalar_kernels();
template <class Format>
const FormatKernels& avx2_kernels();
template <class Format>
const FormatKernels& avx512_kernels();
const ElementTable& scalar_elements();
const ElementTable& avx2_elements();
const ElementTable& avx512_elements();

// Forced inline, as what is emitted for an instruction set must not serve a processor without it.
template <class Rule>
TORCHAO8_HD const BlockKernels<Rule>& block_kernels(const FormatKernels& kernels) {
  return kernels.blocks;
}
template <class Rule>
TORCHAO8_HD const ElementKernels<Rule>& element_kernels(const ElementTable& table) {
  return table.elements;
}

// Those of the path in use (kernel_tables.cpp). number: of a format, see formats/formats.h.
const FormatKernels& format_kernels(int64_t number);
const ElementTable& element_table();

}  // namespace torchao8
