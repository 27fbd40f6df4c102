// Each kind of step kernel for one rule, and one kernel of each kind for every other rule: what
// nvcc makes of these takes seconds, where all of csrc/cuda takes minutes.
#include "cuda/one_scale.cuh"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace torchao8::cuda {

#define BLOCKS(T, kBlocks, kRounds, ...)                                            \
  template __global__ void step_blocks<__VA_ARGS__, T, kBlocks, kRounds>(           \
      const __grid_constant__ Table<__VA_ARGS__, BlockEntry<__VA_ARGS__::kStates>>, \
      const Tables*);
#define ELEMENTS(T, kRounds, ...)                                  \
  template __global__ void step_elements<__VA_ARGS__, T, kRounds>( \
      const __grid_constant__ Table<__VA_ARGS__, ElementEntryOf<__VA_ARGS__::kStates, kRounds>>);
#define ONE_SCALE(T, kRounds, ...)                                                     \
  template __global__ void step_one_scale<__VA_ARGS__, T, kRounds>(                    \
      const __grid_constant__ Table<__VA_ARGS__, OneScaleEntry<__VA_ARGS__::kStates>>, \
      const Tables*);

#define ADAMW AdamRule<false, true>
BLOCKS(float, Blocks::kSpan, false, ADAMW)
BLOCKS(float, Blocks::kShort, false, ADAMW)
BLOCKS(float, Blocks::kLong, false, ADAMW)
BLOCKS(Half, Blocks::kSpan, false, ADAMW)
BLOCKS(BFloat16, Blocks::kSpan, false, ADAMW)
BLOCKS(BFloat16, Blocks::kSpan, true, ADAMW)
BLOCKS(BFloat16, Blocks::kLong, true, ADAMW)
ELEMENTS(float, false, ADAMW)
ELEMENTS(BFloat16, true, ADAMW)
ONE_SCALE(float, false, ADAMW)
ONE_SCALE(BFloat16, true, ADAMW)

// Every rule's arithmetic is in both. Which ways blocks lie, and the types, no rule knows.
#define BRIEFLY(...)                                 \
  BLOCKS(BFloat16, Blocks::kSpan, true, __VA_ARGS__) \
  ELEMENTS(float, false, __VA_ARGS__)
BRIEFLY(AdamRule<true, true>)
BRIEFLY(AdamRule<false, false>)
BRIEFLY(AdamRule<true, false>)
BRIEFLY(AdagradRule)
BRIEFLY(AdemamixRule)
BRIEFLY(RmspropRule<false, false>)
BRIEFLY(RmspropRule<false, true>)
BRIEFLY(RmspropRule<true, false>)
BRIEFLY(RmspropRule<true, true>)
BRIEFLY(SgdRule<true, false>)
BRIEFLY(SgdRule<true, true>)
ELEMENTS(float, false, SgdRule<false, false>)

}  // namespace torchao8::cuda
