// What the engine (engine.h) asks of an instruction set. Each isa_*.cpp provides tables of these
// functions; all give the same bits.
#pragma once

#include <cstdint>

#include "codec/block_scale.h"
#include "codec/floats.h"
#include "codec/random.h"
#include "cpu/square_sum.h"
#include "rules/rule.h"

namespace torchao8 {

constexpr int kMaxBlock = 2048;
constexpr int kWidest = 16;  // vector paths take lengths that are multiples of this, or more

struct CodecTables;

// Neighbouring blocks of one tensor, each `length` elements, contiguous in every array.
struct BlockRun {
  const CodecTables* tables;  // of the dynamic format: asked for once a call, not for each run
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

// param and grad have one type: float32 or bfloat16. What else there is comes converted.
template <class Kernel>
struct ByType {
  Kernel* float32;
  Kernel* bfloat16;
  Kernel* of(FloatType type) const { return type == FloatType::kBFloat16 ? bfloat16 : float32; }
};

// Of blocks in one format. A rule without states has none.
template <class Rule>
struct BlockKernels {
  ByType<void(const Rule&, const BlockRun&)> step;
  // The extreme element of each new state, in units. A result for which usable() is false means
  // that there is no extreme element.
  ByType<void(const Rule&, const ExtremeRun&, float*)> extremes;
};

// Of 32-bit state.
template <class Rule>
struct ElementKernels {
  ByType<void(const Rule&, const ElementRun&)> step;
};

// A format by itself, [signed].
struct CodecKernels {
  // One block of float32, nearest rounding: writes codes, returns the scale. A block with an
  // element that is not finite gets scale NaN.
  float (*quantize[2])(const float* x, int n, uint8_t* codes);
  void (*dequantize[2])(const uint8_t* codes, int n, float scale, float* x);
};

struct ConvertKernels {
  void (*widen)(FloatType, const void* from, int64_t n, float* to);
  void (*narrow)(FloatType, const float* from, int64_t n, void* to);
};

// Adds the exact squares of the finite ones of n floats.
using AddSquares = void(const float* x, int64_t n, SquareSum& sum);

enum class Capability : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };
Capability cpu_capability();

// One of each per instruction set; convert_kernels() and add_squares_kernel() are those of the path
// in use. Those of all rules and formats: kernel_tables.h.
const ConvertKernels& scalar_converts();
const ConvertKernels& avx2_converts();
const ConvertKernels& avx512_converts();
AddSquares scalar_add_squares, avx2_add_squares, avx512_add_squares;
const ConvertKernels& convert_kernels();
AddSquares* add_squares_kernel();

}  // namespace torchao8
