// What the engine (engine.h) asks of an instruction set. Each isa_*.cpp provides one table of these
// functions per update rule, and one for the codec; all give the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "codec/block_scale.h"
#include "codec/floats.h"
#include "codec/random.h"
#include "cpu/codec_tables.h"
#include "cpu/square_sum.h"
#include "rules/rule.h"

namespace torchao8 {

constexpr int kMaxBlock = 2048;
constexpr int kWidest = 16;  // every vector path takes lengths that are multiples of this

// Neighbouring blocks of one tensor, each `length` elements, contiguous in every array.
struct BlockRun {
  void* param;
  const void* grad;
  uint8_t* codes[kMaxStates];
  float* scales[kMaxStates];
  int64_t blocks;
  int length;
  bool stochastic, rounds_param;  // stochastically: states; the parameter, which is bfloat16
  uint64_t keys[kMaxStates], param_key;
  uint64_t first_element;  // global index, for the random numbers
  const float* extremes;   // of a whole tensor's states, in units; null: each block has its own
};

// Neighbouring elements of one tensor with 32-bit state.
struct ElementRun {
  void* param;
  const void* grad;
  float* states[kMaxStates];
  int64_t count;
  bool rounds_param;  // as above; then all of them follow each other in the whole tensor
  uint64_t param_key, first_element;
};

// Elements of a tensor with one scale, whose new states are looked at; the count is a multiple of
// kWidest.
struct ExtremeRun {
  const void* param;
  const void* grad;
  const uint8_t* codes[kMaxStates];
  float scales[kMaxStates];
  int64_t count;
};

// param and grad have one type: float32 or bfloat16. What else there is comes converted. A rule
// without states has no kernels for blocks.
template <class Rule>
struct StepKernels {
  void (*blocks_float32)(const Rule&, const CodecTables&, const BlockRun&);
  void (*blocks_bfloat16)(const Rule&, const CodecTables&, const BlockRun&);
  void (*elements_float32)(const Rule&, const ElementRun&);
  void (*elements_bfloat16)(const Rule&, const ElementRun&);
  // The extreme element of each new state, in units. A result for which usable() is false means
  // that there is no extreme element.
  void (*extremes_float32)(const Rule&, const CodecTables&, const ExtremeRun&, float*);
  void (*extremes_bfloat16)(const Rule&, const CodecTables&, const ExtremeRun&, float*);

  template <class T>
  auto blocks() const {
    if constexpr (std::is_same_v<T, float>) {
      return blocks_float32;
    } else {
      return blocks_bfloat16;
    }
  }
};

// Of a rule whose update is looked at before it is made: what it would be, as float32.
template <class Rule>
struct MeasureKernels {
  void (*block)(const Rule&, const CodecTables&, const BlockRun&, float* updates);  // of one block
  void (*elements)(const Rule&, const ElementRun&, float* updates);
};

struct CodecKernels {
  // One block of float32, nearest rounding: writes codes, returns the scale. A block with an
  // element that is not finite gets scale NaN.
  float (*quantize[2])(const CodecTables&, const float* x, int n, uint8_t* codes);  // [signed]
  void (*dequantize[2])(const CodecTables&, const uint8_t* codes, int n, float scale, float* x);
  void (*widen)(FloatType, const void* from, int64_t n, float* to);
  void (*narrow)(FloatType, const float* from, int64_t n, void* to);
};

// Adds the exact squares of the finite ones of n floats.
using AddSquares = void(const float* x, int64_t n, SquareSum& sum);

enum class Capability : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };
Capability cpu_capability();

// One table or function per instruction set; measure_kernels(), codec_kernels() and
// add_squares_kernel() are those of the path in use. Those of all rules: kernel_tables.h.
template <class Rule>
const MeasureKernels<Rule>& scalar_measures();
template <class Rule>
const MeasureKernels<Rule>& avx2_measures();
template <class Rule>
const MeasureKernels<Rule>& avx512_measures();
const CodecKernels& scalar_codec();
const CodecKernels& avx2_codec();
const CodecKernels& avx512_codec();
AddSquares scalar_add_squares, avx2_add_squares, avx512_add_squares;

template <class Rule>
const MeasureKernels<Rule>& measure_kernels() {
#if TORCHAO8_X86
  if (cpu_capability() == Capability::kAvx512) return avx512_measures<Rule>();
  if (cpu_capability() == Capability::kAvx2) return avx2_measures<Rule>();
#endif
  return scalar_measures<Rule>();
}
const CodecKernels& codec_kernels();
AddSquares* add_squares_kernel();

}  // namespace torchao8
