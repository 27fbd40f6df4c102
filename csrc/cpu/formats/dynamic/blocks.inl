// Runs of blocks of 8-bit state.
#pragma once

#include "cpu/formats/dynamic/encode.inl"
#include "cpu/formats/dynamic/moments.inl"
#include "cpu/kernel_tables.h"

namespace torchao8::TORCHAO8_ISA::dynamic {

template <class Rule, class T>
TORCHAO8_COLD void scalar_block(const Rule& rule, const Block<Rule, T>& block, BlockRun run) {
  run.param = block.param;
  run.grad = block.grad;
  for (int s = 0; s < Rule::kStates; s++) {
    run.codes[s] = block.codes[s];
    run.scales[s] = block.scales[s];
  }
  run.blocks = 1;
  run.first_element = block.first_element;
  const auto& step = block_kernels<Rule>(scalar_kernels<DynamicFormat>()).step;
  (std::is_same_v<T, float> ? step.float32 : step.bfloat16)(rule, run);
}

// The second pass of a block goes together with the first pass of the next one, vector by vector:
// neither waits for the other, and the divider, the look-ups and the arithmetic are all kept busy.
template <class Rule, class T, bool kStochastic, bool kRounds>
void step_blocks(const Rule& rule, const CodecTables& tables, const BlockRun& run) {
  constexpr int N = Rule::kStates;
  using First = Moments<Rule, T, kRounds>;
  using Second = UpdateAndEncode<Rule, T, kStochastic, kRounds>;
  const int length = run.length;
  Ring<Rule::kValues> ring;
  ring.end = 2 * length;
  for (auto& values : ring.values) {  // what is read ahead of a run of one block
    store(values + length, F(0.0f));
    store(values + length + kWidth, F(0.0f));
  }
  Plan<N> plans[2];
  Pipeline<Rule> pipeline;
  Block<Rule, T> block(run);

  First head(rule, tables, block, ring, 0);
  for (int i = 0; i < length; i += kWidth) head(i);
  head.template finish<kStochastic>(plans[0], run);
  for (int64_t k = 0; k + 1 < run.blocks; k++) {
    const int now = int(k & 1);
    Block<Rule, T> next = block;
    next.advance(length);
    First first(rule, tables, next, ring, now ? 0 : length);
    if (plans[now].good) {
      Second second(rule, tables, block, ring, now ? length : 0, plans[now], pipeline);
      for (int i = 0; i < length; i += kWidth) {
        first(i);
        second(i);
      }
      second.finish(length);
    } else {
      scalar_block(rule, block, run);
      for (int i = 0; i < length; i += kWidth) first(i);
      pipeline.full = false;
    }
    first.template finish<kStochastic>(plans[!now], run);
    block = next;
  }
  const int now = int((run.blocks - 1) & 1);
  if (plans[now].good) {
    Second second(rule, tables, block, ring, now ? length : 0, plans[now], pipeline);
    for (int i = 0; i < length; i += kWidth) second(i);
    second.finish(length);
  } else {
    scalar_block(rule, block, run);
  }
}

template <class Rule, class T>
void step_blocks_of(const Rule& rule, const BlockRun& run) {
  const CodecTables& tables = *run.tables;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (run.rounds_param) {
      run.stochastic ? step_blocks<Rule, T, true, true>(rule, tables, run)
                     : step_blocks<Rule, T, false, true>(rule, tables, run);
      return;
    }
  }
  run.stochastic ? step_blocks<Rule, T, true, false>(rule, tables, run)
                 : step_blocks<Rule, T, false, false>(rule, tables, run);
}

}  // namespace torchao8::TORCHAO8_ISA::dynamic
